"""Passes over logits in bounded memory: statistics, gradients from kept or repeated products, both in one go.

The vocabulary is cut where whole rows are not needed at once, because then each slice of dW is written once, from one
sum over all rows. Rows are cut where the gradient follows at once and needs the whole vocabulary's log-sum-exp first.
`hidden_ND` is in the projection's `row_dtype` throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_dist.kernels.projection import Projection
from mirage_dist.kernels.rows import IGNORE, Softmax, dlogits, leaves_shares, lse_update

# Sums of a 16-bit gradient that are rounded in place. Each costs 1.6e-3 rms of the sum so far: four stay under the
# 5e-3 that a bfloat16 gradient may be off by, fourteen do not. More are summed in a float32 tensor of V x D.
_ROUNDINGS = 4


@dataclass
class Wanted:
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass
class Gradients:
    """hidden_ND and bias_V in the logits' dtype, weight_VD in that or its own: the caller scales and rounds them."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def room(cls, projection: Projection, hidden_ND: Tensor, wanted: Wanted, parts: int = 1) -> Gradients:
        weight_VD, wide = projection.weight_VD, projection.logit_dtype
        own = weight_VD.dtype if parts <= _ROUNDINGS else wide
        # Every element is written by some product, unless there are no rows.
        new = weight_VD.new_empty if len(hidden_ND) else weight_VD.new_zeros
        return cls(
            new(hidden_ND.shape, dtype=wide) if wanted.hidden else None,
            new(weight_VD.shape, dtype=own) if wanted.weight else None,
            weight_VD.new_zeros(weight_VD.shape[0], dtype=wide) if wanted.bias else None,
        )

    def rounded(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """In the dtypes of the tensors that they belong to."""
        pairs = ((self.hidden_ND, hidden), (self.weight_VD, weight), (self.bias_V, bias))
        return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)


