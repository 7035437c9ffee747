"""Token log-probabilities, KL divergences and logits of an output projection, computed from hidden states.

Every likelihood objective is a function of the response tokens' log-probabilities, so the head computes only those. The
caller selects rows before the matrix product (a LLaVA sample has some 676 positions and 60 response tokens); logits of
prompt or image positions never exist. With z = W h and an upstream gradient g of a row's log-probability,
dz = g · (onehot − p), dH = dz W and dW = dzᵀ H, whatever the objective.

Precision: logits, softmax and log-probabilities are float32 whatever the input dtype (float64 stays float64), with the
same values in forward and backward. A bfloat16 logit would have a relative error of up to 2⁻⁹, which is 0.002 to 0.1 in
a sequence's log-probability. On CUDA the gradient of the logits of bfloat16 inputs is rounded to bfloat16 for its
products (see projection.py), elsewhere it is not. No sum depends on the order of threads: two equal calls give equal
bits.

Shapes: N rows (response tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirage_dist.kernels import passes
from mirage_dist.kernels.projection import Projection, without_autocast
from mirage_dist.kernels.softmax import Softmax

# MiB of logits that exist at a time unless the caller says otherwise, by kind of device. A GPU keeps those of 16 384
# rows at a vocabulary of 32 000, which is a quarter faster than to compute them again.
WORKSPACE_MB = {"cpu": 512, "cuda": 2048}


def linear_logits(
    hidden_ND: Tensor, weight_VD: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Logits (N, V) in float32, in float64 for float64 input; `softcap` is Gemma 2's softcap · tanh(z / softcap).

    A 16-bit weight is converted a block at a time, forward and backward: no float32 matrix of V × D exists.
    """
    logits_NV = _LinearLogits.apply(hidden_ND, weight_VD, bias)
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def linear_token_kl(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ref_logits_NV: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """KL(reference ‖ policy) over the vocabulary for each row: (N,), in the precision of `linear_logits`.

    `ref_logits_NV` is the result of `linear_logits` under the reference; it gets no gradient. Keeps matrices of N × V
    for backward.
    """
    logits_NV = linear_logits(hidden_ND, weight_VD, bias=bias, softcap=softcap)
    logp_NV = logits_NV.log_softmax(-1)
    ref_logp_NV = ref_logits_NV.detach().to(logp_NV.dtype).log_softmax(-1)
    return F.kl_div(logp_NV, ref_logp_NV, reduction="none", log_target=True).sum(-1)


def linear_token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    workspace_mb: int | None = None,
) -> Tensor:
    """log softmax(W h)[label] of each row: (N,) in float32, in float64 for float64 input.

    labels_N: int64, in 0 … V − 1; rows without a label are not passed. Any upstream gradient is allowed. For N = 0 the
    empty result still depends on hidden and weight, so that a rank without response tokens makes the same backward
    calls as the others.

    Logits that fit `workspace_mb` MiB (WORKSPACE_MB by default) are kept until backward, which overwrites them with
    their gradient: 6NVD floating-point operations. Larger ones are computed again, in chunks of the vocabulary that
    fit: 8NVD. Where weight and bias are frozen, forward computes each row's gradient for backward to scale, and no
    logits are kept: 4NVD.

    Raises ValueError for a label outside the vocabulary (its log-probability is −∞ on a GPU, see
    `passes.check_labels`).
    """
    passes.check_labels(labels_N, len(weight_VD))
    if workspace_mb is None:
        workspace_mb = WORKSPACE_MB["cuda" if hidden_ND.is_cuda else "cpu"]
    needs_grad = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias)]
    if needs_grad == [True, False, False]:
        return _FrozenTokenLogProbs.apply(hidden_ND, weight_VD, bias, labels_N, softcap, workspace_mb)
    return _TokenLogProbs.apply(hidden_ND, weight_VD, bias, labels_N, softcap, workspace_mb, any(needs_grad))


