"""Cross entropy of a head's distribution to a teacher's whose label is made less likely, in bounded memory.

UNDIAL (Dong et al., 2025, arXiv:2402.10052) trains a model towards its own earlier distribution with the logit of the
label lowered by a penalty: q = softmax(z_teacher − penalty · onehot(label)), loss = −Σ_v q_v log p_v. The gradient of
the logits is p − q, so the label is unlearnt and every other entry is drawn to what the teacher has.

The caller has the teacher's logits (N, V), since under ZeRO-3 a head's weight is whole only in its own forward. Beside
them no matrix of N × V exists: logits are computed in chunks of a workspace, of rows where weight and bias are frozen
(each row's gradient is then computed in forward, and the teacher's logits are not kept either), otherwise of the
vocabulary, and again in backward.

Shapes and precision are those of logprob.py: N rows, D hidden size, V vocabulary; float32, float64 for float64 input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirage_dist.kernels import passes
from mirage_dist.kernels.projection import Projection, slices, without_autocast

WORKSPACE_MB = 512  # of logits that exist at a time unless the caller says otherwise


def linear_distilled_ce(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    teacher_NV: Tensor,
    penalty: float,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    workspace_mb: int = WORKSPACE_MB,
) -> Tensor:
    """−Σ_v q_v log softmax(W h)_v of each row, q = softmax(teacher − penalty · onehot(label)): (N,).

    teacher_NV: logits as `linear_logits` gives them; it gets no gradient. labels_N: int64, in 0 … V − 1. For N = 0 the
    empty result still depends on hidden and weight (see `linear_token_logps`). Raises ValueError for a label outside
    the vocabulary, and for a teacher of another shape.
    """
    passes.check_labels(labels_N, len(weight_VD))
    if teacher_NV.shape != (len(hidden_ND), len(weight_VD)):
        raise ValueError(
            f"the teacher's logits have shape {tuple(teacher_NV.shape)}; must be {(len(hidden_ND), len(weight_VD))}, "
            "a row for each hidden row"
        )
    tensors = hidden_ND, weight_VD, bias, labels_N, teacher_NV.detach(), float(penalty), softcap, workspace_mb
    trains = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias)]
    return (_Frozen if trains == [True, False, False] else _General).apply(*tensors)


def _logits(projection: Projection, raw_NC: Tensor, columns: slice) -> Tensor:
    """Logits of raw products, in place: bias and soft cap applied."""
    if (bias_C := projection.bias(columns)) is not None:
        raw_NC.add_(bias_C)
    cap = projection.softcap
    return raw_NC if cap is None else raw_NC.div_(cap).tanh_().mul_(cap)


def _lowered(teacher_NC: Tensor, labels_N: Tensor, start: int, penalty: float, dtype: torch.dtype) -> Tensor:
    """A chunk of the teacher's logits, those of the labels lowered by `penalty`: a new tensor in `dtype`."""
    lowered_NC = teacher_NC.to(dtype, copy=True)
    column_N = labels_N - start
    inside_N = (column_N >= 0) & (column_N < lowered_NC.shape[1])
    place_N1 = column_N.clamp(0, lowered_NC.shape[1] - 1)[:, None]
    return lowered_NC.scatter_add_(1, place_N1, (-penalty * inside_N[:, None]).to(dtype))


def _slope_(dz_NC: Tensor, logit_NC: Tensor, softcap: float | None) -> Tensor:
    """From the gradient of logits to that of raw products, in place."""
    return dz_NC if softcap is None else dz_NC.mul_(1 - (logit_NC / softcap).square())


