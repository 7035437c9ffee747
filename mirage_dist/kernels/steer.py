"""K3: squared error of layer activations to a vector or to reference rows, its gradient made on the way.

RMU (Li et al., 2024) pulls the activations of some positions to a control vector and keeps those of others at the
reference model's. Written in plain torch that is a difference, its square, its mean and each one's gradient: five
tensors of the size of the activations. Here each row is read once, and only its gradient is written.

Shapes: B sequences, S positions, D hidden size, R rows that count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirage_dist.kernels.backend import uses_triton
from mirage_dist.kernels.rows import scale_

_BLOCK = 1 << 21  # elements the eager twin handles at a time: 8 MiB in float32


def steer_mse(
    act_BSD: Tensor, target: Tensor, index_R: Tensor | None, weight_R: Tensor, coef: float | Tensor = 1.0
) -> Tensor:
    """coef · Σ_r weight_r · mean over D of (act[index_r] − target_r)²: a sum over rows, scalar, at least float32.

    `target` is one vector (D,) or a row for each r, (R, D). `index_R` holds flat positions b·S + t, each at most once;
    None is all of them in order, R = B·S. A row of weight 0 is not looked at, whatever it holds. Only the activations
    get a gradient. Raises ValueError where the shapes do not fit.
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
        # The first backward hands the gradient over; a further one of the same graph makes it again.
        found, ctx.grad = ctx.grad, None
        if found is None:
            act, target, index, weight = ctx.saved_tensors
            _, found = _errors(act, target, index, weight, ctx.coef, True)
        return None if found is None else scale_(found, grad), None, None, None, None


def _errors(
    act_BSD: Tensor, target: Tensor, index_R: Tensor | None, weight_R: Tensor, coef: float | Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    act_PD = act_BSD.detach().reshape(-1, act_BSD.shape[-1])
    act_PD = act_PD if act_PD.stride(1) == 1 else act_PD.contiguous()
    whole = index_R is None or len(index_R) == len(act_PD)  # then every row of the gradient gets written
    grad_BSD = None
    if gradient:
        grad_BSD = torch.empty_like(act_BSD, memory_format=torch.contiguous_format)
        grad_BSD = grad_BSD if whole else grad_BSD.zero_()
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
    """The twin: weighted errors (R,), gradients written to their rows of `grad_PD`."""
    rows, width = len(weight_R), act_PD.shape[1]
    error_R = torch.empty_like(weight_R)
    # Where the gradient's own rows can hold the differences, nothing needs to be cut.
    in_place = grad_PD is not None and index_R is None and grad_PD.dtype == weight_R.dtype
    size = max(rows, 1) if in_place else max(1, _BLOCK // width)
    for first in range(0, rows, size):
        part = slice(first, min(first + size, rows))
        place = part if index_R is None else index_R[part]
        wanted = (target if target.dim() == 1 else target[part]).to(weight_R.dtype)
        act = act_PD[place].to(weight_R.dtype)
        off = torch.sub(act, wanted, out=grad_PD[part]) if in_place and grad_PD is not None else act - wanted
        # Masked rows may hold anything: infinity times 0 is no 0.
        off.index_fill_(0, (weight_R[part] == 0).nonzero().squeeze(1), 0.0)
        error_R[part] = weight_R[part] * torch.linalg.vector_norm(off, dim=1).square() / width
        if grad_PD is not None:
            off.mul_((2 / width * weight_R[part])[:, None])
            if not in_place:
                grad_PD[place] = off.to(grad_PD.dtype)
    return error_R
