"""Reference log-probabilities of a whole stream, computed once by the policy while it still is the base model.

    reference/KEY/rank-00000-of-00002-width-16-part-003-of-010.npz

KEY is the hash of all that decides the values. Parts are whole or absent: a run that is stopped goes on with the
missing ones, cut into the same batches, so that it gets bitwise the same values. A whole set of parts serves every
other number of ranks as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mirage_dist import ranks
from mirage_dist.data import pictures
from mirage_dist.model import reference
from mirage_dist.model.policy import Request, no_grad_forward
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.context import Run
from mirage_dist.train.feed import Feed, MicroBatch

BATCHES_A_PART = 16


def fill(run: Run) -> reference.LogProbs:
    """The log-probabilities of every sample that needs them; each rank computes its share of what is missing.

    Every rank calls this. Raises StopRequested between two parts.
    """
    recipe, feed, group = run.recipe, run.feed, run.group
    paths = (s.image for name in feed.needs.ref_logp for s in feed.samples[name])
    digests = pictures.digests(paths, group.rank, group.size, lambda own: ranks.everyones(group, own))
    folder = run.root / "reference" / _key(recipe, feed, run.manifest["base_hash"], digests)
    files = ranks.from_main(group, _whole_set(folder) if group.main else None)
    if files is None:
        if group.main:
            folder.mkdir(parents=True, exist_ok=True)
        ranks.barrier(group, "reference cache")
        files = _compute(run, folder)
    cache = reference.LogProbs()
    for name in files:
        cache.load(folder / name)
    return cache


def _compute(run: Run, folder: Path) -> list[str]:
    recipe, feed, group = run.recipe, run.feed, run.group
    width = recipe.train.micro_batch
    every = feed.every_sample(feed.needs.ref_logp, group)
    parts = list(iter(lambda: list(islice(every, BATCHES_A_PART)), []))  # until there is an empty one
    name = f"{run.root.name}: reference log-probabilities"

    def file(number: int, rank: int) -> Path:
        cut = f"width-{width}-part-{number:03d}-of-{len(parts):03d}"
        return folder / f"rank-{rank:05d}-of-{group.size:05d}-{cut}.npz"

    # Under ZeRO-3 every rank makes each forward, so a part that one rank lacks is computed by all.
    own = {number for number in range(len(parts)) if not file(number, group.rank).is_file()}
    lacking = sorted(set().union(*ranks.everyones(group, own)))
    told = 0
    with closing(feed.batches([rows for number in lacking for rows in parts[number]])) as batches:
        for done, number in enumerate(lacking, 1):
            found = reference.LogProbs()
            for rows in parts[number]:
                add(found, run.engine, next(batches).to(group.device), next(iter(rows)))
            beside = run.lease.workspace / file(number, group.rank).name
            found.save(beside)
            beside.replace(file(number, group.rank))
            if done * 10 // len(lacking) > told:
                told = done * 10 // len(lacking)
                group.say(f"{name}: {len(parts) - len(lacking) + done} of {len(parts)} parts")
            ranks.stop_here(group, f"part {number} of the reference cache is written")
    names = ranks.from_main(group, _whole_set(folder) if group.main else None)
    assert names is not None
    return names


def add(cache: reference.LogProbs, engine: Any, micro: MicroBatch, stream: str) -> None:
    """Compute the log-probabilities of a micro-batch that holds samples of `stream` only, and put them in the cache."""
    segment_N = micro.segment(stream)
    assert segment_N is not None
    out = no_grad_forward(engine, micro.batch.inputs, Request(micro.index([stream]), micro.labels([stream])))
    assert out.logp_N is not None
    cache.add(micro.samples, out.logp_N, segment_N)


def _key(recipe: TrainRecipe, feed: Feed, base_hash: str, digests: Mapping[str, str]) -> str:
    """Hash of all that decides the values: weights, their dtype, how samples become tokens, and the samples."""
    data, processor = recipe.data, feed.encoder.processor
    made = [data.max_length, data.on_long, data.image_aspect, data.system_prompt, data.packing]
    read = [processor.chat_template, processor.tokenizer.get_vocab(), processor.image_processor.to_dict()]
    samples = {
        name: [repr(replace(s, image=None if s.image is None else digests[s.image])) for s in feed.samples[name]]
        for name in feed.needs.ref_logp
    }
    told = [base_hash, recipe.train.dtype, made, read, samples]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _whole_set(folder: Path) -> list[str] | None:
    """The parts of a set that has all of them, whatever number of ranks wrote it; None for none."""
    sets: dict[str, list[str]] = {}
    for file in sorted(folder.glob("rank-*.npz")):
        _, _, _, ranks, _, width, _, _, _, parts = file.stem.split("-")
        sets.setdefault(f"{ranks} {width} {parts}", []).append(file.name)
    for kind, names in sets.items():
        ranks, _, parts = map(int, kind.split())
        if len(names) == ranks * parts:
            return names
    return None