def columns_that_fit(projection: Projection, rows: int, workspace_mb: int) -> int:
    """Columns of logits of `rows` rows that fit the workspace: a multiple of 64, at least 64, or the vocabulary."""
    columns = (workspace_mb << 20) // (max(rows, 1) * projection.logit_dtype.itemsize)
    return min(len(projection.weight_VD), max(64, columns // 64 * 64))


def rows_that_fit(projection: Projection, workspace_mb: int) -> int:
    """Whole rows of logits that fit the workspace: at least one."""
    return max(1, (workspace_mb << 20) // (len(projection.weight_VD) * projection.logit_dtype.itemsize))


def statistics(projection: Projection, hidden_ND: Tensor, labels_N: Tensor, room_NC: Tensor) -> Softmax:
    """Softmax statistics, the vocabulary in chunks of the room's width. Afterwards a room that has all columns holds
    logits, or what `leaves_shares` says.
    """
    softmax = Softmax.start(len(hidden_ND), like=room_NC)
    for start, z_NC in _chunks(projection, room_NC):
        projection.logits_(z_NC, hidden_ND, start)
        columns = slice(start, start + z_NC.shape[1])
        lse_update(z_NC, softmax, labels_N, start, projection.bias(columns), projection.softcap)
    return softmax


def gradients(
    projection: Projection,
    hidden_ND: Tensor,
    labels_N: Tensor,
    softmax: Softmax,
    grad_logp_N: Tensor,
    grad_lse_N: Tensor | None,
    room_NC: Tensor,
    kept: bool,
    wanted: Wanted,
) -> Gradients:
    """Gradients for known statistics. `kept`: the room is as `statistics` left it, with all columns, and is used up."""
    shares = kept and leaves_shares(room_NC, projection.softcap)
    out = Gradients.room(projection, hidden_ND, wanted)
    if not len(hidden_ND):
        return out
    grad_logp_N = torch.where(labels_N == IGNORE, 0.0, grad_logp_N)
    for start, z_NC in _chunks(projection, room_NC):
        columns = slice(start, start + z_NC.shape[1])
        if not kept:
            projection.logits_(z_NC, hidden_ND, start)
        about = (projection.bias(columns), projection.softcap, grad_logp_N, grad_lse_N, projection.row_dtype)
        dz_NC = dlogits(z_NC, softmax, labels_N, start, *about, shares)
        if out.hidden_ND is not None:
            projection.add_hidden_grad_(out.hidden_ND, dz_NC, start, first=start == 0)
        if out.weight_VD is not None:
            projection.add_weight_grad_(out.weight_VD[columns], dz_NC, hidden_ND, first=True)
        if out.bias_V is not None:
            out.bias_V[columns] = dz_NC.sum(0, dtype=out.bias_V.dtype)
    return out


def single_pass(
    projection: Projection,
    hidden_ND: Tensor,
    labels_N: Tensor,
    parts: Sequence[slice],
    weigh: Callable[[slice, Tensor], Tensor],
    wanted: Wanted,
) -> tuple[Tensor, Gradients]:
    """Log-probabilities (N,) and gradients, rows in `parts`: g of a part is `weigh(rows, log-probabilities)`.

    One product for the logits instead of two. The weight gradient is summed over the parts, in 16 bits if that is few
    roundings.
    """
    out = Gradients.room(projection, hidden_ND, wanted, len(parts))
    vocabulary = len(projection.weight_VD)
    room_NV = projection.workspace(max((p.stop - p.start for p in parts), default=0), vocabulary)
    logp_N = room_NV.new_empty(len(hidden_ND))
    for number, rows in enumerate(parts):
        z_NV = room_NV[: rows.stop - rows.start]
        softmax = statistics(projection, hidden_ND[rows], labels_N[rows], z_NV)
        logp_N[rows] = softmax.logp(labels_N[rows])
        grad_N = torch.where(labels_N[rows] == IGNORE, 0.0, weigh(rows, logp_N[rows]))
        about = (projection.bias(slice(None)), projection.softcap, grad_N, None, projection.row_dtype)
        dz_NV = dlogits(z_NV, softmax, labels_N[rows], 0, *about, leaves_shares(z_NV, projection.softcap))
        if out.hidden_ND is not None:
            projection.add_hidden_grad_(out.hidden_ND[rows], dz_NV, 0, first=True)
        if out.weight_VD is not None:
            projection.add_weight_grad_(out.weight_VD, dz_NV, hidden_ND[rows], first=number == 0)
        if out.bias_V is not None:
            out.bias_V += dz_NV.sum(0, dtype=out.bias_V.dtype)
    return logp_N, out


def check_labels(labels_N: Tensor, vocabulary: int) -> None:
    """Raise ValueError for a label that is neither in the vocabulary nor −100. On a GPU, where the answer would stall
    the host, such a label's log-probability is −∞ instead.
    """
    if labels_N.is_cuda:
        return
    wrong_N = ((labels_N < 0) | (labels_N >= vocabulary)) & (labels_N != IGNORE)
    if wrong_N.any():
        raise ValueError(f"label {int(labels_N[wrong_N][0])} is not in a vocabulary of {vocabulary}, nor {IGNORE}")


def exact(rows: Tensor) -> torch.autocast:
    """Autocast off: it would take float32 products back to 16 bits."""
    return torch.autocast(rows.device.type, enabled=False)


def cut_between(lengths: Sequence[int], size: int) -> list[slice]:
    """Consecutive rows of whole sequences in slices of at most `size`, or of one longer sequence."""
    parts, first, stop = [], 0, 0
    for length in lengths:
        if stop > first and stop + length - first > size:
            parts.append(slice(first, stop))
            first = stop
        stop += length
    return [*parts, slice(first, stop)] if stop > first else parts


def _chunks(projection: Projection, room_NC: Tensor):
    """(first column, room for its chunk) over the vocabulary."""
    vocabulary, width = len(projection.weight_VD), room_NC.shape[1]
    for start in range(0, vocabulary, width):
        yield start, room_NC[:, : min(width, vocabulary - start)]
