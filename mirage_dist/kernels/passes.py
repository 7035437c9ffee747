"""Passes over logits in bounded memory: statistics, and gradients from kept, recomputed or single-use logits.

`gradients` cuts the vocabulary, because each slice of the weight's gradient is then written once, by one product over
all rows. `unit_hidden_gradient` cuts the rows, because a row's gradient needs the log-sum-exp over the whole vocabulary
first. `hidden_ND` is in the projection's `row_dtype` throughout.

Shapes: N rows, D hidden size, V vocabulary, C columns of a chunk of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirage_dist.kernels.projection import Projection, slices
from mirage_dist.kernels.rows import dlogits, leaves_exponentials, lse_update
from mirage_dist.kernels.softmax import Softmax


class UnitRowGradients(torch.autograd.Function):
    """An operation with one output a row, of whose inputs only the hidden rows, the first one, get a gradient.

    Its forward saves the gradient (N, D) of each row's output, and the rows' dtype as `ctx.dtype`; backward scales it.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor):  # type: ignore[override]
        (unit_ND,) = ctx.saved_tensors
        return (unit_ND * grad_N[:, None]).to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 1)


def columns_that_fit(projection: Projection, rows: int, workspace_mb: int) -> int:
    """Columns of logits of `rows` rows that fit `workspace_mb` MiB: V, or a multiple of 64 and at least 64."""
    columns = (workspace_mb << 20) // (max(rows, 1) * projection.logit_dtype.itemsize)
    return min(len(projection.weight_VD), max(64, columns // 64 * 64))


def rows_that_fit(projection: Projection, workspace_mb: int) -> int:
    """Rows whose logits over the whole vocabulary fit `workspace_mb` MiB, at least one."""
    return max(1, (workspace_mb << 20) // (len(projection.weight_VD) * projection.logit_dtype.itemsize))


def statistics(projection: Projection, hidden_ND: Tensor, labels_N: Tensor, workspace_NC: Tensor) -> Softmax:
    """Softmax statistics, the vocabulary in chunks of the workspace's width C.

    With C = V the workspace afterwards holds the raw products, or what `leaves_exponentials` describes.
    """
    softmax = Softmax.empty(len(hidden_ND), like=workspace_NC)
    for columns, z_NC in _chunks(projection, workspace_NC):
        projection.logits_(z_NC, hidden_ND, columns.start)
        lse_update(z_NC, softmax, labels_N, columns.start, projection.bias(columns), projection.softcap)
    return softmax


def gradients(
    projection: Projection,
    hidden_ND: Tensor,
    labels_N: Tensor,
    softmax: Softmax,
    grad_logp_N: Tensor,
    workspace_NC: Tensor,
    kept: bool,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (N, D), weight (V, D) and bias (V,), those that `needs_grad` marks, for known statistics.

    The weight's is in its own dtype, the others in `logit_dtype`. `kept`: the workspace is as `statistics` left it,
    with C = V, and is overwritten; otherwise each chunk's logits are computed again.
    """
    weight_VD, wide = projection.weight_VD, projection.logit_dtype
    # Some product writes every element, unless there are no rows.
    new = weight_VD.new_empty if len(hidden_ND) else weight_VD.new_zeros
    dhidden_ND = new(hidden_ND.shape, dtype=wide) if needs_grad[0] else None
    dweight_VD = new(weight_VD.shape) if needs_grad[1] else None
    dbias_V = new(len(weight_VD), dtype=wide) if needs_grad[2] else None
    if not len(hidden_ND):
        return dhidden_ND, dweight_VD, dbias_V
    exponentials = kept and leaves_exponentials(workspace_NC, projection.softcap)
    for columns, z_NC in _chunks(projection, workspace_NC):
        if not kept:
            projection.logits_(z_NC, hidden_ND, columns.start)
        bias_C, softcap, dtype = projection.bias(columns), projection.softcap, projection.row_dtype
        dz_NC = dlogits(z_NC, softmax, labels_N, columns.start, bias_C, softcap, grad_logp_N, dtype, exponentials)
        if dhidden_ND is not None:
            projection.add_hidden_grad_(dhidden_ND, dz_NC, columns.start, first=columns.start == 0)
        if dweight_VD is not None:
            projection.weight_grad_(dweight_VD[columns], dz_NC, hidden_ND)
        if dbias_V is not None:
            dbias_V[columns] = dz_NC.sum(0, dtype=wide)
    return dhidden_ND, dweight_VD, dbias_V


def unit_hidden_gradient(
    projection: Projection, hidden_ND: Tensor, labels_N: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) and the gradient of each with respect to its own hidden row (N, D), in `logit_dtype`.

    `size` rows at a time; one product for the logits instead of two, and no logits left behind.
    """
    parts = slices(len(hidden_ND), size)
    workspace_NV = projection.workspace(min(size, len(hidden_ND)), len(projection.weight_VD))
    logp_N = workspace_NV.new_empty(len(hidden_ND))
    dhidden_ND = workspace_NV.new_empty(hidden_ND.shape)
    for rows in parts:
        z_NV, labels = workspace_NV[: rows.stop - rows.start], labels_N[rows]
        softmax = statistics(projection, hidden_ND[rows], labels, z_NV)
        logp_N[rows] = softmax.logp()
        bias_V, softcap, dtype = projection.bias_V, projection.softcap, projection.row_dtype
        exponentials = leaves_exponentials(z_NV, softcap)
        ones_N = torch.ones_like(softmax.max_N)
        dz_NV = dlogits(z_NV, softmax, labels, 0, bias_V, softcap, ones_N, dtype, exponentials)
        projection.add_hidden_grad_(dhidden_ND[rows], dz_NV, 0, first=True)
    return logp_N, dhidden_ND


def check_labels(labels_N: Tensor, vocabulary: int) -> None:
    """Raise ValueError for a label outside the vocabulary. Labels on a GPU are not checked, because the host would have
    to wait for the answer: such a label's log-probability is −∞ there.
    """
    if labels_N.is_cuda:
        return
    outside_N = (labels_N < 0) | (labels_N >= vocabulary)
    if outside_N.any():
        row = int(outside_N.nonzero()[0])
        raise ValueError(f"label {int(labels_N[row])} of row {row} is outside the vocabulary of {vocabulary} entries")


def _chunks(projection: Projection, workspace_NC: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary of at most the workspace's width, each with the part of the workspace that it fills."""
    for columns in slices(len(projection.weight_VD), workspace_NC.shape[1]):
        yield columns, workspace_NC[:, : columns.stop - columns.start]
