"""Triton versions of the row kernels; rows.py defines what each computes and has the eager versions.

One program processes one row of logits, so each row's sums have a fixed order and two equal calls give equal bits. All
arithmetic is float32. tanh is written out because Triton's interpreter has no libdevice.
"""

# Triton comes with CUDA builds of torch and with the `dev` extra; this file is imported only where `uses_triton` holds.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mirage_dist.kernels.softmax import Softmax

# Constants instead of triton.autotune, which needs a driver that the interpreter does not have.
TILE = 4096  # columns of a row that a program processes at a time: 16 KiB
_SCALE_TILE = 8192  # elements that a program of `scale_` multiplies
_WARPS = 8


def lse_update(
    z_NC: Tensor, softmax: Softmax, labels_N: Tensor, start: int, bias_C: Tensor | None, softcap: float | None
) -> None:
    """`rows.lse_update` for float32 logits."""
    columns = z_NC.shape[1]
    lse_update_kernel[(len(z_NC),)](
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
        FIRST=start == 0,
        HAS_BIAS=bias_C is not None,
        HAS_CAP=softcap is not None,
        BLOCK=_block(columns),
        num_warps=_WARPS,
    )


def dlogits(
    z_NC: Tensor,
    dz_NC: Tensor,
    softmax: Softmax,
    labels_N: Tensor,
    start: int,
    bias_C: Tensor | None,
    softcap: float | None,
    grad_logp_N: Tensor,
) -> None:
    """Write `rows.dlogits` to `dz_NC`. It may share memory with `z_NC`: the same elements in the same dtype, or the
    first bytes of each row in a narrower one.
    """
    columns = z_NC.shape[1]
    dlogits_kernel[(len(z_NC),)](
        z_NC,
        z_NC.stride(0),
        dz_NC,
        dz_NC.stride(0),
        labels_N,
        z_NC if bias_C is None else bias_C,
        softmax.max_N,
        softmax.rest_N,
        softmax.label_N,
        grad_logp_N.contiguous(),
        start,
        columns,
        softcap or 1.0,
        HAS_BIAS=bias_C is not None,
        HAS_CAP=softcap is not None,
        BLOCK=_block(columns),
        num_warps=_WARPS,
        num_stages=1,  # no pipelining: a later tile is read only after its predecessor is written
    )


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """`rows.scale_` for a dense tensor and a factor of one element."""
    size = tensor.numel()
    scale_kernel[(triton.cdiv(size, _SCALE_TILE),)](tensor, factor, size, BLOCK=_SCALE_TILE, num_warps=_WARPS)


def _block(columns: int) -> int:
    """Width of a tile: a power of two, at most TILE."""
    return min(TILE, triton.next_power_of_2(columns))


@triton.jit
def _capped(z, softcap):
    """softcap · tanh(z / softcap), through exp(−2 |z / softcap|), which cannot overflow."""
    decay = tl.exp(-2.0 * tl.abs(z / softcap))
    magnitude = softcap * (1.0 - decay) / (1.0 + decay)
    return tl.where(z < 0, -magnitude, magnitude)


@triton.jit
def lse_update_kernel(
    z_ptr,
    z_stride,
    label_ptr,
    bias_ptr,
    max_ptr,
    rest_ptr,
    label_logit_ptr,
    start,
    columns,
    softcap,
    FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    if FIRST:
        row_max, rest = -float("inf"), 0.0
    else:
        row_max, rest = tl.load(max_ptr + row), tl.load(rest_ptr + row)
    label = tl.load(label_ptr + row) - start
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        valid = column < columns
        z = tl.load(z_row + column, mask=valid, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + column, mask=valid, other=0.0)
        if HAS_CAP:
            z = _capped(z, softcap)
        z = tl.where(valid, z, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(z, 0))
        exponential = tl.where(column == label, 0.0, tl.exp(z - new_max))
        rest = rest * tl.exp(row_max - new_max) + tl.sum(exponential, 0)
        row_max = new_max
    tl.store(max_ptr + row, row_max)
    tl.store(rest_ptr + row, rest)
    inside = (label >= 0) & (label < columns)
    z = tl.load(z_row + label, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + label, mask=inside, other=0.0)
    if HAS_CAP:
        z = _capped(z, softcap)
    if FIRST:
        tl.store(label_logit_ptr + row, tl.where(inside, z, -float("inf")))
    else:
        tl.store(label_logit_ptr + row, z, mask=inside)


@triton.jit
def dlogits_kernel(
    z_ptr,
    z_stride,
    dz_ptr,
    dz_stride,
    label_ptr,
    bias_ptr,
    max_ptr,
    rest_ptr,
    label_logit_ptr,
    grad_ptr,
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
    row_max = tl.load(max_ptr + row)
    rest = tl.load(rest_ptr + row)
    scale = tl.load(grad_ptr + row) / (rest + tl.exp(tl.load(label_logit_ptr + row) - row_max))
    label = tl.load(label_ptr + row) - start
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        valid = column < columns
        z = tl.load(z_row + column, mask=valid, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + column, mask=valid, other=0.0)
        if HAS_CAP:
            z = _capped(z, softcap)
        dz = tl.where(column == label, rest, -tl.exp(z - row_max)) * scale
        if HAS_CAP:
            dz *= 1.0 - (z / softcap) * (z / softcap)
        # dz may share memory with z in a narrower dtype. The bytes that this tile writes end before those that later
        # tiles read, but other threads may still be reading them for this tile.
        tl.debug_barrier()
        tl.store(dz_row + column, dz.to(dz_ptr.dtype.element_ty), mask=valid)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size).to(tl.float32)
        tl.store(x_ptr + index, (x * factor).to(x_ptr.dtype.element_ty), mask=index < size)
