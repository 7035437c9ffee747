"""A checkpoint directory on disk: safetensors files of flat fragments, readable on any number of ranks.

A shard holds one rank's fragments. The tensor `KEY/NAME` is the flat, contiguous part, of whatever belongs to parameter
NAME under KEY, that begins at element `starts[KEY/NAME]`; the whole has the shape `shapes[KEY/NAME]`. KEY is `param`
(the float32 master copy) or the name of a state tensor of the optimizer (AdamW: `exp_avg`, `exp_avg_sq`). State that is
a plain number, such as a step count, is in `scalars[NAME]`. Starts, shapes and scalars are in the file's metadata. It
does not matter which rank wrote what: a reader asks for elements.

index.json says which elements lie in which shard, so that a reader opens only the shards that hold what it asks for:

    {"files": ["rank-00000-of-00512.safetensors", …], "scalars": {…},
     "tensors": {"param/lm_head.weight": [[32000, 4096], [[0, 512, 0, 256000]]], …}}

The second member of a tensor is a list of runs [FILE, FILES, START, COUNT]: of FILES consecutive shards from shard FILE
on each holds COUNT elements, the first those from START on, the next those after them. ZeRO cuts so regularly that a
tensor has one or two runs, whatever the number of ranks. A checkpoint without an index, of an earlier version of this
package, is read by the headers of all of its shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mirage_dist import disk, state
from mirage_dist.disk import Written
from mirage_dist.disk.headers import header
from mirage_dist.progress import log
from mirage_dist.schema import RunError

PARAM = "param"
MANIFEST, INDEX = "manifest.json", "index.json"  # in a checkpoint
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
Run = tuple[int, int, int, int]  # number of the first file, number of files, first element, elements of each file
Placed = tuple[tuple[int, ...], list[Run]]  # a tensor's shape, and where its elements lie


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
    metadata = {
        "starts": json.dumps({f.title: f.start for f in ordered}),
        "shapes": json.dumps({f.title: f.shape for f in ordered}),
        "scalars": json.dumps(scalars or {}),
    }
    head = header({f.title: (DTYPES[f.tensor.dtype], f.tensor.shape, f.tensor.nbytes) for f in ordered}, metadata)
    content = (head, *map(_bytes, ordered))
    return disk.write(file, content, workspace=file.parent)  # a folder that another job has removed is not made again


def _bytes(fragment: Fragment) -> memoryview | bytes:
    flat = fragment.tensor.detach().to("cpu").contiguous()
    return flat.view(torch.uint8).numpy().data if len(flat) else b""


class Layout(NamedTuple):
    """What one shard holds: (title, shape of the whole, first element, number of elements) of each tensor; scalars."""

    tensors: list[tuple[str, tuple[int, ...], int, int]]
    scalars: Scalars

    @classmethod
    def of(cls, fragments: Sequence[Fragment], scalars: Scalars) -> Layout:
        return cls([(f.title, f.shape, f.start, len(f.tensor)) for f in fragments], scalars)

    def packed(self) -> tuple[bytes, bytes]:
        """Both members as compressed JSON: on many ranks a few per cent of the objects that they stand for."""
        return zlib.compress(json.dumps(self.tensors).encode()), zlib.compress(json.dumps(self.scalars).encode())


def unpacked(packed: bytes) -> Any:
    """A member of `Layout.packed` as it was."""
    return json.loads(zlib.decompress(packed))


def placed(layouts: Iterable[Iterable[tuple[str, Sequence[int], int, int]]]) -> dict[str, Placed]:
    """Where the elements of each tensor lie. layouts: `Layout.tensors` of each shard, in the order of their numbers."""
    tensors: dict[str, Placed] = {}
    for number, layout in enumerate(layouts):
        for title, shape, start, count in layout:
            runs = tensors.setdefault(title, (tuple(shape), []))[1]
            if runs:
                file, files, begin, each = runs[-1]
                if (number, start, count) == (file + files, begin + files * each, each):
                    runs[-1] = file, files + 1, begin, each
                    continue
            runs.append((number, 1, start, count))
    return tensors


def index(files: Sequence[str], tensors: Mapping[str, Placed], scalars: Iterable[Scalars]) -> str:
    """The text of a checkpoint's index. files: names of the shards by their numbers. scalars: of each shard."""
    merged: dict[str, Mapping[str, Any]] = {}
    for own in scalars:
        merged |= own
    return state.sealed("index", {"files": list(files), "scalars": merged, "tensors": tensors}, compact=True)


