"""What the frozen vision tower makes of the run's pictures, computed once.

    vision/KEY/part-0123456789abcdef.safetensors

KEY is the hash of everything but the picture that decides it. A part holds some pictures, each under the SHA-256 of its
file: `DIGEST/features/CONNECTOR` (see `model.vision`), `DIGEST/inputs/NAME`, the model's other inputs for the picture,
and `DIGEST/shapes/NAME`, the shapes of those that its tower would read. A picture that several samples or folders share
is stored once, and a changed picture is missing. A part exists whole or not at all, and a damaged part is computed
again. Pictures go through the tower one by one, so that a run that was stopped computes the missing ones with bitwise
the same results on any number of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from torch.utils._pytree import tree_map

from mirage_dist import disk, ranks, signals
from mirage_dist.model import environment, vision
from mirage_dist.model.policy import Request, differ_by, no_grad_forward
from mirage_dist.progress import Progress, log
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.context import Run
from mirage_dist.train.feed import Feed

FORMAT = 2
KEY = re.compile(r"([0-9a-f]{64}|blank)/(features|inputs|shapes)/.+")  # of a tensor in a part
PART = 64  # pictures in one file: 76 MB for LLaVA-1.5 in bf16
BLANK = "blank"  # the placeholder picture of a batch without pictures
COMPARED = 64  # pictures of which two are compared with the live ones


class Features:
    """Pictures as the model's inputs, memory-mapped from the parts."""

    def __init__(self, digests: Mapping[str, str], folder: Path, index: Mapping[str, str]) -> None:
        """digests: path -> SHA-256 of the picture. index: SHA-256 -> name of the part that holds the picture."""
        self._digests = digests
        self._files = {name: safe_open(folder / name, framework="pt") for name in set(index.values())}
        self._parts = {digest: self._files[name] for digest, name in index.items()}
        self._names: dict[str, list[tuple[str, str]]] = {}
        for part, file in self._files.items():
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                digest, kind, name = key.split("/", 2)
                if index.get(digest) == part:
                    self._names.setdefault(digest, []).append((kind, name))

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
        kinds: dict[str, dict[str, Tensor]] = {"features": {}, "inputs": {}, "shapes": {}}
        for kind, name in self._names[digest]:
            kinds[kind][name] = self._parts[digest].get_tensor(f"{digest}/{kind}/{name}")
        return kinds


def fill(run: Run) -> Features:
    """The features of every picture of the run; each rank computes its share of the missing ones.

    Every rank calls this. Raises StopRequested between two parts, and ConfigError for a model that does not compute
    with them what it computes with the pictures.
    """
    feed, group = run.feed, run.group
    folder = run.root / "vision" / key(run.recipe, run.engine.module.base.config, feed, run.manifest["base_hash"])
    digests = feed.picture_digests(tuple(feed.samples), group)
    index = ranks.from_main(group, indexed(folder) if group.main else {})
    missing = sorted({BLANK, *digests.values()} - set(index))
    if missing:
        if group.main:
            folder.mkdir(parents=True, exist_ok=True)
        ranks.barrier(group, "vision features")
        path_of = {digest: path for path, digest in digests.items()}
        with signals.at_stop_points():
            _compute(run, [(digest, path_of.get(digest)) for digest in missing], folder)
        index = ranks.from_main(group, indexed(folder) if group.main else {})
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
    parts = [missing[start : start + PART] for start in range(0, len(missing), PART)]
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


def indexed(folder: Path) -> dict[str, str]:
    """SHA-256 of each picture -> name of the part that holds its features. A damaged part is reported and left out."""
    index: dict[str, str] = {}
    for file in sorted(folder.glob("part-*.safetensors")):
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
