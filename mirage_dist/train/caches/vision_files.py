"""The files of the vision cache: parts, each with the features of some pictures, and the index of all of them.

    part-0123456789abcdef.safetensors
    index.safetensors                     which part holds a picture

A part holds each picture under the SHA-256 of its file: `DIGEST/features/CONNECTOR` (see `model.vision`),
`DIGEST/inputs/NAME`, the model's other inputs for the picture, and `DIGEST/shapes/NAME`, the shapes of those that its
tower would read. It exists whole or not at all. Its metadata hold a CRC-32 of each picture's tensors, which is compared
whenever they are read: no step computes with others than those that were written. A start reads none of them unless it
is to verify all: a million pictures of LLaVA-1.5 are 1.2 TB. For the same reason parts are not merged.

The index is a flat file (see `caches.flat`) of the pictures' digests in their order, and the number of the part of
each; every rank maps it, and opens only the parts that its batches need.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from mirage_dist import disk
from mirage_dist.model import vision
from mirage_dist.progress import log
from mirage_dist.schema import RunError
from mirage_dist.train.caches import flat
from mirage_dist.train.caches.flat import Flat

INDEX, INDEX_FORMAT = "index.safetensors", 2  # the format is raised when the index says something else of a part
INDEXED = 32 + 4  # bytes of a picture in the index: its digest, and the number of its part
KEY = re.compile(r"([0-9a-f]{64}|blank)/(features|inputs|shapes)/.+")  # of a tensor in a part
NAME = re.compile(r"part-[0-9a-f]{16}\.safetensors")  # of a part that `write` has written
CHECKS = "checks"  # in a part's metadata: digest -> checksum, as JSON
BLANK = "blank"  # the placeholder picture of a batch without pictures


# ------------------------------------------------------------------------------------------------------- reading


class Index:
    """Which part holds the features of a picture.

    states: size and time of modification of each part, by name. parts: their names, by number.
    """

    def __init__(self, file: Flat) -> None:
        """Raises ValueError, LookupError or TypeError for an index of another format."""
        self.file = file
        content = json.loads(file.text)
        if content["format"] != INDEX_FORMAT:
            raise ValueError(f"format {content['format']}")
        self.states: dict[str, list[int]] = {name: state for name, *state in content["parts"]}
        self.parts = list(self.states)
        self._digests = file.mapped("digests").view("S32").reshape(-1)

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Those of these pictures that no part holds."""
        wanted = _binary(digests)
        places = np.minimum(np.searchsorted(self._digests, wanted), max(0, len(self._digests) - 1))
        held = self._digests[places] == wanted if len(self._digests) else np.zeros(len(wanted), bool)
        return [digest for digest, own in zip(digests, held, strict=True) if not own]

    def part(self, digest: str) -> str:
        """The name of the part that holds a picture. Raises RunError when the index is damaged."""
        [wanted] = _binary([digest])
        place = int(np.searchsorted(self._digests, wanted))
        if place < len(self._digests) and self.file.read("digests", place, place + 1).view("S32")[0, 0] == wanted:
            return self.parts[int(self.file.read("parts", place, place + 1)[0])]
        raise RunError(f"{self.file.file}: lacks picture {digest}; remove this file and start again: it is made anew")


def _binary(digests: Sequence[str]) -> np.ndarray:
    """SHA-256 in hexadecimal, in 32 bytes each; the placeholder's are zeros."""
    text = "".join("0" * 64 if digest == BLANK else digest for digest in digests)
    return np.frombuffer(bytes.fromhex(text), "S32")


class _Part:
    """An opened part. checks: None in a part of an earlier version.

    Raises SafetensorError, OSError, ValueError or LookupError when it is damaged.
    """

    def __init__(self, file: Path) -> None:
        self._file: Any = safe_open(file, framework="pt")
        self.pictures: dict[str, list[str]] = {}  # digest -> names of its tensors
        for key in self._file.keys():  # noqa: SIM118  (safe_open is no mapping)
            self.pictures.setdefault(key.partition("/")[0], []).append(key)
        checks = (self._file.metadata() or {}).get(CHECKS)
        self.checks: dict[str, int] | None = None if checks is None else json.loads(checks)
        if not isinstance(self.checks, dict | None):
            raise ValueError("its metadata hold no checksums by picture")

    def tensors(self, digest: str) -> dict[str, Tensor]:
        """One picture's tensors by name, once they have their checksum."""
        tensors = {key: self._file.get_tensor(key) for key in self.pictures[digest]}
        if (self.checks or {}).get(digest) != _checksum(tensors):
            raise ValueError(f"picture {digest} does not have its checksum")
        return tensors


