"""K1, K2 and the scalar product as Triton kernels; their eager twins and their meaning are in rows.py.

One program goes over one row of logits, so each row's sums have a fixed order and the same call twice is bitwise the
same. Everything is float32 inside. tanh is written out: the interpreter has no libdevice.
"""

# Triton comes with CUDA builds of torch and with the `dev` extra; this file is imported only where it is used.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mirage_dist.kernels.rows import Softmax

# A Python table, not triton.autotune: that finds no driver in the interpreter. 16 KiB of a row at a time.
_BLOCK, _WARPS = 4096, 8


def lse_update(
    z_NC: Tensor, softmax: Softmax, labels_N: Tensor, start: int, bias_C: Tensor | None, softcap: float | None
) -> None:
    columns = z_NC.shape[1]
    _lse_update[(len(z_NC),)](
        z_NC,
        z_NC.stride(0),
        labels_N,
        z_NC if bias_C is None else bias_C,
        softmax.max_N,
        softmax.rest_N,
        softmax.label_N,
        start,
        columns,
        softcap or 1.0,
        HAS_BIAS=bias_C is not None,
        HAS_CAP=softcap is not None,
        BLOCK=_block(columns),
        num_warps=_WARPS,
    )


def dlogits(
    z_NC: Tensor,
    dz_NC: Tensor,
    labels_N: Tensor,
    start: int,
    bias_C: Tensor | None,
    softcap: float | None,
    max_N: Tensor,
    log_sum_N: Tensor,
    label_grad_N: Tensor,
    grad_p_N: Tensor,
) -> None:
    """`dz_NC` may lie over `z_NC`: in its dtype exactly, in a narrower one from each row's first byte on."""
    columns = z_NC.shape[1]
    _dlogits[(len(z_NC),)](
        z_NC,
        z_NC.stride(0),
        dz_NC,
        dz_NC.stride(0),
        labels_N,
        z_NC if bias_C is None else bias_C,
        max_N,
        log_sum_N,
        label_grad_N,
        grad_p_N,
        start,
        columns,
        softcap or 1.0,
        HAS_BIAS=bias_C is not None,
        HAS_CAP=softcap is not None,
        BLOCK=_block(columns),
        num_warps=_WARPS,
        num_stages=1,  # a later tile must not be read before its predecessor is written
    )


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """`tensor` is dense; `factor` holds one element."""
    size, block = tensor.numel(), 8192
    _scale[(triton.cdiv(size, block),)](tensor, factor, size, BLOCK=block, num_warps=_WARPS)


def _block(columns: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(columns))


@triton.jit
def _capped(z, softcap):
    """softcap · tanh(z / softcap), by the exponential that cannot overflow."""
    shrunk = tl.exp(-2.0 * tl.abs(z / softcap))
    size = softcap * (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(z < 0, -size, size)


@triton.jit
def _lse_update(
    z_ptr,
    z_stride,
    label_ptr,
    bias_ptr,
    max_ptr,
    rest_ptr,
    found_ptr,
    start,
    columns,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    top = tl.load(max_ptr + row)
    rest = tl.load(rest_ptr + row)
    label = tl.load(label_ptr + row) - start
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        here = column < columns
        z = tl.load(z_row + column, mask=here, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + column, mask=here, other=0.0)
        if HAS_CAP:
            z = _capped(z, softcap)
        z = tl.where(here, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        share = tl.where(column == label, 0.0, tl.exp(z - higher))
        rest = rest * tl.exp(top - higher) + tl.sum(share, 0)
        top = higher
    tl.store(max_ptr + row, top)
    tl.store(rest_ptr + row, rest)
    inside = (label >= 0) & (label < columns)
    z = tl.load(z_row + label, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + label, mask=inside, other=0.0)
    if HAS_CAP:
        z = _capped(z, softcap)
    tl.store(found_ptr + row, z, mask=inside)


@triton.jit
def _dlogits(
    z_ptr,
    z_stride,
    dz_ptr,
    dz_stride,
    label_ptr,
    bias_ptr,
    max_ptr,
    log_sum_ptr,
    label_grad_ptr,
    grad_p_ptr,
    start,
    columns,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    dz_row = dz_ptr + row * dz_stride
    top = tl.load(max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    label_grad = tl.load(label_grad_ptr + row)
    grad_p = tl.load(grad_p_ptr + row)
    label = tl.load(label_ptr + row) - start
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        here = column < columns
        z = tl.load(z_row + column, mask=here, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + column, mask=here, other=0.0)
        if HAS_CAP:
            z = _capped(z, softcap)
        dz = tl.where(column == label, label_grad, grad_p * tl.exp((z - top) - log_sum))
        if HAS_CAP:
            dz *= 1.0 - (z / softcap) * (z / softcap)
        # dz may lie over z in a narrower dtype: the bytes this tile writes end before those that a later tile reads,
        # but other threads may still be reading them for this tile.
        tl.debug_barrier()
        tl.store(dz_row + column, dz.to(dz_ptr.dtype.element_ty), mask=here)


@triton.jit
def _scale(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + place, mask=place < size).to(tl.float32)
        tl.store(x_ptr + place, (x * factor).to(x_ptr.dtype.element_ty), mask=place < size)
