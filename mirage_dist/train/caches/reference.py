"""Reference log-probabilities of whole streams, computed once by the policy while it still is the base model.

    reference/KEY/rank-00000-of-00002-width-16-part-003-of-010.npz

KEY is the hash of everything that decides the values. A part exists whole or not at all, and a damaged part is computed
again. A run that was stopped computes the missing parts, cut into the same batches, so that it gets bitwise the same
values. A complete set of parts serves any number of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from mirage_dist import disk, ranks, signals
from mirage_dist.model import environment, reference
from mirage_dist.model.adapters import quantization
from mirage_dist.model.policy import Request, no_grad_forward
from mirage_dist.model.reference import SampleKey
from mirage_dist.progress import EVERY_RANK, Progress, log
from mirage_dist.schema import RunError, TrainRecipe
from mirage_dist.train.context import Run
from mirage_dist.train.feed import Feed, MicroBatch

BATCHES_A_PART = 16
ATTEMPTS = 2  # at a set that can be read back; a disk that damages it again is at fault
PART = re.compile(r"rank-([0-9]{5})-of-([0-9]{5})-width-([0-9]{1,9})-part-([0-9]{3,9})-of-([0-9]{3,9})\.npz")


def fill(run: Run) -> reference.LogProbs:
    """The log-probabilities of every sample that needs them; each rank computes its share of the missing parts.

    Every rank calls this. Raises StopRequested between two parts, and RunError when parts are damaged again after they
    were computed again.
    """
    feed, group = run.feed, run.group
    samples = feed.stream_digests(feed.needs.ref_logp, group)
    folder = run.root / "reference" / key(run.recipe, feed, run.manifest["base_hash"], samples)
    needed = {(name, number) for name in feed.needs.ref_logp for number in range(len(feed.samples[name]))}
    for _ in range(ATTEMPTS):
        names = ranks.from_main(group, complete_set(folder) if group.main else None)
        if names is None:
            if group.main:
                folder.mkdir(parents=True, exist_ok=True)
            ranks.barrier(group, "reference cache")
            with signals.at_stop_points():
                names = _compute(run, folder)
        cache, damaged = _read(folder, names, needed)
        # Every rank reads every part, but a rank may see damage that the others do not: they drop the part together.
        damaged = sorted(set().union(*ranks.everyones(group, damaged)))
        if not damaged:
            return cache
        if group.main:
            for name in damaged:
                disk.remove(folder / name, run.lease.workspace)
        ranks.barrier(group, "damaged parts of the reference cache are removed")
    raise RunError(f"{folder}: parts are damaged again after they were computed again: {', '.join(damaged)}")


def _read(folder: Path, names: list[str], needed: Set[SampleKey]) -> tuple[reference.LogProbs, set[str]]:
    """The cache that these parts hold, and the names of those that cannot be read; all, when together they lack what is
    needed, as after one was copied over another.
    """
    cache, damaged = reference.LogProbs(), set[str]()
    for name in names:
        try:
            cache.load(folder / name)
        except ValueError as error:
            log.warning(f"{folder / name}: damaged ({error}), computed again", extra=EVERY_RANK)
            damaged.add(name)
    if not damaged and needed - cache.table.keys():
        log.warning(f"{folder}: its parts do not hold every sample, all are computed again", extra=EVERY_RANK)
        damaged.update(names)
    return cache, damaged


def _compute(run: Run, folder: Path) -> list[str]:
    """Compute the parts that are missing; returns the names of the complete set."""
    feed, group = run.feed, run.group
    width = run.recipe.train.rows
    every = feed.every_sample(feed.needs.ref_logp, group)
    parts = list(iter(lambda: list(islice(every, BATCHES_A_PART)), []))  # ends at the first empty one

    def file(number: int, rank: int) -> Path:
        cut = f"width-{width}-part-{number:03d}-of-{len(parts):03d}"
        return folder / f"rank-{rank:05d}-of-{group.size:05d}-{cut}.npz"

    # Under ZeRO-3 every rank makes each forward, so all ranks compute a part that any of them lacks.
    own = {number for number in range(len(parts)) if not file(number, group.rank).is_file()}
    missing = sorted(set().union(*ranks.everyones(group, own)))
    task = f"{run.root.name}: reference log-probabilities"
    with (
        closing(feed.batches([rows for number in missing for rows in parts[number]])) as batches,
        Progress(len(parts), task, "part", initial=len(parts) - len(missing)) as progress,
    ):
        for number in missing:
            cache = reference.LogProbs()
            for rows in parts[number]:
                add(cache, run.engine, next(batches).to(group.device), next(iter(rows)))
            with disk.writing(file(number, group.rank), workspace=run.lease.workspace) as handle:
                cache.save(handle)
            progress.update()
            ranks.stop_here(group, f"part {number} of the reference cache is written")
    names = ranks.from_main(group, complete_set(folder) if group.main else None)
    assert names is not None
    return names


def add(cache: reference.LogProbs, engine: Any, micro: MicroBatch, stream: str) -> None:
    """Compute the log-probabilities of a micro-batch that holds samples of `stream` only, and put them in the cache."""
    segment_N = micro.segment(stream)
    assert segment_N is not None
    out = no_grad_forward(engine, micro.batch.inputs, Request(micro.index([stream]), micro.labels([stream])))
    assert out.logp_N is not None
    cache.add(micro.samples, out.logp_N, segment_N)


def key(recipe: TrainRecipe, feed: Feed, base_hash: str, samples: Mapping[str, str]) -> str:
    """Hash of everything that decides the values: weights, their dtype, the samples with their pictures, how samples
    become tokens, and the classes and libraries that compute with them.

    samples: of each stream that needs it, see `Feed.stream_digests`.
    """
    data, processor, tokenizer = recipe.data, feed.encoder.processor, feed.encoder.tokenizer
    decided_by = {
        "base": base_hash,
        "dtype": recipe.train.dtype,
        "encoding": [data.max_length, data.on_long, feed.encoder.image_aspect, data.system_prompt, data.packing],
        "template": processor.chat_template,
        "vocabulary": tokenizer.get_vocab(),
        "transform": None if feed.encoder.text_only else processor.image_processor.to_dict(),
        "environment": asdict(environment.of(processor)),
        "samples": dict(samples),
        **({"load_in_4bit": True} if quantization.wanted(recipe.model) else {}),
        **({"template_options": data.template_options} if data.template_options else {}),
    }
    return disk.digest(decided_by, default=str)[:16]


def complete_set(folder: Path) -> list[str] | None:
    """The names of the parts of one complete set, whatever number of ranks wrote it; None where no set is complete.

    What has another name, or is no file, is passed over.
    """
    sets: dict[tuple[int, int, int], dict[tuple[int, int], str]] = {}
    for file in sorted(folder.glob("rank-*.npz")):
        if (match := PART.fullmatch(file.name)) and file.is_file():
            rank, size, width, part, parts = map(int, match.groups())
            if rank < size and part < parts:
                sets.setdefault((size, width, parts), {})[rank, part] = file.name
    complete = (list(names.values()) for (size, _, parts), names in sets.items() if len(names) == size * parts)
    return next(complete, None)
