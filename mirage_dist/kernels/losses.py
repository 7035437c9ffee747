"""Losses whose gradient is formed in forward: cross entropy and NPO, in one pass over rows of logits.

The upstream gradient is a scalar on the device and only multiplies what is there; the host never waits for it. The
first backward hands its buffers over; a further one through the same graph repeats the pass, bitwise the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirage_dist.kernels import passes
from mirage_dist.kernels.passes import Gradients, Wanted
from mirage_dist.kernels.projection import Projection, cut
from mirage_dist.kernels.rows import scale_

Reduction = Literal["seq_sum", "seq_mean", "batch_mean"]


def linear_ce(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    n_items: float | Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    workspace_mb: int = 2048,
) -> Tensor:
    """−Σ log softmax(W h)[label] / n_items, a scalar in float32 (float64 for float64 input).

    `n_items` is a number, or a scalar on the rows' device. Logits of at most `workspace_mb` MiB exist at a time, and a
    16-bit weight takes a float32 gradient besides where that means more than four times. Raises ValueError for labels
    outside the vocabulary.
    """
    loss, _ = _apply(hidden_ND, weight_VD, labels_N, bias, softcap, workspace_mb, None, _CrossEntropy(n_items))
    return loss


def linear_npo(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    segment_N: Tensor,
    ref_B: Tensor,
    beta: float,
    reduction: Reduction = "seq_sum",
    *,
    lengths: Sequence[int] | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    workspace_mb: int = 2048,
) -> tuple[Tensor, Tensor]:
    """NPO's forget loss for cached references (Zhang et al., 2024, eq. 3), and each sequence's log-probability (B,).

    loss = (2/β) · mean_i softplus(β Δ_i), Δ_i = Σ_t lp_t − ref_i over the rows of sequence i; `ref_B` holds sums too.
    `seq_mean` divides Δ_i by the sequence's rows. `batch_mean` is one Δ over all rows of the call, divided by N.
    Rows stand in batch order as `select_response` gives them; `segment_N` is the sequence of each. `lengths` are the
    sequences' rows where the host knows them, else they are read from the device. The log-probabilities (sums, float32)
    carry no gradient. A sequence longer than the workspace is one piece all the same.

    Raises ValueError for a sequence without rows, for rows that are not in batch order, a reduction that is none.
    """
    rows, sequences = len(labels_N), len(ref_B)
    if reduction not in ("seq_sum", "seq_mean", "batch_mean"):
        raise ValueError(f"reduction={reduction!r}; must be seq_sum, seq_mean or batch_mean")
    if lengths is None:
        lengths = torch.bincount(segment_N, minlength=sequences).tolist()
        if not segment_N.is_cuda and (segment_N.diff() < 0).any():
            raise ValueError("linear_npo: rows must stand in batch order, as select_response gives them")
    if len(lengths) != sequences or sum(lengths) != rows or not all(lengths):
        raise ValueError(
            f"linear_npo: {sequences} reference log-probabilities, {rows} rows and sequences of {list(lengths)} rows; "
            "each sequence needs a response token, each row a sequence"
        )
    npo = _NPO(segment_N, ref_B.detach(), beta, reduction)
    return _apply(hidden_ND, weight_VD, labels_N, bias, softcap, workspace_mb, lengths, npo)


class _Loss(Protocol):
    """A loss of log-probabilities whose gradient for a row is known when its sequence's rows are."""

    def weigh(self, rows: slice, logp: Tensor) -> Tensor:
        """d loss / d logp of some whole sequences' rows, up to the factor that `value` returns."""
        ...

    def value(self, logp_N: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss, what else to return, and a factor of the gradient that only all rows together give."""
        ...


class _CrossEntropy:
    def __init__(self, n_items: float | Tensor) -> None:
        self.n_items = n_items

    def weigh(self, rows: slice, logp: Tensor) -> Tensor:
        return torch.full_like(logp, -1.0) / self.n_items

    def value(self, logp_N: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return -logp_N.sum() / self.n_items, logp_N, None


class _NPO:
    def __init__(self, segment_N: Tensor, ref_B: Tensor, beta: float, reduction: Reduction) -> None:
        self.segment_N, self.ref_B, self.beta, self.reduction = segment_N, ref_B, beta, reduction
        self.sequence_B1 = torch.arange(len(ref_B), device=segment_N.device)[:, None]

    def weigh(self, rows: slice, logp: Tensor) -> Tensor:
        if self.reduction == "batch_mean":
            return torch.ones_like(logp)
        margin_B, count_B = self._margins(self._sums(logp, rows), rows)
        weight_B = 2 / len(margin_B) * torch.sigmoid(self.beta * margin_B) / count_B
        return weight_B.to(logp.dtype)[self.segment_N[rows]]

    def value(self, logp_N: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        everything = slice(0, len(logp_N))
        seq_logp_B = self._sums(logp_N, everything)
        if self.reduction == "batch_mean":
            rows = max(len(logp_N), 1)
            margin = (seq_logp_B - self.ref_B.to(seq_logp_B.dtype)).sum() / rows
            factor = 2 / rows * torch.sigmoid(self.beta * margin)
            return 2 / self.beta * F.softplus(self.beta * margin), seq_logp_B, factor
        margin_B, _ = self._margins(seq_logp_B, everything)
        return 2 / self.beta * F.softplus(self.beta * margin_B).sum() / max(len(margin_B), 1), seq_logp_B, None

    def _margins(self, seq_logp_B: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Δ, and what its rows were divided by; of no use for sequences without rows in `rows`."""
        count_B = torch.ones_like(seq_logp_B)
        if self.reduction == "seq_mean":
            count_B = self._sums(count_B.new_ones(rows.stop - rows.start), rows).clamp(min=1)
        return (seq_logp_B - self.ref_B.to(seq_logp_B.dtype)) / count_B, count_B

    def _sums(self, values: Tensor, rows: slice) -> Tensor:
        """Sum by sequence: (n,) -> (B,). A reduction, because a scatter on a GPU adds in any order."""
        return torch.where(self.segment_N[rows] == self.sequence_B1, values, 0.0).sum(1)


def _apply(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    workspace_mb: int,
    lengths: Sequence[int] | None,
    loss: _Loss,
) -> tuple[Tensor, Tensor]:
    passes.check_labels(labels_N, len(weight_VD))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias)):
        return _SinglePass.apply(hidden_ND, weight_VD, bias, labels_N, softcap, workspace_mb, lengths, loss)
    with passes.exact(hidden_ND), torch.no_grad():
        projection = Projection(hidden_ND, weight_VD, bias, softcap)
        room_NC = projection.workspace(len(labels_N), passes.columns_that_fit(projection, len(labels_N), workspace_mb))
        softmax = passes.statistics(projection, hidden_ND.to(projection.row_dtype), labels_N, room_NC)
        value, detail, _ = loss.value(softmax.logp(labels_N))
        return value, detail