class _LinearLogits(torch.autograd.Function):
    """H Wᵀ + b with gradients, through `Projection`'s products."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias):  # type: ignore[override]
        ctx.save_for_backward(hidden, weight, bias)
        with without_autocast(hidden):
            projection = Projection(hidden, weight, bias, None)
            logits_NV = weight.new_empty((len(hidden), len(weight)), dtype=projection.logit_dtype)
            projection.logits_(logits_NV, hidden.to(projection.row_dtype), 0)
        return logits_NV if projection.bias_V is None else logits_NV.add_(projection.bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor):  # type: ignore[override]
        hidden, weight, bias = ctx.saved_tensors
        dhidden = dweight = dbias = None
        with without_autocast(hidden):
            projection = Projection(hidden, weight, bias, None)
            dz_NV = grad_NV.to(projection.row_dtype)
            if ctx.needs_input_grad[0]:
                dhidden = hidden.new_empty(hidden.shape, dtype=projection.logit_dtype)
                projection.add_hidden_grad_(dhidden, dz_NV, 0, first=True)
            if ctx.needs_input_grad[1]:
                dweight = torch.zeros_like(weight) if not len(hidden) else torch.empty_like(weight)
                projection.weight_grad_(dweight, dz_NV, hidden.to(projection.row_dtype))
            if ctx.needs_input_grad[2]:
                dbias = grad_NV.sum(0)
        return _in_dtypes_of((hidden, weight, bias), (dhidden, dweight, dbias))


class _TokenLogProbs(torch.autograd.Function):
    """The general case: logits are kept for backward where `needs_grad` and they fit the workspace."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, softcap, workspace_mb: int, needs_grad: bool):  # type: ignore[override]
        with without_autocast(hidden):
            projection = Projection(hidden, weight, bias, softcap)
            columns = passes.columns_that_fit(projection, len(hidden), workspace_mb)
            workspace_NC = projection.workspace(len(hidden), columns)
            softmax = passes.statistics(projection, hidden.to(projection.row_dtype), labels, workspace_NC)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.softmax, ctx.softcap, ctx.columns = softmax, softcap, columns
        ctx.kept = needs_grad and columns == len(weight)
        ctx.logits = workspace_NC if ctx.kept else None
        return softmax.logp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor):  # type: ignore[override]
        hidden, weight, bias, labels = ctx.saved_tensors
        softmax: Softmax = ctx.softmax
        with without_autocast(hidden):
            projection = Projection(hidden, weight, bias, ctx.softcap)
            rows = hidden.to(projection.row_dtype)
            workspace_NC, ctx.logits = ctx.logits, None
            if workspace_NC is None:
                workspace_NC = projection.workspace(len(hidden), ctx.columns)
                if ctx.kept:
                    # The first backward overwrote the kept logits. A further one of the same graph computes them again
                    # in the same way, so that its bits are equal.
                    passes.statistics(projection, rows, labels, workspace_NC)
            grads = passes.gradients(
                projection, rows, labels, softmax, grad_logp, workspace_NC, ctx.kept, ctx.needs_input_grad[:3]
            )
        return *_in_dtypes_of((hidden, weight, bias), grads), None, None, None, None


class _FrozenTokenLogProbs(passes.UnitRowGradients):
    """The case of a frozen weight and bias: forward computes each row's gradient for g = 1, backward scales it by g."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, softcap, workspace_mb: int):  # type: ignore[override]
        with without_autocast(hidden):
            projection = Projection(hidden, weight, bias, softcap)
            size = passes.rows_that_fit(projection, workspace_mb)
            logp, unit = passes.unit_hidden_gradient(projection, hidden.to(projection.row_dtype), labels, size)
        ctx.save_for_backward(unit)
        ctx.dtype = hidden.dtype
        return logp


def _in_dtypes_of(tensors: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Each gradient in the dtype of its tensor."""
    pairs = zip(tensors, grads, strict=True)
    return tuple(None if g is None or t is None else g.to(t.dtype) for t, g in pairs)
