"""What the frozen vision tower makes of the run's pictures, computed once.

    vision/KEY/part-0123456789abcdef.safetensors
    vision/KEY/index.safetensors                   which part holds a picture

KEY is the hash of everything but the picture that decides it. A part holds some pictures, each under the SHA-256 of its
file: `DIGEST/features/CONNECTOR` (see `model.vision`), `DIGEST/inputs/NAME`, the model's other inputs for the picture,
and `DIGEST/shapes/NAME`, the shapes of those that its tower would read. A picture that several samples or folders share
is stored once, and a changed picture is missing. A part exists whole or not at all, and a damaged part is computed
again. Pictures go through the tower one by one, so that a run that was stopped computes the missing ones with bitwise
the same results on any number of ranks.

The index is a flat file (see `caches.flat`) of the pictures' digests in their order, and the number of the part of
each; every rank maps it, and opens only the parts that its batches need. The parts themselves stay as they are: their
features are most of what a run stores (a million pictures of LLaVA-1.5 are 1.2 TB), and merging would write them twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from torch.utils._pytree import tree_map

from mirage_dist import disk, ranks, signals
from mirage_dist.model import environment, vision
from mirage_dist.model.policy import Request, differ_by, no_grad_forward
from mirage_dist.progress import Progress, log
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.train.caches import flat
from mirage_dist.train.caches.flat import Flat
from mirage_dist.train.context import Run
from mirage_dist.train.feed import Feed

FORMAT = 2
INDEX = "index.safetensors"
INDEXED = 32 + 4  # bytes of a picture in the index: its digest, and the number of its part
KEY = re.compile(r"([0-9a-f]{64}|blank)/(features|inputs|shapes)/.+")  # of a tensor in a part
# Pictures in one file, 1.2 MB each for LLaVA-1.5 in bf16: an eighth of a rank's, which a stop may lose, within these.
PART, LARGEST_PART = 64, 512
BLANK = "blank"  # the placeholder picture of a batch without pictures
COMPARED = 64  # pictures of which two are compared with the live ones


class Index:
    """Which part holds the features of a picture. parts: names of the files, by number."""

    def __init__(self, file: Flat) -> None:
        self.file = file
        self.parts: list[str] = [name for name, *_ in json.loads(file.text)]
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


class Features:
    """Pictures as the model's inputs, memory-mapped from the parts that hold those that are needed."""

    def __init__(self, digests: Mapping[str, str], folder: Path, index: Index) -> None:
        """digests: path -> SHA-256 of the picture."""
        self._digests, self._folder, self._index = digests, folder, index
        self._files: dict[str, Any] = {}  # by name
        self._names: dict[str, dict[str, list[tuple[str, str]]]] = {}  # part -> picture -> kinds and names

    def __call__(self, paths: Sequence[str | None]) -> dict[str, Any]:
        """The model's inputs for these pictures; None is the placeholder."""
        stored = [self._stored(BLANK if path is None else self._digests[path]) for path in paths]
        inputs = {name: vision.joint([one["inputs"][name] for one in stored]) for name in stored[0]["inputs"]}
        shapes = [{name: tuple(t.tolist()) for name, t in one["shapes"].items()} for one in stored]
        return {**inputs, **vision.replayed([one["features"] for one in stored], shapes)}

    def size(self, path: str) -> int:
        """Elements of the picture's features."""
        return sum(tensor.numel() for tensor in self._stored(self._digests[path])["features"].values())

    def _stored(self, digest: str) -> dict[str, dict[str, Tensor]]:
        part = self._index.part(digest)
        kinds: dict[str, dict[str, Tensor]] = {"features": {}, "inputs": {}, "shapes": {}}
        try:
            if part not in self._files:
                self._open(part)
            for kind, name in self._names[part][digest]:
                kinds[kind][name] = self._files[part].get_tensor(f"{digest}/{kind}/{name}")
        except (SafetensorError, OSError, LookupError) as error:
            raise RunError(
                f"{self._folder / part}: damaged since the run began ({error}); remove this file and start again: its "
                "pictures are computed again"
            ) from error
        return kinds

    def _open(self, part: str) -> None:
        self._files[part] = file = safe_open(self._folder / part, framework="pt")
        names: dict[str, list[tuple[str, str]]] = {}
        for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            digest, kind, name = key.split("/", 2)
            names.setdefault(digest, []).append((kind, name))
        self._names[part] = names


