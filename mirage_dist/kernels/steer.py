"""Squared error of layer activations to one vector or to reference rows, with its gradient computed in forward.

RMU (Li et al., 2024, arXiv:2403.03218) pulls the activations of forget positions to a control vector and
keeps those of retain positions at the reference model's. In plain PyTorch the difference, its square, its mean and
their gradients are five tensors of the size of the activations. Here each row is read once, and only its gradient is
written.

Shapes: B sequences, S positions, P = B·S, D hidden size, R rows that the sum runs over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirage_dist.kernels.backend import uses_triton
from mirage_dist.kernels.rows import scale_

_BLOCK = 1 << 21  # elements that the eager version processes at a time: 8 MiB in float32


def steer_mse(
    act_BSD: Tensor, target: Tensor, index_R: Tensor | None, weight_R: Tensor, coef: float | Tensor = 1.0
) -> Tensor:
    """coef · Σ_r weight_r · mean over D of (act[index_r] − target_r)²: a scalar, in float32 or float64.

    target: one vector (D,), or a row for each r (R, D). index_R: flat positions b·S + t, int64, each at most once; None
    means every position in order, R = B·S. weight_R: float; a row of weight 0 is not read and may hold any values. Only
    the activations get a gradient. Raises ValueError when the shapes do not fit.
    """
    positions, width = act_BSD.shape[:-1].numel(), act_BSD.shape[-1]
    rows = positions if index_R is None else len(index_R)
    if weight_R.shape != (rows,) or target.shape not in ((width,), (rows, width)):
        raise ValueError(
            f"steer_mse: {rows} rows of {width} hidden units, weights of shape {tuple(weight_R.shape)} and a target of "
            f"shape {tuple(target.shape)}; must be ({rows},) and ({width},) or ({rows}, {width})"
        )
    return _SteerMSE.apply(act_BSD, target.detach(), index_R, weight_R.detach(), coef)


class _SteerMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act, target, index, weight, coef):  # type: ignore[override]
        ctx.save_for_backward(act, target, index, weight)
        ctx.coef = coef
        total, ctx.grad = _errors(act, target, index, weight, coef, ctx.needs_input_grad[0])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        # The first backward returns the gradient's own buffer; a further one of the same graph computes it again.
        grad_act, ctx.grad = ctx.grad, None
        if grad_act is None:
            act, target, index, weight = ctx.saved_tensors
            _, grad_act = _errors(act, target, index, weight, ctx.coef, True)
        return None if grad_act is None else scale_(grad_act, grad), None, None, None, None


def _errors(
    act_BSD: Tensor, target: Tensor, index_R: Tensor | None, weight_R: Tensor, coef: float | Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The error and, with `gradient`, its gradient (B, S, D)."""
    act_PD = act_BSD.detach().reshape(-1, act_BSD.shape[-1])
    act_PD = act_PD if act_PD.stride(1) == 1 else act_PD.contiguous()
    all_rows = index_R is None or len(index_R) == len(act_PD)  # then every row of the gradient is written
    grad_BSD = None
    if gradient:
        grad_BSD = torch.empty_like(act_BSD, memory_format=torch.contiguous_format)
        grad_BSD = grad_BSD if all_rows else grad_BSD.zero_()
    grad_PD = None if grad_BSD is None else grad_BSD.view_as(act_PD)
    weight_R = weight_R.to(torch.promote_types(act_PD.dtype, torch.float32)) * coef
    if uses_triton(act_PD) and len(weight_R):
        from mirage_dist.kernels import triton_steer

        error_R = triton_steer.errors(act_PD, target, index_R, weight_R, grad_PD)
    else:
        error_R = _eager_errors(act_PD, target, index_R, weight_R, grad_PD)
    return error_R.sum(), grad_BSD


def _eager_errors(
    act_PD: Tensor, target: Tensor, index_R: Tensor | None, weight_R: Tensor, grad_PD: Tensor | None
) -> Tensor:
    """Weighted errors (R,); gradients are written to the same rows of `grad_PD`. The eager version."""
    rows, width = len(weight_R), act_PD.shape[1]
    error_R = torch.empty_like(weight_R)
    # The gradient's own rows can hold the differences; otherwise a block of rows at a time bounds the temporaries.
    in_place = grad_PD is not None and index_R is None and grad_PD.dtype == weight_R.dtype
    size = max(rows, 1) if in_place else max(1, _BLOCK // width)
    for first in range(0, rows, size):
        part = slice(first, min(first + size, rows))
        positions = part if index_R is None else index_R[part]
        goal = (target if target.dim() == 1 else target[part]).to(weight_R.dtype)
        act = act_PD[positions].to(weight_R.dtype)
        difference = torch.sub(act, goal, out=grad_PD[part]) if in_place and grad_PD is not None else act - goal
        # Rows of weight 0 may hold infinity, and infinity times 0 is not 0.
        difference.index_fill_(0, (weight_R[part] == 0).nonzero().squeeze(1), 0.0)
        error_R[part] = weight_R[part] * torch.linalg.vector_norm(difference, dim=1).square() / width
        if grad_PD is not None:
            difference.mul_((2 / width * weight_R[part])[:, None])
            if not in_place:
                grad_PD[positions] = difference.to(grad_PD.dtype)
    return error_R
