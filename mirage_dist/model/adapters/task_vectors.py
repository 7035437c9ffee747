"""Arithmetic over whole models: base + Σ scale · (tuned − base), tensor by tensor, without a GPU and without a model.

The difference of a tuned model and its base is a task vector (Ilharco et al., 2023, "Editing models with task
arithmetic", section 2): with a negative scale the model forgets the task, with several vectors it learns several.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_dist import config as configs
from mirage_dist import disk
from mirage_dist.model import directory
from mirage_dist.model.directory import Header
from mirage_dist.model.families import configs as families
from mirage_dist.model.weights import WEIGHTS
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.schema.limits import MAGNITUDE
from mirage_dist.schema.texts import fill

PROVENANCE = "merge.yaml"  # no name that `directory.files` counts: it decides nothing
BLOCK = 1 << 22  # elements that are computed at a time, in float64
# Of a configuration, what may differ between a model and one that was tuned from it.
OF_A_FILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
BASE_HASH = re.compile(r"^base_model_hash: '?([0-9a-f]{64})'?$", re.MULTILINE)  # in the card of an export
CARD = """---
library_name: transformers
base_model: {base}
base_model_hash: {hash}
---
# {name}

`{base}` plus {parts}, made by mirage_dist (`mirage merge`); {provenance} has the hash of every part.
Attack success and rejection rates belong beside this model; a low rate is behaviour, not proof of erasure.
"""


@dataclass(frozen=True)
class Vector:
    """A tuned model, and the factor of its difference from the base."""

    path: str
    scale: float


@dataclass(frozen=True)
class Part:
    """One model that a merge was made of; scale: of its difference from the base, None for the base itself.

    sha256: see `directory.model_hash`. base_sha256: of the base that its own card names, None where it names none.
    """

    path: str
    sha256: str
    scale: float | None
    base_sha256: str | None


@dataclass(frozen=True)
class Provenance:
    """merge.yaml."""

    formula: str
    base: Part
    vectors: list[Part]


def merge(base: str, vectors: Sequence[Vector], out: Path) -> None:
    """Write base + Σ scale · (tuned − base) to `out`, an ordinary model directory, whole or not at all.

    Each tensor is computed in float64, a block at a time, and rounded once to the tuned models' dtype: with one vector
    of scale 1 the result has the tuned model's values. Configurations and the processor's files are copies of the
    first tuned model's; `merge.yaml` has the parts and their hashes.

    Raises ConfigError for a directory that holds no model, a scale that is no number, a model that is given twice, one
    of another base, architecture, or with tensors of other names, shapes or dtypes, weights that are not finite, and an
    `out` that exists; RunError when files change meanwhile, or the sum leaves the dtype's range.
    """
    _check_vectors(vectors)
    first, *others = folders = [directory.check(one.path) for one in vectors]
    start = directory.check(base)
    states = {folder: directory.state(folder) for folder in (start, *folders)}
    headers = {folder: directory.headers(folder) for folder in states}
    for one, folder in zip(vectors, folders, strict=True):
        _check_architecture(base, start, one.path, folder)
        _check_tensors(base, headers[start], one.path, headers[folder])
    for folder in others:
        _check_dtypes(first, headers[first], folder, headers[folder])
    provenance = _provenance(base, start, vectors, folders)
    _warn_of_processors(start, folders)
    with disk.folder(out) as partial:
        tensors = _Sums(
            start, headers[start], [(f, headers[f], v.scale) for f, v in zip(folders, vectors, strict=True)]
        )
        for file in directory.weight_files(first):
            tensors.write(file, partial / file.name)
        if (first / directory.INDEX).exists():
            shutil.copyfile(first / directory.INDEX, partial / directory.INDEX)
        for name in ("config.json", families.GENERATION):
            if (first / name).exists():
                shutil.copyfile(first / name, partial / name)
        directory.copy_processing(first, partial)
        (partial / PROVENANCE).write_text(configs.to_yaml(provenance))
        parts = " and ".join(f"{one.scale:g} · (`{one.path}` − `{base}`)" for one in vectors)
        facts = {"base": base, "hash": provenance.base.sha256, "name": out.name, "parts": parts}
        (partial / "README.md").write_text(fill(CARD, **facts, provenance=PROVENANCE))
        for folder, state in states.items():
            if state != directory.state(folder):
                raise RunError(f"{folder}: the model's files changed while they were read; nothing was put at {out}")


def _check_vectors(vectors: Sequence[Vector]) -> None:
    if not vectors:
        raise ConfigError("merge: no tuned model; give one or more as DIR=SCALE")
    for one in vectors:
        if not abs(one.scale) <= MAGNITUDE.value:  # also no NaN
            raise ConfigError(
                f"{one.path}={one.scale}: expected a scale from −{MAGNITUDE.value:,} to {MAGNITUDE.value:,}"
            )
    places = [os.path.realpath(directory.resolve(one.path)) for one in vectors]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError(f"{vectors[number].path}: is given twice; give it once, with the sum of the scales")


# --------------------------------------------------------------------------------------------------- one kind of model


def _check_architecture(base: str, start: Path, name: str, folder: Path) -> None:
    """Raise ConfigError where the configurations differ in anything that decides what the weights mean."""
    own, other = (_plain(families.load(place).to_dict()) for place in (start, folder))
    if changed := configs.differences(own, other):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{name}: is no model tuned from {base}, since their config.json differ ({base} here, {name} there): "
            f"{'; '.join(changed[:3])}{more}"
        )


def _plain(content: Any) -> Any:
    """A configuration without what may differ between files of one model."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items() if key not in OF_A_FILE}
    return [_plain(value) for value in content] if isinstance(content, list | tuple) else content


