"""Row kernels over one chunk of logits: the eager twins, and the choice between them and Triton.

A chunk z (N, C) holds the columns `start` to `start + C` of the raw products W h. Bias and soft cap are applied where
z is read, logit = softcap · tanh((z + bias) / softcap), so that a GPU never writes the logits a second time. The twins
work in place, in as few operations as they can, because each is a meeting of all threads. Only a soft cap, whose slope
needs the logits again, makes them go over a few rows at a time, with temporaries that do not grow with N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_dist.kernels.backend import uses_triton

IGNORE = -100  # label of a position that carries no loss, as in Hugging Face models
_BLOCK = 1 << 19  # elements a twin with temporaries handles at a time: 2 MiB in float32


@dataclass(frozen=True)
class Softmax:
    """Running softmax statistics of N rows, in float32 (float64 for float64 logits).

    Of the columns seen so far: max_N; rest_N = Σ exp(logit − max) over all but the label's; label_N, the label's logit,
    −∞ until its column was seen, so that a label outside the vocabulary shows in the loss. The label stays out of the
    sum because 1 − p = rest / sum then keeps its digits where p is near 1: as a difference it loses two of the seven
    at p = 0.99.
    """

    max_N: Tensor
    rest_N: Tensor
    label_N: Tensor

    @classmethod
    def start(cls, rows: int, like: Tensor) -> Softmax:
        filled = (like.new_full((rows,), value) for value in (-torch.inf, 0.0, -torch.inf))
        return cls(*filled)

    @property
    def log_sum_N(self) -> Tensor:
        """log Σ exp(logit − max) over all columns."""
        return (self.rest_N + (self.label_N - self.max_N).exp()).log()

    @property
    def lse_N(self) -> Tensor:
        return self.max_N + self.log_sum_N

    def logp(self, labels_N: Tensor) -> Tensor:
        """Log-probability of the labels (N,); 0 where the label is −100."""
        below_N = self.label_N - self.max_N
        near_N = -torch.log1p(self.rest_N * (-below_N).exp())  # for a label near the top, where log_sum is near 0
        logp_N = torch.where(below_N > -1, near_N, below_N - self.log_sum_N)
        return torch.where(labels_N == IGNORE, 0.0, logp_N)

    def label_grad(self, grad_logp_N: Tensor, grad_lse_N: Tensor) -> Tensor:
        """g·(1 − p) + e·p of the label's own column (N,)."""
        label_N = (self.label_N - self.max_N).exp()
        return (grad_logp_N * self.rest_N + grad_lse_N * label_N) / (self.rest_N + label_N)


def lse_update(
    z_NC: Tensor, softmax: Softmax, labels_N: Tensor, start: int, bias_C: Tensor | None, softcap: float | None
) -> None:
    """K1: take one chunk of logits into the running statistics, in place. Where `leaves_shares`, z is used up."""
    if not len(z_NC):
        return
    if uses_triton(z_NC):
        from mirage_dist.kernels import triton_rows

        return triton_rows.lse_update(z_NC, softmax, labels_N, start, bias_C, softcap)
    for rows in _blocks(z_NC, softcap):
        logit = _logit_(z_NC[rows], bias_C, softcap)
        seen = softmax.max_N[rows]
        top = torch.maximum(seen, logit.amax(1))
        column, inside = _place(labels_N[rows], start, z_NC.shape[1])
        picked = logit.gather(1, column)
        softmax.label_N[rows] = torch.where(inside, picked.squeeze(1), softmax.label_N[rows])
        share = logit.sub_(top[:, None]).exp_()
        label_share = share.gather(1, column)
        share.scatter_(1, column, label_share.masked_fill(inside[:, None], 0.0))
        softmax.rest_N[rows] = softmax.rest_N[rows] * (seen - top).exp() + share.sum(1)
        softmax.max_N[rows] = top


