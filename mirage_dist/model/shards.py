"""A checkpoint directory on disk: safetensors files of flat fragments, readable on any number of ranks.

A shard holds one rank's fragments. The tensor `KEY/NAME` is the flat, contiguous part of parameter NAME that begins at
element `starts[NAME]`; KEY is `param` (the float32 master copy), `exp_avg` or `exp_avg_sq` (AdamW's moments). Starts
and whole shapes stand in the file's metadata. Which rank wrote what matters to nobody: a reader asks for elements.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mirage_dist.schema import RunError

PARAM = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")
PATTERN = "rank-*.safetensors"
CHUNK = 16 * 2**20  # bytes written and hashed at once


@dataclass(frozen=True)
class Fragment:
    """A flat part (n,) of the parameter `name`, from element `start` of its row-major elements on.

    tensors: KEY -> (n,) float32, on any device.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]


def write(file: Path, fragments: Sequence[Fragment]) -> dict[str, Any]:
    """Write one shard and sync it to disk; returns {"bytes", "sha256"}.

    The digest is of what was meant to be written, taken on the way: a disk that keeps something else is found out.
    Raises OSError.
    """
    flat = [(f"{key}/{f.name}", tensor) for f in fragments for key, tensor in f.tensors.items()]
    header: dict[str, Any] = {
        "__metadata__": {
            "starts": json.dumps({f.name: f.start for f in fragments}),
            "shapes": json.dumps({f.name: f.shape for f in fragments}),
        }
    }
    end = 0
    for name, tensor in flat:
        start, end = end, end + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    digest, size = hashlib.sha256(), 0
    with file.open("wb", buffering=0) as handle:
        for part in (len(text).to_bytes(8, "little"), text, *(_bytes(tensor) for _, tensor in flat)):
            view = memoryview(part)
            for begin in range(0, len(view), CHUNK):
                size += _write_all(handle, view[begin : begin + CHUNK])
                digest.update(view[begin : begin + CHUNK])
        os.fsync(handle.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write_all(handle: Any, part: memoryview) -> int:
    done = 0
    while done < len(part):
        done += handle.write(part[done:])
    return done


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B")


class Shards:
    """The shards of one checkpoint directory, opened by memory map. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stack = ExitStack()
        # (file, start of its fragment), by tensor
        self._pieces: dict[str, list[tuple[Any, int]]] = {}
        for file in sorted(folder.glob(PATTERN)):
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            told = handle.metadata()
            starts = json.loads(told["starts"])
            self.shapes.update({name: tuple(shape) for name, shape in json.loads(told["shapes"]).items()})
            for tensor in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                self._pieces.setdefault(tensor, []).append((handle, starts[tensor.partition("/")[2]]))

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, key: str, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a parameter's `key`: (count,) float32 on the CPU.

        Raises RunError when the shards together do not hold all of them.
        """
        out = torch.empty(count)
        found = 0
        for piece, begin in self._overlaps(f"{key}/{name}", start, start + count):
            out[begin - start : begin - start + len(piece)] = piece
            found += len(piece)
        if found != count:
            raise RunError(f"{self.folder}: holds {found} of {count} elements of {key} of {name} from {start} on")
        return out

    def whole(self, name: str) -> Tensor:
        """A parameter in float32, in its shape."""
        shape = self.shapes[name]
        return self.read(PARAM, name, 0, math.prod(shape)).view(shape)

    def _overlaps(self, tensor: str, start: int, stop: int) -> Iterator[tuple[Tensor, int]]:
        for handle, begin in self._pieces.get(tensor, []):
            part = handle.get_slice(tensor)
            low, high = max(start, begin), min(stop, begin + part.get_shape()[0])
            if low < high:
                yield part[low - begin : high - begin], low


def committed(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first, whole or damaged."""
    return sorted(folder.glob("step-*[0-9]"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory. Raises OSError, or ValueError when it is not what was written."""
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _seal(manifest):
        raise ValueError("manifest.json does not have the SHA-256 that stands in it")
    return manifest


def sealed(manifest: Mapping[str, Any]) -> str:
    """A manifest as it is written, with its own SHA-256: a flipped byte in it is found out like one in a shard."""
    return json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1)


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, None when it is whole: manifest, each file's size and SHA-256.

    Of the files, those with number `part` modulo `parts` are read.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable manifest ({error})"
    for name, told in sorted(files.items())[part::parts]:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != told["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {told['bytes']}"
        if _sha256(file) != told["sha256"]:
            return f"{name} does not have the SHA-256 of the manifest"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
