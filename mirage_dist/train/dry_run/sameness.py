"""Whether a checkpoint gives back, to the last bit, the state that it was saved from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mirage_dist.train.checkpoints import fragments as training_state

CHUNK = 1 << 24  # bytes that are summed at once; a multiple of 8
FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that multiplication by it loses nothing


def checksums(engine: Any) -> dict[str, str]:
    """By name, of all that this rank holds: master copy, optimizer state, and the parameters that forward uses."""
    parts, scalars = training_state.fragments(engine)
    sums = {part.title: checksum(part.tensor) for part in parts}
    sums |= {name: checksum(tensor) for name, tensor in _computed(engine)}
    return {**sums, "scalars": json.dumps(scalars, sort_keys=True)}


def checksum(tensor: Tensor) -> str:
    """Of dtype, shape and every bit, by 64-bit sums on the tensor's device; where an element stands counts."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for start in range(0, len(raw), CHUNK):
        piece = raw[start : start + CHUNK]
        words = torch.zeros(-(-len(piece) // 8) * 8, dtype=torch.uint8, device=raw.device)
        words[: len(piece)] = piece
        numbers = words.view(torch.int64)
        place = torch.arange(start // 8, start // 8 + len(numbers), device=raw.device) * 2 + 1
        mixed = (numbers ^ (numbers >> 29)) * FACTOR + place
        total += ((mixed ^ (mixed >> 31)) * place).sum()
    return f"{tensor.dtype} {tuple(tensor.shape)} {int(total) & ((1 << 64) - 1):016x}"


def wipe(engine: Any) -> None:
    """Zero what `checksums` covers, so that a load that restores nothing is noticed."""
    parts, _ = training_state.fragments(engine)
    with torch.no_grad():
        for tensor in (*(part.tensor for part in parts), *(tensor for _, tensor in _computed(engine))):
            tensor.zero_()


def differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def _computed(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """What forward computes with, of the trained parameters: whole, or this rank's part, and its copy in the node."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        own = getattr(parameter, "ds_tensor", None)
        yield f"computed/{name}", parameter.data if own is None else own.data
        if (secondary := getattr(parameter, "ds_secondary_tensor", None)) is not None:
            yield f"computed in the node/{name}", secondary.data
