"""Answers drawn at random, several to each question: what a model says now and then, when it is put often enough."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mirage_dist import disk
from mirage_dist.data.sample import Draw, Sample
from mirage_dist.evals.attacks.base import Attack
from mirage_dist.schema.numbers import Repeats, Seed, SomeShare, Temperature

BITS = 52  # of a draw's seed; every reader of JSON holds as many exactly


@dataclass(frozen=True)
class Sampling(Attack):
    """`draws` answers to each question, which stays as it is, each drawn at `temperature` among the likeliest tokens
    that together have the probability `top_p` (see `data.sample.Draw`).

    seed: with it the question and the number of the draw decide the draw (see `seeded`).
    """

    draws: Repeats = field()  # answers to each question
    temperature: Temperature = 1.0  # what logits are divided by
    top_p: SomeShare = 1.0  # the probability that the tokens to draw from have together; 1 for all
    seed: Seed = 0

    @property
    def shots(self) -> int:
        return self.draws

    def __call__(self, sample: Sample) -> list[Sample]:
        return [replace(sample, draw=Draw(self.temperature, self.top_p, self.seed))] * self.draws


def seeded(row: Sample, original: str, shot: int) -> Sample:
    """A row of an attack with the seed of its own draw; a row that is not drawn stays as it is.

    The seed follows from the attack's seed, the question in the data (its id and text) and the shot, and from nothing
    else: neither worker nor batch, nor what has been answered before.
    """
    if row.draw is None:
        return row
    digest = disk.digest([row.draw.seed, row.id, original, shot])
    return replace(row, draw=replace(row.draw, seed=int(digest, 16) >> 256 - BITS))