class _Frozen(torch.autograd.Function):
    """Only hidden rows get a gradient: forward computes that of each row, for backward to scale."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, teacher, penalty, softcap, workspace_mb):  # type: ignore[override]
        with without_autocast(hidden):
            projection = Projection(hidden, weight, bias, softcap)
            rows, wide, whole = hidden.to(projection.row_dtype), projection.logit_dtype, slice(0, len(weight))
            # Three chunks exist at a time: logits, log p, and q.
            size = min(passes.rows_that_fit(projection, max(workspace_mb // 3, 1)), max(len(hidden), 1))
            loss_N, unit_ND = rows.new_empty(len(hidden), dtype=wide), rows.new_empty(hidden.shape, dtype=wide)
            workspace_NV = projection.workspace(size, len(weight))
            for part in slices(len(hidden), size):
                raw_NV = projection.logits_(workspace_NV[: part.stop - part.start], rows[part], 0)
                logit_NV = _logits(projection, raw_NV, whole)
                q_NV = _lowered(teacher[part], labels[part], 0, penalty, wide).softmax(-1)
                logp_NV = logit_NV.log_softmax(-1)
                loss_N[part] = -torch.linalg.vecdot(q_NV, logp_NV)
                dz_NV = _slope_(logp_NV.exp_().sub_(q_NV), logit_NV, softcap).to(projection.row_dtype)
                projection.add_hidden_grad_(unit_ND[part], dz_NV, 0, first=True)
        ctx.save_for_backward(unit_ND)
        ctx.dtype = hidden.dtype
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor):  # type: ignore[override]
        (unit_ND,) = ctx.saved_tensors
        return (unit_ND * grad_N[:, None]).to(ctx.dtype), *[None] * 7


class _General(torch.autograd.Function):
    """Statistics in forward, over chunks of the vocabulary; backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, teacher, penalty, softcap, workspace_mb):  # type: ignore[override]
        with without_autocast(hidden):
            projection = Projection(hidden, weight, bias, softcap)
            rows, wide = hidden.to(projection.row_dtype), projection.logit_dtype
            # Two chunks exist at a time: the policy's logits and the teacher's.
            ctx.columns = passes.columns_that_fit(projection, len(hidden), max(workspace_mb // 2, 1))
            workspace_NC = projection.workspace(len(hidden), ctx.columns)
            # log Σ exp of the policy's and the teacher's logits, and the teacher's mean of the policy's logits, over
            # the columns so far; `mean_N` is relative to the teacher's sum so far.
            lse_N = rows.new_full((len(hidden),), -torch.inf, dtype=wide)
            teacher_lse_N, mean_N = lse_N.clone(), torch.zeros_like(lse_N)
            for columns in slices(len(weight), ctx.columns):
                raw_NC = projection.logits_(workspace_NC[:, : columns.stop - columns.start], rows, columns.start)
                logit_NC = _logits(projection, raw_NC, columns)
                target_NC = _lowered(teacher[:, columns], labels, columns.start, penalty, wide)
                lse_N = torch.logaddexp(lse_N, logit_NC.logsumexp(-1))
                before_N, teacher_lse_N = teacher_lse_N, torch.logaddexp(teacher_lse_N, target_NC.logsumexp(-1))
                target_NC.sub_(teacher_lse_N[:, None]).exp_()
                mean_N = mean_N * (before_N - teacher_lse_N).exp() + torch.linalg.vecdot(target_NC, logit_NC)
        ctx.save_for_backward(hidden, weight, bias, labels, teacher, lse_N, teacher_lse_N)
        ctx.penalty, ctx.softcap = penalty, softcap
        return lse_N - mean_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor):  # type: ignore[override]
        hidden, weight, bias, labels, teacher, lse_N, teacher_lse_N = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with without_autocast(hidden):
            projection = Projection(hidden, weight, bias, ctx.softcap)
            rows, wide = hidden.to(projection.row_dtype), projection.logit_dtype
            # Some product writes every element, unless there are no rows.
            new = weight.new_empty if len(hidden) else weight.new_zeros
            dhidden = new(hidden.shape, dtype=wide) if needs[0] else None
            dweight = new(weight.shape) if needs[1] else None
            dbias = new(len(weight), dtype=wide) if needs[2] else None
            workspace_NC = projection.workspace(len(hidden), ctx.columns)
            for columns in slices(len(weight), ctx.columns) if len(hidden) else ():
                raw_NC = projection.logits_(workspace_NC[:, : columns.stop - columns.start], rows, columns.start)
                logit_NC = _logits(projection, raw_NC, columns)
                q_NC = _lowered(teacher[:, columns], labels, columns.start, ctx.penalty, wide)
                dz_NC = torch.exp(logit_NC - lse_N[:, None]).sub_(q_NC.sub_(teacher_lse_N[:, None]).exp_())
                dz_NC = _slope_(dz_NC.mul_(grad_N[:, None]), logit_NC, ctx.softcap)
                if dbias is not None:
                    dbias[columns] = dz_NC.sum(0)
                dz_NC = dz_NC.to(projection.row_dtype)
                if dhidden is not None:
                    projection.add_hidden_grad_(dhidden, dz_NC, columns.start, first=columns.start == 0)
                if dweight is not None:
                    projection.weight_grad_(dweight[columns], dz_NC, rows)
        grads = zip((hidden, weight, bias), (dhidden, dweight, dbias), strict=True)
        return *(None if g is None or t is None else g.to(t.dtype) for t, g in grads), *[None] * 5