def fill(run: Run) -> Features:
    """The features of every picture of the run; each rank computes its share of the missing ones.

    Every rank calls this. Raises StopRequested between two parts, and ConfigError for a model that does not compute
    with them what it computes with the pictures.
    """
    feed, group = run.feed, run.group
    folder = run.root / "vision" / key(run.recipe, run.engine.module.base.config, feed, run.manifest["base_hash"])
    digests = feed.picture_digests(tuple(feed.samples), group)
    index = _indexed(run, folder)
    missing = sorted(index.missing([BLANK, *sorted(set(digests.values()))]))
    if missing:
        path_of = {digest: path for path, digest in digests.items()}
        with signals.at_stop_points():
            _compute(run, [(digest, path_of.get(digest)) for digest in missing], folder)
        index = _indexed(run, folder)
    features = Features(digests, folder, index)
    if missing:
        _compare(run, features)
    return features


def key(recipe: TrainRecipe, model_config: Any, feed: Feed, base_hash: str) -> str:
    """Hash of what decides the features of a picture besides the picture: the tower and its weights, the transform,
    and the classes and libraries that compute with them.
    """
    processor = feed.encoder.processor
    decided_by = {
        "format": FORMAT,
        "base": base_hash,
        "dtype": recipe.train.dtype,
        "aspect": feed.encoder.image_aspect,
        "transform": processor.image_processor.to_dict(),
        "model": model_config.to_dict(),
        "environment": asdict(environment.of(processor)),
    }
    return disk.digest(decided_by, default=str)[:16]


Picture = tuple[str, str | None]  # digest, path; no path for the placeholder


