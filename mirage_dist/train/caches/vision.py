"""Features of the run's pictures, computed once by the frozen vision tower.

    vision/KEY/part-0123456789abcdef.safetensors

KEY is the hash of everything but the picture that decides a picture's features. A part holds the features of some
pictures, each under the SHA-256 of its file: a picture that several samples or folders share is stored once, and a
changed picture is missing. A part exists whole or not at all, and a damaged part is computed again. A run that was
stopped computes the missing pictures, cut into the same batches, so that it gets bitwise the same features on any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from mirage_dist import disk, ranks
from mirage_dist.data import pictures
from mirage_dist.model import environment
from mirage_dist.model.policy import Request, no_grad_forward
from mirage_dist.model.vision import FEATURES
from mirage_dist.progress import Progress, log
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.context import Run
from mirage_dist.train.feed import Feed

FORMAT = 1
WIDTH = 8  # pictures in one forward; constant, since a picture's features differ in their last bits by its batch
PART = 64  # pictures in one file: 76 MB for LLaVA-1.5 in bf16
BLANK = "blank"  # the placeholder picture of a batch without pictures


class Features:
    """Features by picture, memory-mapped from the parts: (I, P, F) for I pictures of P patches, F features each."""

    def __init__(self, digests: Mapping[str, str], folder: Path, index: Mapping[str, str]) -> None:
        """digests: path -> SHA-256 of the picture. index: SHA-256 -> name of the part that holds the picture."""
        self._digests = digests
        self._files = {name: safe_open(folder / name, framework="pt") for name in set(index.values())}
        self._parts = {digest: self._files[name] for digest, name in index.items()}

    def __call__(self, paths: Sequence[str | None]) -> dict[str, Tensor]:
        """The model's input for these pictures; None is the placeholder."""
        digests = [BLANK if path is None else self._digests[path] for path in paths]
        return {FEATURES: torch.stack([self._parts[digest].get_tensor(digest) for digest in digests])}


def fill(run: Run) -> Features:
    """The features of every picture of the run; each rank computes its share of the missing ones.

    Every rank calls this. Raises StopRequested between two parts, and ConfigError for a picture that the processor
    gives another size than the blank one.
    """
    feed, group = run.feed, run.group
    folder = run.root / "vision" / key(run.recipe, run.engine.module.base.config, feed, run.manifest["base_hash"])
    paths = (s.image for samples in feed.samples.values() for s in samples)
    digests = pictures.digests(paths, group.rank, group.size, lambda own: ranks.everyones(group, own), feed.pictures)
    index = ranks.from_main(group, _index(folder) if group.main else {})
    missing = sorted({BLANK, *digests.values()} - set(index))
    if missing:
        if group.main:
            folder.mkdir(parents=True, exist_ok=True)
        ranks.barrier(group, "vision features")
        path_of = {digest: path for path, digest in digests.items()}
        _compute(run, [(digest, path_of.get(digest)) for digest in missing], folder)
        index = ranks.from_main(group, _index(folder) if group.main else {})
    return Features(digests, folder, index)


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
        "tower": model_config.vision_config.to_dict(),
        "layer": model_config.vision_feature_layer,
        "strategy": model_config.vision_feature_select_strategy,
        "environment": asdict(environment.of(processor)),
    }
    return disk.digest(decided_by, default=str)[:16]


Picture = tuple[str, str | None]  # digest, path; no path for the placeholder


def _compute(run: Run, missing: list[Picture], folder: Path) -> None:
    feed, group = run.feed, run.group
    parts = _cut(missing, PART)
    with Progress(len(missing), f"{run.root.name}: vision features", "picture") as progress:
        for first in range(0, len(parts), group.size):
            turn = parts[first : first + group.size]
            busy = group.rank < len(turn)
            batches = _cut(turn[group.rank if busy else 0], WIDTH)
            # Under ZeRO-3 every rank makes each forward: as many as the turn's first part, which is never the smaller.
            forwards = [batches[i % len(batches)] for i in range(len(_cut(turn[0], WIDTH)))]
            features: dict[str, Tensor] = {}
            with ThreadPoolExecutor(1) as pool:  # one thread, since the tokenizer does not serve several
                for batch, pixels in zip(forwards, pool.map(lambda b: _pixels(feed, b), forwards), strict=True):
                    features.update(_forward(run, batch, pixels))
            if busy:
                _write(features, folder, run.lease.workspace)
            progress.update(sum(map(len, turn)))
            ranks.stop_here(group, f"vision features from part {first} are written")


def _cut(items: Sequence[Picture], size: int) -> list[list[Picture]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _pixels(feed: Feed, batch: Sequence[Picture]) -> Tensor:
    encoder = feed.encoder
    blank = encoder.placeholder_picture["pixel_values"]
    rows = [blank if path is None else encoder.pixels(path) for _, path in batch]
    if any(row.shape != blank.shape for row in rows):
        raise ConfigError(
            "data.cache_vision: the processor gives pictures different sizes; remove data.cache_vision from the recipe"
        )
    return torch.cat(rows)


def _forward(run: Run, batch: Sequence[Picture], pixels: Tensor) -> dict[str, Tensor]:
    out = no_grad_forward(run.engine, {"pixel_values": pixels.to(run.group.device)}, Request(vision=True))
    feed = run.feed
    assert out.vision_IPF is not None
    if out.vision_IPF.shape[1] != len(feed.encoder.placeholder["input_ids"]):
        raise ConfigError(
            f"data.cache_vision: the model gives {out.vision_IPF.shape[1]} features for a picture that the processor "
            f"writes as {len(feed.encoder.placeholder['input_ids'])} tokens; model and processor do not belong together"
        )
    return dict(zip((digest for digest, _ in batch), out.vision_IPF.cpu(), strict=True))


def _write(features: Mapping[str, Tensor], folder: Path, workspace: Path) -> None:
    name = f"part-{disk.sha256_text(' '.join(sorted(features)))[:16]}.safetensors"
    content = serialize({digest: tensor.contiguous() for digest, tensor in features.items()})
    disk.write(folder / name, content, workspace=workspace)


def _index(folder: Path) -> dict[str, str]:
    """SHA-256 of each picture -> name of the part that holds its features. A damaged part is reported and left out."""
    index: dict[str, str] = {}
    for file in sorted(folder.glob("part-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as part:
                index.update(dict.fromkeys(part.keys(), file.name))
        except (SafetensorError, OSError) as error:
            log.warning(f"{file}: damaged ({error}), its pictures are computed again")
    return index