def leaves_shares(z_NC: Tensor, softcap: float | None) -> bool:
    """Whether `lse_update` of the whole vocabulary leaves exp(logit − max) in z, which saves the gradient an exp. The
    label's own element does not matter to the gradient.
    """
    return softcap is None and not uses_triton(z_NC)


def dlogits(
    z_NC: Tensor,
    softmax: Softmax,
    labels_N: Tensor,
    start: int,
    bias_C: Tensor | None,
    softcap: float | None,
    grad_logp_N: Tensor,
    grad_lse_N: Tensor | None,
    dtype: torch.dtype,
    shares: bool = False,
) -> Tensor:
    """K2: dz = g·(onehot − p) + e·p of one chunk, (N, C) in `dtype`, written over z.

    g and e are the upstream gradients of the label's log-probability and of the log-sum-exp. `shares` says that z holds
    what `leaves_shares` describes. In a 16-bit dtype the result of the Triton kernel fills the first half of each row's
    bytes: a strided view, which the matrix products take as it is.
    """
    grad_lse_N = torch.zeros_like(grad_logp_N) if grad_lse_N is None else grad_lse_N
    if not len(z_NC):
        return z_NC.to(dtype)
    log_sum_N, label_grad_N = softmax.log_sum_N, softmax.label_grad(grad_logp_N, grad_lse_N)
    grad_p_N = grad_lse_N - grad_logp_N
    if uses_triton(z_NC):
        from mirage_dist.kernels import triton_rows

        dz_NC = z_NC if dtype == z_NC.dtype else z_NC.view(dtype)[:, : z_NC.shape[1]]
        about = (softmax.max_N, log_sum_N, label_grad_N, grad_p_N)
        triton_rows.dlogits(z_NC, dz_NC, labels_N, start, bias_C, softcap, *about)
        return dz_NC
    for rows in _blocks(z_NC, softcap):
        z, slope = z_NC[rows], None
        column, inside = _place(labels_N[rows], start, z_NC.shape[1])
        if shares:
            z.mul_((grad_p_N[rows] * (-log_sum_N[rows]).exp())[:, None])
        else:
            logit = _logit_(z, bias_C, softcap)
            if softcap is not None:
                slope = 1 - (logit / softcap).square_()
            torch.sub(logit, softmax.max_N[rows, None], out=z)
            z.sub_(log_sum_N[rows, None]).exp_().mul_(grad_p_N[rows, None])
        z.scatter_(1, column, torch.where(inside[:, None], label_grad_N[rows, None], z.gather(1, column)))
        if slope is not None:
            z.mul_(slope)
    return z_NC.to(dtype)


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a scalar on the tensor's device, in place. Nothing is read or written when it is 1, and the host
    never waits to know: a gradient formed in forward is often scaled by exactly 1.
    """
    if uses_triton(tensor) and tensor.numel():
        from mirage_dist.kernels import triton_rows

        triton_rows.scale_(tensor, factor)
    elif tensor.is_cuda or factor.item() != 1.0:
        tensor.mul_(factor)
    return tensor


def _logit_(z: Tensor, bias_C: Tensor | None, softcap: float | None) -> Tensor:
    """The logits of raw products: in place, but with a soft cap a new tensor."""
    if softcap is None:
        return z if bias_C is None else z.add_(bias_C)
    z = z / softcap if bias_C is None else (z + bias_C).div_(softcap)
    return z.tanh_().mul_(softcap)


def _place(labels_N: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column (N, 1) of each label in a chunk, and whether it is there (N,); a column inside the chunk in any case."""
    column_N = labels_N - start
    inside_N = (column_N >= 0) & (column_N < columns)
    return column_N.clamp(0, columns - 1)[:, None], inside_N


def _blocks(z_NC: Tensor, softcap: float | None) -> Iterator[slice]:
    rows = len(z_NC) if softcap is None else max(1, _BLOCK // z_NC.shape[1])
    return (slice(first, first + rows) for first in range(0, len(z_NC), rows))