def _compute(run: Run, missing: list[Picture], folder: Path) -> None:
    feed, group = run.feed, run.group
    size = max(PART, min(LARGEST_PART, len(missing) // (8 * group.size)))
    parts = [missing[start : start + size] for start in range(0, len(missing), size)]
    connectors = tuple(_forward(run, feed.encoder.picture(None), ()))
    if not connectors:
        kind = run.engine.module.base.config.model_type
        raise ConfigError(f"data.cache_vision: nothing in {kind} connects its tower to its decoder; take it out")
    with Progress(len(missing), f"{run.root.name}: vision features", "picture") as progress:
        for first in range(0, len(parts), group.size):
            turn = parts[first : first + group.size]
            busy = group.rank < len(turn)
            own = turn[group.rank if busy else 0]
            # Under ZeRO-3 every rank makes each forward: as many as the turn's first part, which is never the smaller.
            forwards = [own[i % len(own)] for i in range(len(turn[0]))]
            stored: dict[str, Tensor] = {}
            with ThreadPoolExecutor(1) as pool:  # one thread, since the tokenizer does not serve several
                read = pool.map(lambda picture: feed.encoder.picture(picture[1]), forwards)
                for (digest, _), inputs in zip(forwards, read, strict=True):
                    stored.update(_stored(digest, inputs, _forward(run, inputs, connectors)))
            if busy:
                _write(stored, folder, run.lease.workspace)
            progress.update(sum(map(len, turn)))
            ranks.stop_here(group, f"vision features from part {first} are written")


def _forward(run: Run, inputs: Mapping[str, Tensor], connectors: tuple[str, ...]) -> dict[str, Tensor]:
    placed = {name: tensor.to(run.group.device) for name, tensor in inputs.items()}
    out = no_grad_forward(run.engine, placed, Request(vision=connectors)).vision
    assert out is not None
    return out


def _stored(digest: str, inputs: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One picture's tensors, named as in a part."""
    kinds: dict[str, dict[str, Tensor]] = {
        "features": {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in features.items()},
        "inputs": {name: tensor for name, tensor in inputs.items() if not vision.is_pixels(name)},
        "shapes": {name: torch.tensor(tensor.shape) for name, tensor in inputs.items() if vision.is_pixels(name)},
    }
    return {f"{digest}/{kind}/{name}": tensor for kind, of in kinds.items() for name, tensor in of.items()}


def _compare(run: Run, features: Features) -> None:
    """Raise ConfigError unless a batch of two pictures gives the decoder with these features what it gives live.

    The pictures have different sizes, if any two of the first have.
    """
    feed, encoder, module = run.feed, run.feed.encoder, run.engine.module
    shown = {s.image: s for samples in feed.samples.values() for s in samples if s.image is not None}
    if not shown:
        return
    sizes = {path: features.size(path) for path in list(shown)[:COMPARED]}
    chosen = [shown[min(sizes, key=lambda path: sizes[path])], shown[max(sizes, key=lambda path: sizes[path])]]
    kind = module.base.config.model_type
    live = encoder.encode(chosen).inputs
    with encoder.recalling(features):
        replayed = encoder.encode(chosen).inputs
    other = [n for n, t in live.items() if not vision.is_pixels(n) and not _equal(t, replayed.get(n))]
    if other:
        raise ConfigError(
            f"data.cache_vision: the processor of {kind} writes {', '.join(other)} of pictures in one batch in another "
            "way than one by one; take data.cache_vision out"
        )
    placed = [_placed(inputs, run.group.device) for inputs in (live, replayed)]
    if not (difference := differ_by(run.engine, module.depth, *placed)) <= vision.tolerance(module.base.dtype):
        raise ConfigError(
            f"data.cache_vision: with features in place of pictures {kind} computes something else (hidden states "
            f"differ by {difference:.1e} of their size); take data.cache_vision out"
        )


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def _placed(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, dict(inputs))


def _write(stored: Mapping[str, Tensor], folder: Path, workspace: Path) -> None:
    name = f"part-{disk.sha256_text(' '.join(sorted({key.split('/')[0] for key in stored})))[:16]}.safetensors"
    disk.write(folder / name, serialize(dict(stored)), workspace=workspace)


def _indexed(run: Run, folder: Path) -> Index:
    """The index of the parts that exist now; every rank calls this. Rank 0 writes it anew where parts came or went."""
    if run.group.main:
        folder.mkdir(parents=True, exist_ok=True)
        _write_index(folder, run.lease.workspace)
    ranks.barrier(run.group, "index of the vision features")
    if (file := flat.opened(folder / INDEX, run.group)) is None:
        if run.group.main:
            disk.remove(folder / INDEX, run.lease.workspace)
            _write_index(folder, run.lease.workspace)
        ranks.barrier(run.group, "index of the vision features is made again")
        file = flat.opened(folder / INDEX, run.group)
    if file is None:
        raise RunError(f"{folder / INDEX}: cannot be read back; see the warnings above, and check this disk")
    return Index(file)


def _write_index(folder: Path, workspace: Path) -> None:
    """Make the index that of the parts in a folder. Only those are opened that it does not know by their states."""
    states = [(file.name, file.stat()) for file in _parts(folder) if file.exists()]
    present = {name: [status.st_size, status.st_mtime_ns] for name, status in states}
    known: dict[str, str] = {}
    old: dict[str, list[int]] = {}
    try:
        index = Index(Flat(folder / INDEX))
        old = {name: state for name, *state in json.loads(index.file.text)}
        if old == present:
            return
        digests, parts = (index.file.read(title, 0, len(index.file.mapped(title))) for title in ("digests", "parts"))
        names = [bytes(row).hex() if row.any() else BLANK for row in digests]
        held = ((name, index.parts[part]) for name, part in zip(names, parts.tolist(), strict=True))
        known = {name: part for name, part in held if present.get(part) == old[part]}
    except (ValueError, LookupError, TypeError, RunError):  # damaged, or none yet
        old = {}
    known |= indexed(folder, {name for name in present if old.get(name) != present[name]})
    ordered = sorted(known, key=lambda digest: bytes(32) if digest == BLANK else bytes.fromhex(digest))
    numbers = {name: number for number, name in enumerate(present)}
    arrays = {
        "digests": np.frombuffer(_binary(ordered).tobytes(), np.uint8).reshape(-1, 32),
        "parts": np.array([numbers[known[digest]] for digest in ordered], np.int32),
    }
    flat.write(folder / INDEX, arrays, json.dumps([[name, *state] for name, state in present.items()]), workspace)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.safetensors"))


def indexed(folder: Path, names: Set[str] | None = None) -> dict[str, str]:
    """SHA-256 of each picture -> name of the part that holds its features, of all parts or those of these names.

    A damaged part is reported and left out.
    """
    index: dict[str, str] = {}
    for file in _parts(folder):
        if names is not None and file.name not in names:
            continue
        try:
            with safe_open(file, framework="pt") as part:
                keys = [KEY.fullmatch(key) for key in part.keys()]  # noqa: SIM118
            whole = {match[1] for match in keys if match and match[2] == "features"}
            if not whole or not all(keys):
                log.warning(f"{file}: holds no features of pictures, passed over")
                continue
            index.update(dict.fromkeys(whole, file.name))
        except (SafetensorError, OSError) as error:
            log.warning(f"{file}: damaged ({error}), its pictures are computed again")
    return index