class Features:
    """Pictures as the model's inputs, memory-mapped from the parts that hold those that are needed."""

    def __init__(self, digests: Mapping[str, str], folder: Path, index: Index) -> None:
        """digests: path -> SHA-256 of the picture."""
        self._digests, self._folder, self._index = digests, folder, index
        self._parts: dict[str, _Part] = {}  # by name

    def __call__(self, paths: Sequence[str | None]) -> dict[str, Any]:
        """The model's inputs for these pictures; None is the placeholder. Raises RunError for a damaged part."""
        stored = [self._stored(BLANK if path is None else self._digests[path]) for path in paths]
        inputs = {name: vision.joint([one["inputs"][name] for one in stored]) for name in stored[0]["inputs"]}
        shapes = [{name: tuple(t.tolist()) for name, t in one["shapes"].items()} for one in stored]
        return {**inputs, **vision.replayed([one["features"] for one in stored], shapes)}

    def size(self, path: str) -> int:
        """Elements of the picture's features."""
        return sum(tensor.numel() for tensor in self._stored(self._digests[path])["features"].values())

    def _stored(self, digest: str) -> dict[str, dict[str, Tensor]]:
        name = self._index.part(digest)
        kinds: dict[str, dict[str, Tensor]] = {"features": {}, "inputs": {}, "shapes": {}}
        try:
            if name not in self._parts:
                self._parts[name] = _Part(self._folder / name)
            for key, tensor in self._parts[name].tensors(digest).items():
                _, kind, own = key.split("/", 2)
                kinds[kind][own] = tensor
        except (SafetensorError, OSError, LookupError, ValueError) as error:
            raise RunError(
                f"{self._folder / name}: damaged since it was written ({error}); remove this file and start again, or "
                "start with data.verify=true, which finds every such file: its pictures are computed again"
            ) from error
        return kinds


# ------------------------------------------------------------------------------------------------------- parts


def parts(folder: Path) -> list[Path]:
    """Whatever has the name of a part, in order."""
    return sorted(folder.glob("part-*.safetensors"))


def write(stored: Mapping[str, Tensor], folder: Path, workspace: Path) -> None:
    """Write a part. stored: the tensors of its pictures, by their names in it. Raises OSError."""
    pictures: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        pictures.setdefault(key.partition("/")[0], {})[key] = tensor
    checks = {digest: _checksum(tensors) for digest, tensors in pictures.items()}
    name = f"part-{disk.sha256_text(' '.join(sorted(pictures)))[:16]}.safetensors"
    disk.write(folder / name, serialize(dict(stored), {CHECKS: json.dumps(checks)}), workspace=workspace)


def damage(file: Path) -> str | None:
    """What is wrong with a part; None when it is whole or no longer there, and for a file of another name than ours."""
    if not NAME.fullmatch(file.name):
        return None
    try:
        part = _Part(file)
        if part.checks is None:
            return "it has no checksums"
        for digest in part.pictures:
            part.tensors(digest)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, LookupError) as error:
        return str(error)
    return None


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of one picture's tensors: their names, types, shapes and values."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


# ------------------------------------------------------------------------------------------------------- the index


def write_index(folder: Path, workspace: Path) -> None:
    """Make the index that of the parts in a folder. Only those are opened that it does not know by their states.

    Parts without checksums are removed.
    """
    present = _states(folder)
    known: dict[str, str] = {}
    old: dict[str, list[int]] = {}
    try:
        index = Index(Flat(folder / INDEX))
        old = index.states
        if old == present:
            return
        digests, numbers = (index.file.read(title, 0, len(index.file.mapped(title))) for title in ("digests", "parts"))
        names = [bytes(row).hex() if row.any() else BLANK for row in digests]
        held = ((name, index.parts[number]) for name, number in zip(names, numbers.tolist(), strict=True))
        known = {name: part for name, part in held if present.get(part) == old[part]}
    except (ValueError, LookupError, TypeError, RunError):  # damaged, of another format, or none yet
        old = {}
    known |= indexed(folder, {name for name in present if old.get(name) != present[name]}, workspace)
    present = _states(folder)
    ordered = sorted(known, key=lambda digest: bytes(32) if digest == BLANK else bytes.fromhex(digest))
    number_of = {name: number for number, name in enumerate(present)}
    arrays = {
        "digests": np.frombuffer(_binary(ordered).tobytes(), np.uint8).reshape(-1, 32),
        "parts": np.array([number_of[known[digest]] for digest in ordered], np.int32),
    }
    content = {"format": INDEX_FORMAT, "parts": [[name, *state] for name, state in present.items()]}
    flat.write(folder / INDEX, arrays, json.dumps(content), workspace)


def _states(folder: Path) -> dict[str, list[int]]:
    files = [(file.name, file.stat()) for file in parts(folder) if file.exists()]
    return {name: [status.st_size, status.st_mtime_ns] for name, status in files}


def indexed(folder: Path, names: Set[str] | None = None, workspace: Path | None = None) -> dict[str, str]:
    """SHA-256 of each picture -> name of the part that holds its features, of all parts or those of these names.

    A damaged part is reported and left out. So are parts without checksums; with a workspace they are also removed.
    """
    index: dict[str, str] = {}
    unchecked: list[Path] = []
    for file in parts(folder):
        if names is not None and file.name not in names:
            continue
        try:
            part = _Part(file)
        except (SafetensorError, OSError, ValueError) as error:
            log.warning(f"{file}: damaged ({error}), its pictures are computed again")
            continue
        keys = [KEY.fullmatch(key) for own in part.pictures.values() for key in own]
        whole = {match[1] for match in keys if match and match[2] == "features"}
        if not whole or not all(keys):
            log.warning(f"{file}: holds no features of pictures, passed over")
        elif part.checks is None:
            unchecked.append(file)
        else:
            index.update(dict.fromkeys(whole, file.name))
    if unchecked:
        log.warning(
            f"{folder}: {len(unchecked)} parts of an earlier version have no checksums, so that damage in them would "
            "not be noticed; their pictures are computed again"
        )
    for file in unchecked if workspace is not None else ():
        disk.remove(file, workspace)
    return index
