"""Squared error of layer activations to one vector or to reference rows, with its gradient computed in forward.

RMU (Li et al., 2024, arXiv:2403.03218) pulls the activations of forget positions to a control vector and keeps those of
retain positions at the reference model's. In plain PyTorch the difference, its square, its mean and their gradients are
five tensors of the size of the activations. Here each row is read once, and only its gradient is written.

Shapes: B sequences, S positions, P = B·S rows, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirage_dist.kernels.backend import uses_triton
from mirage_dist.kernels.rows import scale_

_BLOCK = 1 << 21  # elements that the eager version processes at a time: 8 MiB in float32


def steer_mse(act_BSD: Tensor, target: Tensor, weight_P: Tensor) -> Tensor:
    """Σ_p weight_p · mean over D of (act_p − target_p)², over all rows p: a scalar in float32, float64 for float64.

    target: one vector (D,), or a row for each position (P, D). weight_P: one weight for each position b·S + t; a row of
    weight 0 is not read and may hold any values. Only the activations get a gradient. Raises ValueError when the shapes
    do not fit.
    """
    rows, width = act_BSD.shape[:-1].numel(), act_BSD.shape[-1]
    if weight_P.shape != (rows,) or target.shape not in ((width,), (rows, width)):
        raise ValueError(
            f"steer_mse: {rows} rows of {width} hidden units, weights of shape {tuple(weight_P.shape)} and a target of "
            f"shape {tuple(target.shape)}; must be ({rows},) and ({width},) or ({rows}, {width})"
        )
    return _SteerMSE.apply(act_BSD, target.detach(), weight_P.detach())


class _SteerMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act, target, weight):  # type: ignore[override]
        ctx.save_for_backward(act, target, weight)
        total, ctx.grad = _error(act, target, weight, ctx.needs_input_grad[0])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        # The first backward returns the gradient's own buffer; a further one of the same graph computes it again.
        grad_act, ctx.grad = ctx.grad, None
        if grad_act is None:
            _, grad_act = _error(*ctx.saved_tensors, gradient=True)
        return None if grad_act is None else scale_(grad_act, grad), None, None


def _error(act_BSD: Tensor, target: Tensor, weight_P: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The error and, with `gradient`, its gradient (B, S, D)."""
    act_PD = act_BSD.detach().reshape(-1, act_BSD.shape[-1])
    act_PD = act_PD if act_PD.stride(1) == 1 else act_PD.contiguous()
    grad_BSD = torch.empty_like(act_BSD, memory_format=torch.contiguous_format) if gradient else None
    grad_PD = None if grad_BSD is None else grad_BSD.view_as(act_PD)
    weight_P = weight_P.to(torch.promote_types(act_PD.dtype, torch.float32))
    if uses_triton(act_PD) and len(weight_P):
        from mirage_dist.kernels import triton_steer

        error_P = triton_steer.errors(act_PD, target, weight_P, grad_PD)
    else:
        error_P = _eager_errors(act_PD, target, weight_P, grad_PD)
    return error_P.sum(), grad_BSD


def _eager_errors(act_PD: Tensor, target: Tensor, weight_P: Tensor, grad_PD: Tensor | None) -> Tensor:
    """Weighted errors (P,); their gradients are written to `grad_PD`. The eager version."""
    rows, width = act_PD.shape
    error_P = torch.empty_like(weight_P)
    # A gradient in the wide dtype can hold the differences; otherwise a block of rows at a time bounds the temporaries.
    in_place = grad_PD is not None and grad_PD.dtype == weight_P.dtype
    size = max(rows, 1) if in_place else max(1, _BLOCK // width)
    for first in range(0, rows, size):
        part = slice(first, min(first + size, rows))
        goal = (target if target.dim() == 1 else target[part]).to(weight_P.dtype)
        act = act_PD[part].to(weight_P.dtype)
        difference = torch.sub(act, goal, out=grad_PD[part]) if in_place and grad_PD is not None else act - goal
        # Rows of weight 0 may hold infinity, and infinity times 0 is not 0.
        difference.index_fill_(0, (weight_P[part] == 0).nonzero().squeeze(1), 0.0)
        error_P[part] = weight_P[part] * torch.linalg.vector_norm(difference, dim=1).square() / width
        if grad_PD is not None:
            difference.mul_((2 / width * weight_P[part])[:, None])
            if not in_place:
                grad_PD[part] = difference.to(grad_PD.dtype)
    return error_P
