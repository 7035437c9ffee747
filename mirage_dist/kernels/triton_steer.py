"""Triton version of the steering error; steer.py defines what it computes and has the eager version."""

# Triton comes with CUDA builds of torch and with the `dev` extra; this file is imported only where `uses_triton` holds.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # hidden units of a row that a program processes at a time
_WARPS = 8


def errors(act_PD: Tensor, target: Tensor, weight_P: Tensor, grad_PD: Tensor | None) -> Tensor:
    """Weighted errors (P,) in float32 of the rows of act (P, D); their gradients are written to `grad_PD`."""
    rows, width = act_PD.shape
    error_P = torch.empty_like(weight_P)
    target = target if target.stride(-1) == 1 else target.contiguous()
    errors_kernel[(rows,)](
        act_PD,
        act_PD.stride(0),
        target,
        target.stride(0) if target.dim() == 2 else 0,
        weight_P,
        act_PD if grad_PD is None else grad_PD,
        act_PD.stride(0) if grad_PD is None else grad_PD.stride(0),
        error_P,
        width,
        HAS_GRAD=grad_PD is not None,
        BLOCK=min(TILE, triton.next_power_of_2(width)),
        num_warps=_WARPS,
    )
    return error_P


@triton.jit
def errors_kernel(
    act_ptr,
    act_stride,
    target_ptr,
    target_stride,
    weight_ptr,
    grad_ptr,
    grad_stride,
    error_ptr,
    width,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row)
    read = tl.where(weight == 0.0, 0, width)  # a row of weight 0 is not read
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        act = tl.load(act_ptr + row * act_stride + column, mask=column < read, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + row * target_stride + column, mask=column < read, other=0.0).to(tl.float32)
        difference = act - target
        total += difference * difference
        if HAS_GRAD:
            grad = difference * (2.0 * weight / width)
            tl.store(grad_ptr + row * grad_stride + column, grad.to(grad_ptr.dtype.element_ty), mask=column < width)
    tl.store(error_ptr + row, weight * tl.sum(total, 0) / width)
