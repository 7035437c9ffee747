"""Packing: the rows of a micro-batch are concatenated into one row without padding.

Each row is a segment: its positions begin at 0 and its tokens attend to no other segment. transformers derives the
block-diagonal causal mask of sdpa and eager attention from `position_ids`, and passes the borders `cu_seq_lens_*` to
flash-attention, which then need not search for them on the device in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

# The model's keyword arguments for the borders between segments.
BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def pack(rows: Sequence[Mapping[str, Sequence[int]]]) -> tuple[dict[str, Tensor], list[int]]:
    """Rows of any lengths as tensors (1, T), and the position in them where each row begins, followed by T.

    rows: as `collate.Row`. T: tokens of all rows together.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    tensors = {name: torch.tensor([list(chain.from_iterable(row[name] for row in rows))]) for name in rows[0]}
    return tensors, list(accumulate(lengths, initial=0))


def borders(edges: Sequence[int]) -> dict[str, Any]:
    """The model's keyword arguments that keep segments separate.

    edges: the position where each segment begins, followed by T, as `pack` returns them.
    """
    lengths = [stop - start for start, stop in pairwise(edges)]
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    cu_seq_lens, longest = torch.tensor(edges, dtype=torch.int32), max(lengths)
    values = (cu_seq_lens, cu_seq_lens, longest, longest)
    return {"position_ids": positions_T.unsqueeze(0), **dict(zip(BORDERS, values, strict=True))}
