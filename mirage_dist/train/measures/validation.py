"""The held-out loss: the mean cross entropy of the answers of `data.streams.validation`, which no step trains on."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirage_dist import signals
from mirage_dist.data.sample import Sample
from mirage_dist.data.sources import Source
from mirage_dist.model.policy import Request, no_grad_forward
from mirage_dist.objectives.base import Needs
from mirage_dist.ranks import Group, gather
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.caches.samples import Table
from mirage_dist.train.feed import Feed, MicroBatch
from mirage_dist.train.measures.records import HELD_OUT, records
from mirage_dist.train.planning.streams import HELD_OUT as STREAM

NEEDS = Needs(streams=(STREAM,), logp=(STREAM,))
BATCHES_BETWEEN_STOPS = 8


def check(recipe: TrainRecipe, needs: Needs) -> None:
    """Raise ConfigError when the recipe measures a held-out loss that it cannot have, or retains checkpoints by one
    that is not measured where they are saved.
    """
    train, given = recipe.train, STREAM in recipe.data.streams
    by_it = train.keep_best == HELD_OUT
    if not given and (train.validate_every is not None or by_it):
        key = f"train.keep_best={HELD_OUT}" if by_it else f"train.validate_every={train.validate_every}"
        raise ConfigError(f"{key}: there is no data.streams.{STREAM}; add the held-out samples, or leave the key out")
    if given and needs.depth is not None:
        raise ConfigError(
            f"data.streams.{STREAM}: objective {recipe.objective['name']} computes {needs.depth} decoder layers and no "
            "LM head, so that there is no held-out loss; leave the stream out, or give the objective a cross entropy"
        )
    every, save = train.validate_every, train.save_every
    if by_it and save is not None and (every is None or (save % every and every % save)):
        raise ConfigError(
            f"train.keep_best={HELD_OUT}: train.save_every={save} saves at other steps than train.validate_every="
            f"{every} measures; let one be a multiple of the other"
        )


def overlap(streams: Mapping[str, Source]) -> dict[str, int]:
    """Training stream -> how many held-out samples have the picture, question and history of one of its samples.

    The pictures must have been checked (`sources.check_pictures`): equal files count as equal, whatever their names.
    """
    if STREAM not in streams:
        return {}

    own = [_input(sample, streams[STREAM].pictures) for sample in streams[STREAM].samples]
    counts = {}
    for name, source in streams.items():
        if name != STREAM:
            trained = {_input(sample, source.pictures) for sample in source.samples}
            counts[name] = sum(one in trained for one in own)
    return {name: count for name, count in counts.items() if count}


def _input(sample: Sample, digests: Mapping[str, str]) -> tuple[Any, ...]:
    picture = sample.image and digests.get(sample.image, sample.image)
    return picture, sample.question, sample.history, sample.shown


def warnings(streams: Mapping[str, Source]) -> list[str]:
    """How many held-out samples are also trained on, a sentence for each stream that does."""
    return [
        f"data.streams.{STREAM}: {count} of {len(streams[STREAM].samples)} samples have the picture and question of a "
        f"sample of data.streams.{name}, so that the held-out loss is partly one of trained samples; remove them"
        for name, count in overlap(streams).items()
    ]


def share(count: int, width: int, rank: int, size: int) -> tuple[list[np.ndarray], list[bool]]:
    """A rank's batches of `count` samples, and whether each counts.

    The batches are the same on any number of ranks, which take turns. All ranks have the same number of them (ZeRO-3
    needs each rank's forward); one that a rank has too few does not count.
    """
    batches = [np.arange(start, min(start + width, count)) for start in range(0, count, width)]
    numbers = [first + rank for first in range(0, len(batches), size)]
    counting = [number < len(batches) for number in numbers]
    return [batches[number if counts else 0] for number, counts in zip(numbers, counting, strict=True)], counting


class HeldOut:
    """Measures the loss after some steps, in the same batches on any number of ranks; all ranks make the same calls."""

    def __init__(self, feed: Feed, streams: Mapping[str, Source] | Table, group: Group) -> None:
        """feed: of training. Every rank calls this. Raises ConfigError as `Feed` and `Feed.check_lengths` do."""
        self.group, self.every, self.steps = group, feed.recipe.train.validate_every, feed.steps
        self.feed = Feed(feed.recipe, NEEDS, streams, feed.encoder.processor)
        self.feed.encoder = feed.encoder  # the very one: where it recalls features of pictures, it does so here too
        self.cut = self.feed.check_lengths(group)
        rows, self.counting = share(len(self.feed.samples[STREAM]), feed.recipe.train.rows, group.rank, group.size)
        self.rows = [{STREAM: own} for own in rows]
        self._made: Generator[MicroBatch] | None = None
        self._ahead: list[MicroBatch] = []

    def due(self, step: int) -> bool:
        """Whether the loss is measured after this step (from 1): each `train.validate_every` and the last."""
        return step > 0 and (step == self.steps or (self.every is not None and step % self.every == 0))

    def lacking(self, file: Path, step: int) -> bool:
        """Whether the record of this step in metrics.jsonl still waits for its held-out loss (see `Record`)."""
        if step == 0 or not file.exists():
            return False
        return any(r["step"] == step and r.get("validation", {}) is None for _, r in records(file, step))

    def __enter__(self) -> HeldOut:
        return self

    def __exit__(self, *_: object) -> None:
        if self._made is not None:
            self._made.close()

    def begin(self, first: int, again: bool) -> None:
        """Let workers make batches ahead, for the measurements after step `first`; again: and for one after it."""
        times = sum(self.due(step) for step in range(first + 1, self.steps + 1)) + again
        self._made = self.feed.batches(self.rows * times)
        # The workers start with the first batch: now, and not in the middle of training, with many threads about.
        self._ahead = [batch for _, batch in zip(range(1), self._made, strict=False)]

    def measure(self, engine: Any, step: int) -> dict[str, float | None] | None:
        """The loss (null when it is not finite) and the tokens that it is a mean over; None on every rank when a signal
        asked any rank to stop meanwhile.
        """
        assert self._made is not None
        device = self.group.device
        total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
        for number, counts in enumerate(self.counting):
            micro = (self._ahead.pop() if self._ahead else next(self._made)).to(device)
            out = no_grad_forward(engine, micro.batch.inputs, Request(micro.index([STREAM]), micro.labels([STREAM])))
            assert out.logp_N is not None
            if counts:
                total, tokens = total - out.logp_N.double().sum(), tokens + micro.tokens[STREAM]
            if (number + 1) % BATCHES_BETWEEN_STOPS == 0:
                call = f"held-out loss after step {step}, batch {number + 1}"
                if gather(self.group, [signals.received() is not None], call).any():
                    return None
        table = gather(self.group, [total.item(), tokens], f"held-out loss after step {step}")
        loss, count = table.sum(0).tolist()
        mean = loss / count
        return {"loss": mean if np.isfinite(mean) else None, "tokens": count}


def of(feed: Feed, streams: Mapping[str, Source] | Table, group: Group) -> HeldOut | None:
    """None without held-out samples. Every rank calls this."""
    return HeldOut(feed, streams, group) if STREAM in feed.recipe.data.streams else None
