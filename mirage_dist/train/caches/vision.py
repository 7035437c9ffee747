"""What the frozen vision tower makes of the run's pictures, computed once.

    vision/KEY/part-0123456789abcdef.safetensors
    vision/KEY/index.safetensors                   which part holds a picture

KEY is the hash of everything but the picture that decides it. `caches.vision_files` says what the files hold. A picture
that several samples or folders share is stored once, and a changed picture is missing. A damaged part is computed
again: at a start one that cannot be opened (cut off, another header), and with `data.verify` one whose content has
changed. Pictures go through the tower one by one, so that a run that was stopped computes the missing ones with bitwise
the same results on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mirage_dist import disk, ranks, signals
from mirage_dist.model import environment, vision
from mirage_dist.model.policy import Request, differ_by, no_grad_forward
from mirage_dist.progress import EVERY_RANK, Progress, log
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.train.caches import flat
from mirage_dist.train.caches import vision_files as files
from mirage_dist.train.caches.vision_files import BLANK, INDEX, Features, Index
from mirage_dist.train.caches.vision_files import INDEXED as INDEXED
from mirage_dist.train.context import Run
from mirage_dist.train.feed import Feed

FORMAT = 2
# Pictures in one file, 1.2 MB each for LLaVA-1.5 in bf16: an eighth of a rank's, which a stop may lose, within these.
PART, LARGEST_PART = 64, 512
COMPARED = 64  # pictures of which two are compared with the live ones


def fill(run: Run) -> Features:
    """The features of every picture of the run; each rank computes its share of the missing ones.

    Every rank calls this. Raises StopRequested between two parts, and ConfigError for a model that does not compute
    with them what it computes with the pictures. With a table, the pictures of held-out samples are among them.
    """
    feed, group = run.feed, run.group
    folder = run.root / "vision" / key(run.recipe, run.engine.module.base.config, feed, run.manifest["base_hash"])
    if run.recipe.data.verify:
        _remove_changed(run, folder)
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
                files.write(stored, folder, run.lease.workspace)
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


def _remove_changed(run: Run, folder: Path) -> None:
    """Remove the parts whose content is no longer what was written; the ranks share the reading of all of them."""
    group = run.group
    names = ranks.from_main(group, [file.name for file in files.parts(folder)] if group.main else [])
    changed: list[str] = []
    task = f"{run.root.name}: check of the vision features"
    with signals.at_stop_points(), Progress(len(names), task, "part") as progress:
        for first in range(0, len(names), group.size):
            for name in names[first : first + group.size][group.rank : group.rank + 1]:
                if (fault := files.damage(folder / name)) is not None:
                    what = f"{folder / name}: damaged ({fault}), its pictures are computed again"
                    log.warning(what, extra=EVERY_RANK)
                    changed.append(name)
            progress.update(min(group.size, len(names) - first))
            ranks.stop_here(group, f"vision features from part {first} are compared")
    damaged = [name for own in ranks.everyones(group, changed) for name in own]
    for name in damaged if group.main else ():
        disk.remove(folder / name, run.lease.workspace)


def _indexed(run: Run, folder: Path) -> Index:
    """The index of the parts that exist now; every rank calls this. Rank 0 writes it anew where parts came or went."""
    if run.group.main:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_index(folder, run.lease.workspace)
    ranks.barrier(run.group, "index of the vision features")
    if (file := flat.opened(folder / INDEX, run.group)) is None:
        if run.group.main:
            disk.remove(folder / INDEX, run.lease.workspace)
            files.write_index(folder, run.lease.workspace)
        ranks.barrier(run.group, "index of the vision features is made again")
        file = flat.opened(folder / INDEX, run.group)
    if file is None:
        raise RunError(f"{folder / INDEX}: cannot be read back; see the warnings above, and check this disk")
    return Index(file)
