"""Running softmax statistics of rows of logits, with the label's logit kept apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Softmax statistics of N rows over the vocabulary columns read so far, in float32 (float64 for float64 logits).

    max_N: the largest logit. rest_N: Σ exp(logit − max) over all columns except the label's. label_N: the label's
    logit, −∞ until its column is read; a label outside the vocabulary therefore gives a log-probability of −∞.

    The sum leaves the label out because 1 − p = rest / (rest + exp(label − max)) then keeps its digits for p near 1:
    computed as a difference, 1 − p loses two of float32's seven digits at p = 0.99.
    """

    max_N: Tensor
    rest_N: Tensor
    label_N: Tensor

    @classmethod
    def start(cls, rows: int, like: Tensor) -> Softmax:
        """Statistics of `rows` rows before any column is read, with the dtype and device of `like`."""
        return cls(*(like.new_full((rows,), value) for value in (-torch.inf, 0.0, -torch.inf)))

    @property
    def log_sum_N(self) -> Tensor:
        """log Σ exp(logit − max) over all columns (N,)."""
        return (self.rest_N + (self.label_N - self.max_N).exp()).log()

    def logp(self) -> Tensor:
        """Log-probability of each row's label (N,)."""
        below_N = self.label_N - self.max_N
        near_N = -torch.log1p(self.rest_N * (-below_N).exp())  # exact for p near 1, where log_sum is near 0
        return torch.where(below_N > -1, near_N, below_N - self.log_sum_N)

    def label_grad(self, grad_logp_N: Tensor) -> Tensor:
        """g · (1 − p): the gradient of each row's label logit (N,) for the upstream gradient g of its logp."""
        return grad_logp_N * self.rest_N / (self.rest_N + (self.label_N - self.max_N).exp())
