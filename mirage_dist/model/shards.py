"""A checkpoint directory on disk: safetensors files of flat fragments, readable on any number of ranks.

A shard holds one rank's fragments. The tensor `KEY/NAME` is the flat, contiguous part, of whatever belongs to parameter
NAME under KEY, that begins at element `starts[KEY/NAME]`; the whole has the shape `shapes[KEY/NAME]`. KEY is `param`
(the float32 master copy) or the name of a state tensor of the optimizer (AdamW: `exp_avg`, `exp_avg_sq`). State that is
a plain number, such as a step count, is in `scalars[NAME]`. Starts, shapes and scalars are in the file's metadata. It
does not matter which rank wrote what: a reader asks for elements.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mirage_dist import disk, state
from mirage_dist.disk import Written
from mirage_dist.progress import log
from mirage_dist.schema import RunError

PARAM = "param"
MANIFEST = "manifest.json"  # in a checkpoint
SHARD = re.compile(r"rank-[0-9]+-of-[0-9]+\.safetensors")
STEP = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,8})")  # names of checkpoints
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # that a shard can hold, by their names in safetensors files
# Parameter -> name of its state -> JSON value (see `train.checkpoints.fragments`).
Scalars = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Fragment:
    """A flat part (n,) of the tensor `key` of parameter `name`, from element `start` of its row-major elements on.

    shape: of the whole tensor. tensor: on any device, of a dtype in DTYPES.
    """

    key: str
    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor

    @property
    def title(self) -> str:
        return f"{self.key}/{self.name}"


def write(file: Path, fragments: Sequence[Fragment], scalars: Scalars | None = None) -> Written:
    """Write one shard and sync it to disk. Raises OSError."""
    # By falling size of an element, so that each tensor is aligned in the file.
    ordered = sorted(fragments, key=lambda f: -f.tensor.itemsize)
    header: dict[str, Any] = {
        "__metadata__": {
            "starts": json.dumps({f.title: f.start for f in ordered}),
            "shapes": json.dumps({f.title: f.shape for f in ordered}),
            "scalars": json.dumps(scalars or {}),
        }
    }
    end = 0
    for f in ordered:
        start, end = end, end + f.tensor.nbytes
        header[f.title] = {"dtype": DTYPES[f.tensor.dtype], "shape": [len(f.tensor)], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    content = (len(text).to_bytes(8, "little"), text, *map(_bytes, ordered))
    return disk.write(file, content, workspace=file.parent)  # a folder that another job has removed is not made again


def _bytes(fragment: Fragment) -> memoryview | bytes:
    flat = fragment.tensor.detach().to("cpu").contiguous()
    return flat.view(torch.uint8).numpy().data if len(flat) else b""


class Shards:
    """The shards that a checkpoint's manifest names, opened by memory map. A context manager.

    shapes: of the parameters, by name. scalars: see `Scalars`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scalars: dict[str, dict[str, Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of all tensors
        self._stack = ExitStack()
        # (file, start of its fragment), by tensor
        self._pieces: dict[str, list[tuple[Any, int]]] = {}
        for file in sorted(name for name in read_manifest(folder)["files"] if SHARD.fullmatch(name)):
            handle = self._stack.enter_context(safe_open(folder / file, framework="pt"))
            metadata = handle.metadata()
            starts = json.loads(metadata["starts"])
            self._shapes |= {title: tuple(shape) for title, shape in json.loads(metadata["shapes"]).items()}
            self.scalars |= json.loads(metadata["scalars"])
            for title in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                self._pieces.setdefault(title, []).append((handle, starts[title]))
        for title, shape in self._shapes.items():
            key, _, name = title.partition("/")
            if key == PARAM:
                self.shapes[name] = shape

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def states(self, name: str) -> dict[str, tuple[int, ...]]:
        """The optimizer's state tensors of a parameter: key -> shape."""
        parts = (title.partition("/") for title in self._shapes)
        return {key: self._shapes[f"{key}/{name}"] for key, _, owner in parts if owner == name and key != PARAM}

    def read(self, key: str, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the tensor `key` of a parameter: (count,) on the CPU.

        Raises RunError when the shards together do not hold all of them.
        """
        pieces = list(self._overlaps(f"{key}/{name}", start, start + count))
        held = sum(len(piece) for piece, _ in pieces)
        if held != count:
            raise RunError(f"{self.folder}: holds {held} of {count} elements of {key} of {name} from {start} on")
        out = torch.empty(count, dtype=pieces[0][0].dtype if pieces else torch.float32)
        for piece, begin in pieces:
            out[begin - start : begin - start + len(piece)] = piece
        return out

    def whole(self, name: str, key: str = PARAM) -> Tensor:
        """A parameter, or another tensor that belongs to it, in its shape."""
        shape = self._shapes[f"{key}/{name}"]
        return self.read(key, name, 0, math.prod(shape)).view(shape)

    def _overlaps(self, title: str, start: int, stop: int) -> Iterator[tuple[Tensor, int]]:
        for handle, begin in self._pieces.get(title, []):
            part = handle.get_slice(title)
            low, high = max(start, begin), min(stop, begin + part.get_shape()[0])
            if low < high:
                yield part[low - begin : high - begin], low


def committed(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first, whole or damaged. What else lies there is named in the log."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    checkpoints = [entry for entry in places(folder) if entry.is_dir()]
    others = {entry.name for entry in entries if not entry.name.startswith(".")} - {c.name for c in checkpoints}
    if foreign := sorted(others - {"latest"}):
        _name_foreign(folder, tuple(foreign))
    return checkpoints


@cache
def _name_foreign(folder: Path, names: tuple[str, ...]) -> None:
    """Log what is passed over, once a process: a run looks at its checkpoints at every save."""
    log.warning(f"{folder}: no checkpoints, and passed over: {', '.join(names)}")


def places(folder: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, by step; also a file, or a link that leads nowhere."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((entry for entry in entries if STEP.fullmatch(entry.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises FileNotFoundError when there is none, state.Damaged when it is torn or edited or belongs to another step,
    ConfigError when a newer version of this package wrote it.
    """
    file = checkpoint / MANIFEST
    manifest = state.read("checkpoint", file)
    if STEP.fullmatch(checkpoint.name) and manifest["step"] != step_of(checkpoint):
        raise state.Damaged(f"{file}: is the manifest of step {manifest['step']}")
    return manifest


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint's manifest or with the size or SHA-256 of a file; None when it is whole.

    Only the files whose number modulo `parts` is `part` are read. Raises ConfigError when a newer version of this
    package wrote it: passing it over would train its steps again.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, state.Damaged) as error:
        return f"no readable manifest ({error})"
    for name, written in sorted(files.items())[part::parts]:
        file = checkpoint / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != written["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {written['bytes']}"
            if disk.sha256(file) != written["sha256"]:
                return f"{name} does not have the SHA-256 of the manifest"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None
