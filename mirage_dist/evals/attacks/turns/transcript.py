"""Conversations from a file: the user's turns are fixed, and the model under test answers each of them in turn."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mirage_dist.data.sample import Sample, Turn
from mirage_dist.evals.attacks.base import Attack
from mirage_dist.evals.attacks.turns import records
from mirage_dist.evals.attacks.turns.records import Exchange
from mirage_dist.schema import ConfigError
from mirage_dist.schema.numbers import SomeShare


@dataclass(frozen=True)
class Transcript(Attack):
    """A conversation in place of each question: the record of `path` that has the sample's id under `key` (see
    `records` for the forms). One shot for each turn that the model answers; a later turn sees its own earlier answers,
    or those that the file gives.

    min_match: the fraction of the set's samples that must have a conversation. Conversations may be of different
    lengths; K = k counts the first k answers of each, or all that it has.
    """

    path: str  # a JSON, JSONL or CSV file of conversations
    key: str = "id"  # the field with the id of the question that a conversation replaces
    min_match: SomeShare = 1.0

    turns = True

    @property
    def origin(self) -> str:
        return self.path

    @property
    def ids(self) -> Collection[str]:
        return self.conversations.keys()

    @property
    def shots(self) -> int:
        """The largest number of answers in a conversation. Raises ConfigError for a file without any."""
        return max(sum(one.answer is None for one in turns) for turns in self.conversations.values())

    @cached_property
    def conversations(self) -> dict[str, list[Exchange]]:
        """id -> its turns; the last one's answer is always the model's."""
        made: dict[str, list[Exchange]] = {}
        for number, identity, turns in records.read(Path(self.path), self.key):
            if identity in made:
                raise ConfigError(
                    f"{self.path}: record {number}: field {self.key!r}: {identity!r} a second time; a question has one "
                    "conversation, so give each its own id, and the set a question for each"
                )
            made[identity] = turns
        return made

    def __call__(self, sample: Sample) -> list[Sample]:
        """The turns that the model answers, each with the turns before it; own answers are empty until they exist."""
        turns = self.conversations.get(sample.id, [])
        total, rows, before, own = sum(one.answer is None for one in turns), list[Sample](), sample.history, ()
        for one in turns:
            if one.answer is None:
                turn = Turn(len(rows) + 1, total, own)
                rows.append(replace(sample, question=one.question, history=before, turn=turn))
                own = (*own, len(before))
            before = (*before, (one.question, one.answer or ""))
        return rows
