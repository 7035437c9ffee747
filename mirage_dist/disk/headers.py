"""The beginning of a safetensors file whose data are written piece by piece, without all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def header(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Length and header. tensors: name -> (dtype as the format names it, shape, bytes).

    The data follow in the same order without gaps; by falling size of an element each tensor is aligned.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        start, end = end, end + size
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return len(text).to_bytes(8, "little") + text
