"""Row kernels over one chunk of logits in eager PyTorch, and the dispatch between them and their Triton versions.

A chunk z (N, C) holds the columns `start` to `start + C` of the raw products W h. Bias and soft cap are applied where
z is read, logit = softcap · tanh((z + bias) / softcap), so that a GPU never writes the logits a second time. The eager
versions work in place and in as few operations as possible, because every operation synchronises all CPU threads. Only
a soft cap makes them process a few rows at a time, because its derivative needs the logits again: its temporaries are
then independent of N.

Shapes: N rows, C columns of the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mirage_dist.kernels.backend import uses_triton
from mirage_dist.kernels.softmax import Softmax

_BLOCK = 1 << 19  # elements of an eager temporary: 2 MiB in float32


def lse_update(
    z_NC: Tensor, softmax: Softmax, labels_N: Tensor, start: int, bias_C: Tensor | None, softcap: float | None
) -> None:
    """Add one chunk of logits to the running statistics, in place. May overwrite z (see `leaves_exponentials`).

    Chunks come in the order of their columns: the one with `start` 0 begins the statistics, whatever they held.
    """
    if not len(z_NC):
        return
    if uses_triton(z_NC):
        from mirage_dist.kernels import triton_rows

        return triton_rows.lse_update(z_NC, softmax, labels_N, start, bias_C, softcap)
    if start == 0:
        softmax.max_N.fill_(-torch.inf)
        softmax.rest_N.zero_()
        softmax.label_N.fill_(-torch.inf)
    for rows in _blocks(z_NC, softcap):
        logit = _logit_(z_NC[rows], bias_C, softcap)
        old_max = softmax.max_N[rows]
        new_max = torch.maximum(old_max, logit.amax(1))
        column, inside = _label_column(labels_N[rows], start, z_NC.shape[1])
        label_logit = logit.gather(1, column).squeeze(1)
        softmax.label_N[rows] = torch.where(inside, label_logit, softmax.label_N[rows])
        exponential = logit.sub_(new_max[:, None]).exp_()
        label_exponential = exponential.gather(1, column)
        exponential.scatter_(1, column, label_exponential.masked_fill(inside[:, None], 0.0))
        softmax.rest_N[rows] = softmax.rest_N[rows] * (old_max - new_max).exp() + exponential.sum(1)
        softmax.max_N[rows] = new_max


def leaves_exponentials(z_NC: Tensor, softcap: float | None) -> bool:
    """Whether `lse_update` over the whole vocabulary at once leaves exp(logit − max) in z, which saves `dlogits` an
    exponential. The label's own element is then 0, which `dlogits` overwrites.
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
    dtype: torch.dtype,
    exponentials: bool = False,
) -> Tensor:
    """Gradient of the raw products of one chunk, dz = g · (onehot − p): (N, C) in `dtype`, written over z.

    `grad_logp_N` is g, the upstream gradient of the label's log-probability. `exponentials`: z holds what
    `leaves_exponentials` describes instead of raw products. In a 16-bit dtype the result of the Triton kernel fills the
    first half of each row's bytes: a strided view, which matrix products accept as it is.
    """
    if not len(z_NC):
        return z_NC.to(dtype)
    if uses_triton(z_NC):
        from mirage_dist.kernels import triton_rows

        dz_NC = z_NC if dtype == z_NC.dtype else z_NC.view(dtype)[:, : z_NC.shape[1]]
        triton_rows.dlogits(z_NC, dz_NC, softmax, labels_N, start, bias_C, softcap, grad_logp_N)
        return dz_NC
    scale_N = grad_logp_N / softmax.sum_N
    label_grad_N = scale_N * softmax.rest_N  # g (1 − p)
    for rows in _blocks(z_NC, softcap):
        z, slope = z_NC[rows], None
        column, inside = _label_column(labels_N[rows], start, z_NC.shape[1])
        if exponentials:
            z.mul_(-scale_N[rows, None])
        else:
            logit = _logit_(z, bias_C, softcap)
            if softcap is not None:
                slope = 1 - (logit / softcap).square_()
            torch.sub(logit, softmax.max_N[rows, None], out=z)
            z.exp_().mul_(-scale_N[rows, None])
        z.scatter_(1, column, torch.where(inside[:, None], label_grad_N[rows, None], z.gather(1, column)))
        if slope is not None:
            z.mul_(slope)
    return z_NC.to(dtype)


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply `tensor` in place by a scalar tensor on the same device.

    A factor of 1 reads and writes nothing, which is the usual case for a gradient formed in the forward pass. On a GPU
    the host does not wait for the factor's value.
    """
    if uses_triton(tensor) and tensor.numel():
        from mirage_dist.kernels import triton_rows

        triton_rows.scale_(tensor, factor)
    elif tensor.is_cuda or factor.item() != 1.0:
        tensor.mul_(factor)
    return tensor


def _logit_(z: Tensor, bias_C: Tensor | None, softcap: float | None) -> Tensor:
    """Logits of raw products: computed in place without a soft cap, a new tensor with one."""
    if softcap is None:
        return z if bias_C is None else z.add_(bias_C)
    z = z / softcap if bias_C is None else (z + bias_C).div_(softcap)
    return z.tanh_().mul_(softcap)


def _label_column(labels_N: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column (N, 1) of each label in the chunk, clamped into it, and whether the label lies in the chunk (N,)."""
    column_N = labels_N - start
    inside_N = (column_N >= 0) & (column_N < columns)
    return column_N.clamp(0, columns - 1)[:, None], inside_N


def _blocks(z_NC: Tensor, softcap: float | None) -> Iterator[slice]:
    """Slices of rows to process at a time: all of them, or with a soft cap those of one block."""
    rows = len(z_NC) if softcap is None else max(1, _BLOCK // z_NC.shape[1])
    return (slice(first, first + rows) for first in range(0, len(z_NC), rows))