def _check_tensors(base: str, own: Mapping[str, Header], name: str, other: Mapping[str, Header]) -> None:
    """Raise ConfigError unless the files have tensors of the same names and shapes, and of dtypes that can be added."""
    only = sorted(own.keys() ^ other.keys())
    if only:
        holder = base if only[0] in own else name
        raise ConfigError(
            f"{name}: its tensors are not those of {base}: {only[0]} ({len(only)} in all) is in {holder} alone; give "
            "the model that it was tuned from"
        )
    for tensor, header in own.items():
        theirs = other[tensor]
        if header.shape != theirs.shape:
            raise ConfigError(
                f"{name}: {tensor} has shape {theirs.shape} there and {header.shape} in {base}; give the model that it "
                "was tuned from"
            )
        if (header.dtype in WEIGHTS) != (theirs.dtype in WEIGHTS) or header.dtype.startswith("F8"):
            raise ConfigError(
                f"{theirs.file}: {tensor} is {theirs.dtype} there and {header.dtype} in {base}; only weights of "
                f"{', '.join(WEIGHTS)} can be added. Give unquantised models"
            )


def _check_dtypes(first: Path, own: Mapping[str, Header], folder: Path, other: Mapping[str, Header]) -> None:
    for tensor, header in own.items():
        if header.dtype != other[tensor].dtype:
            raise ConfigError(
                f"{folder}: {tensor} is {other[tensor].dtype} there and {header.dtype} in {first}; the result has one "
                "dtype, so export both with the same train.dtype"
            )


def _warn_of_processors(start: Path, folders: Sequence[Path]) -> None:
    digests = {folder: directory.processing_hash(folder) for folder in (start, *folders)}
    for folder in folders:
        if digests[folder] != digests[start]:
            log.warning(
                f"{folder}: its files of processor, tokenizer or chat template are not those of {start}; the result "
                f"has those of {folders[0]}"
            )


