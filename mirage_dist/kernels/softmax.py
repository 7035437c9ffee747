"""Running softmax statistics of rows of logits, with the label's logit kept apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
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
    def empty(cls, rows: int, like: Tensor) -> Softmax:
        """Uninitialised statistics of `rows` rows, with the dtype and device of `like`; the chunk of logits that
        begins at column 0 overwrites them (see `rows.lse_update`).
        """
        return cls(*like.new_empty((3, rows)).unbind())

    @property
    def sum_N(self) -> Tensor:
        """Σ exp(logit − max) over all columns (N,)."""
        return self.rest_N + (self.label_N - self.max_N).exp()

    def logp(self) -> Tensor:
        """Log-probability of each row's label (N,): log σ(log-odds), which is exact at both ends."""
        return F.logsigmoid(self.label_N - self.max_N - self.rest_N.log())