class Shards:
    """The shards that a checkpoint's manifest names, by memory map; each is opened when it is first read from.

    A context manager. shapes: of the parameters, by name. scalars: see `Scalars`. Raises RunError when the index does
    not have the SHA-256 of the manifest, and what `read_manifest` raises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._opened: dict[int, tuple[Any, dict[str, int]]] = {}  # number of a file -> its handle, and its starts
        files = read_manifest(folder)["files"]
        self._names = sorted(name for name in files if SHARD.fullmatch(name))
        self._tensors, self.scalars = self._of_index(files[INDEX]) if INDEX in files else self._of_headers()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._states: dict[str, dict[str, tuple[int, ...]]] = {}  # parameter -> key -> shape, of the optimizer's
        for title, (shape, _) in self._tensors.items():
            key, _, name = title.partition("/")
            if key == PARAM:
                self.shapes[name] = shape
            else:
                self._states.setdefault(name, {})[key] = shape

    def _of_index(self, written: Mapping[str, Any]) -> tuple[dict[str, Placed], dict[str, dict[str, Any]]]:
        file = self.folder / INDEX
        raw = file.read_bytes()  # parsed are the bytes that were hashed
        if hashlib.sha256(raw).hexdigest() != written["sha256"]:
            raise RunError(
                f"{file}: does not have the SHA-256 of the manifest; start again, to use an older checkpoint"
            )
        content = state.parse("index", raw, file)
        if content["files"] != self._names:
            raise RunError(f"{file}: is of other shards than those of the manifest")
        tensors = {t: (tuple(shape), [(*run,) for run in runs]) for t, (shape, runs) in content["tensors"].items()}
        return tensors, content["scalars"]

    def _of_headers(self) -> tuple[dict[str, Placed], dict[str, dict[str, Any]]]:
        layouts: list[list[tuple[str, Sequence[int], int, int]]] = []
        scalars: dict[str, dict[str, Any]] = {}
        for number in range(len(self._names)):
            handle, starts = self._open(number)
            shapes = json.loads(handle.metadata()["shapes"])
            scalars |= json.loads(handle.metadata()["scalars"])
            sizes = {title: handle.get_slice(title).get_shape()[0] for title in handle.keys()}  # noqa: SIM118 (no mapping)
            layouts.append([(title, shapes[title], starts[title], size) for title, size in sizes.items()])
        return placed(layouts), scalars

    def _open(self, number: int) -> tuple[Any, dict[str, int]]:
        if number not in self._opened:
            handle = self._stack.enter_context(safe_open(self.folder / self._names[number], framework="pt"))
            self._opened[number] = handle, json.loads(handle.metadata()["starts"])
        return self._opened[number]

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def states(self, name: str) -> dict[str, tuple[int, ...]]:
        """The optimizer's state tensors of a parameter: key -> shape."""
        return self._states.get(name, {})

    def read(self, key: str, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the tensor `key` of a parameter: (count,) on the CPU.

        Opens no shard without any of them. Raises RunError when the shards together do not hold all of them, or a shard
        holds others than the index says.
        """
        title = f"{key}/{name}"
        places = list(self._overlaps(title, start, start + count))
        held = sum(high - low for _, _, _, low, high in places)
        if held != count:
            raise RunError(f"{self.folder}: holds {held} of {count} elements of {key} of {name} from {start} on")
        pieces = [
            (self._piece(title, number, begin, size, low, high), low) for number, begin, size, low, high in places
        ]
        out = torch.empty(count, dtype=pieces[0][0].dtype if pieces else torch.float32)
        for piece, begin in pieces:
            out[begin - start : begin - start + len(piece)] = piece
        return out

    def whole(self, name: str, key: str = PARAM) -> Tensor:
        """A parameter, or another tensor that belongs to it, in its shape."""
        shape = self._tensors[f"{key}/{name}"][0]
        return self.read(key, name, 0, math.prod(shape)).view(shape)

    def _overlaps(self, title: str, start: int, stop: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(number of a file, its first element, how many it has, first and last + 1 of those in [start, stop))."""
        for file, files, first, count in self._tensors.get(title, ((), []))[1]:
            low, high = max(start, first), min(stop, first + files * count)
            for number in range((low - first) // count, -(-(high - first) // count)) if low < high else ():
                begin = first + number * count
                yield file + number, begin, count, max(low, begin), min(high, begin + count)

    def _piece(self, title: str, number: int, begin: int, count: int, low: int, high: int) -> Tensor:
        """Elements [low, high) of a tensor, from the file that holds [begin, begin + count)."""
        handle, starts = self._open(number)
        try:
            part = handle.get_slice(title)
        except SafetensorError:
            part = None
        if part is None or (starts[title], part.get_shape()[0]) != (begin, count):
            raise RunError(f"{self.folder / self._names[number]}: does not hold of {title} what {INDEX} says")
        return part[low - begin : high - begin]


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


def damage(checkpoint: Path, part: int = 0, parts: int = 1, sha256: Callable[[Path], str] = disk.sha256) -> str | None:
    """What is wrong with a checkpoint's manifest or with the size or SHA-256 of a file; None when it is whole.

    Of `parts` callers each reads its `part` of the files (see `share`). sha256: of a file, where it may be known
    without reading it. Raises ConfigError when a newer version of this package wrote it: passing it over would train
    its steps again.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, state.Damaged) as error:
        return f"no readable manifest ({error})"
    for name in share(files, part, parts):
        file, written = checkpoint / name, files[name]
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != written["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {written['bytes']}"
            if sha256(file) != written["sha256"]:
                return f"{name} does not have the SHA-256 of the manifest"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def share(files: Iterable[str], part: int, parts: int) -> list[str]:
    """The files that caller `part` of `parts` reads: every file has one reader.

    A shard's is the rank that loads it, or most of it, if `parts` ranks resume: its bytes come from the disk once.
    """
    shards = sorted(name for name in files if SHARD.fullmatch(name))
    others = sorted(set(files) - set(shards))
    own = [name for number, name in enumerate(shards) if number * parts // len(shards) == part]
    return own + [name for number, name in enumerate(others) if parts - 1 - number % parts == part]