def _provenance(base: str, start: Path, vectors: Sequence[Vector], folders: Sequence[Path]) -> Provenance:
    """What the parts are. Raises ConfigError for a model whose card names another base than this one."""
    digest, parts = directory.model_hash(start), []
    for one, folder in zip(vectors, folders, strict=True):
        own = _card_base(folder)
        if own is not None and own != digest:
            raise ConfigError(
                f"{one.path}: was trained from another base than {base}: its README.md has base_model_hash "
                f"{own[:16]}…, and {base} has {digest[:16]}…; give the base that it names"
            )
        if own is None:
            log.warning(f"{one.path}: does not say which model it was tuned from; only its architecture was compared")
        parts.append(Part(one.path, directory.model_hash(folder), one.scale, own))
    return Provenance("base + Σ scale · (vector − base)", Part(base, digest, None, _card_base(start)), parts)


def _card_base(folder: Path) -> str | None:
    """The hash of the base model in an export's card; None where there is none."""
    try:
        match = BASE_HASH.search((folder / "README.md").read_text(errors="replace")[: 1 << 16])
    except OSError:
        return None
    return match[1] if match else None


# ------------------------------------------------------------------------------------------------------------- numbers


class _Sums:
    """The tensors of base + Σ scale · (tuned − base), read from the files as they are written."""

    def __init__(
        self, start: Path, own: Mapping[str, Header], vectors: Sequence[tuple[Path, Mapping[str, Header], float]]
    ) -> None:
        self.start, self.own, self.vectors = start, own, vectors

    def write(self, file: Path, out: Path) -> None:
        """Write the file of the first tuned model's shard `file`: its tensors, in its order and dtypes."""
        headers = {name: header for name, header in self.vectors[0][1].items() if header.file == file}
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # By falling size of an element, so that each tensor is aligned in the file.
        names = sorted(headers, key=lambda name: -directory.SIZES[headers[name].dtype])
        for name in names:
            header, begin = headers[name], end
            end += math.prod(header.shape) * directory.SIZES[header.dtype]
            entries[name] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        first = (len(text).to_bytes(8, "little"), text)
        disk.write(out, chain(first, chain.from_iterable(map(self._pieces, names))), workspace=out.parent)

    def _pieces(self, name: str) -> Iterator[memoryview | bytes]:
        """The bytes of one tensor, a block at a time."""
        base = _flat(self.own[name], name)
        tuned = [(_flat(headers[name], name), scale) for _, headers, scale in self.vectors]
        dtype = tuned[0][0].dtype
        if not dtype.is_floating_point:
            for (folder, headers, _), (values, _) in zip(self.vectors, tuned, strict=True):
                if not torch.equal(values, base):
                    raise ConfigError(f"{headers[name].file}: {name} has other values than in {self.start}; {folder}")
            yield _bytes(base)
            return
        for begin in range(0, len(base), BLOCK):
            part = slice(begin, begin + BLOCK)
            # The same sum by models, which at scale 1 is the tuned one also where a difference would be rounded.
            total = base[part].double() * (1 - math.fsum(scale for _, scale in tuned))
            for values, scale in tuned:
                total += scale * values[part].double()
            rounded = total.to(dtype)
            if not bool(torch.isfinite(rounded).all()):
                self._refuse(name, part, total)
            yield _bytes(rounded)

    def _refuse(self, name: str, part: slice, total: Tensor) -> None:
        for header in (self.own[name], *(headers[name] for _, headers, _ in self.vectors)):
            if not bool(torch.isfinite(_flat(header, name)[part]).all()):
                raise ConfigError(f"{header.file}: NaN or infinity in {name}; give another checkpoint")
        largest = float(total.abs().max())
        raise RunError(
            f"{name}: the sum reaches {largest:.3g}, which the models' dtype cannot hold; take smaller scales"
        )


def _flat(header: Header, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(header.file, framework="pt") as tensors:
        return tensors.get_tensor(name).reshape(-1)


def _bytes(values: Tensor) -> memoryview | bytes:
    return values.contiguous().view(torch.uint8).numpy().data if len(values) else b""