class _SinglePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, softcap, workspace_mb, lengths, loss: _Loss):  # type: ignore[override]
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.about = softcap, workspace_mb, lengths, loss, Wanted(*ctx.needs_input_grad[:3])
        logp_N, ctx.found = _run(hidden, weight, bias, labels, *ctx.about)
        value, detail, ctx.factor = loss.value(logp_N)
        ctx.mark_non_differentiable(detail)
        return value, detail

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _detail):  # type: ignore[override]
        hidden, weight, bias, labels = ctx.saved_tensors
        found, ctx.found = ctx.found or _run(hidden, weight, bias, labels, *ctx.about)[1], None
        factor = grad if ctx.factor is None else grad * ctx.factor
        for each in (found.hidden_ND, found.weight_VD, found.bias_V):
            if each is not None:
                scale_(each, factor)
        return *found.rounded(hidden, weight, bias), None, None, None, None, None


def _run(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    softcap: float | None,
    workspace_mb: int,
    lengths: Sequence[int] | None,
    loss: _Loss,
    wanted: Wanted,
) -> tuple[Tensor, Gradients]:
    with passes.exact(hidden_ND):
        projection = Projection(hidden_ND, weight_VD, bias_V, softcap)
        size = passes.rows_that_fit(projection, workspace_mb)
        parts = cut(len(labels_N), size) if lengths is None else passes.cut_between(lengths, size)
        rows_ND = hidden_ND.to(projection.row_dtype)
        return passes.single_pass(projection, rows_ND, labels_N, parts, loss.weigh, wanted)
