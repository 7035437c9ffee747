"""Rewrites from a published attack file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mirage_dist.data import records
from mirage_dist.data.formats import BadRecord
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Attack
from mirage_dist.schema import ConfigError
from mirage_dist.schema.numbers import Repeats, SomeShare

EXPECTED = "expected a list of VLGuard records, or one a line, one for each rewrite"


@dataclass(frozen=True)
class File(Attack):
    """Rewrites from a published attack file: VLGuard records, one for each rewrite, joined to the set by `id` (never by
    position) in file order. The file has any form that `data.records` reads.

    The first `shots` records of an id are its rewrites. min_match: the fraction of the set's samples that must have as
    many.
    """

    path: str  # of the attack file
    shots: Repeats = field()  # K: so many records of an id are its rewrites
    min_match: SomeShare = 1.0

    @property
    def origin(self) -> str:
        return self.path

    @property
    def ids(self) -> Collection[str]:
        return self.rewrites.keys()

    @cached_property
    def rewrites(self) -> dict[str, list[str]]:
        """id -> questions, in file order."""
        questions: dict[str, list[str]] = {}
        for identity, question in read_rewrites(Path(self.path)):
            questions.setdefault(identity, []).append(question)
        return questions

    def __call__(self, sample: Sample) -> list[Sample]:
        questions = self.rewrites.get(sample.id, [])[: self.shots]
        if len(questions) < self.shots:
            return []
        return [replace(sample, question=question) for question in questions]


def read_rewrites(path: Path) -> Iterable[tuple[str, str]]:
    """(id, question) of each record of a published attack file.

    A plain VLGuard reader refuses such a file, because its ids repeat. Raises ConfigError that names the file, the
    record number (from 0) and the field.
    """
    number = -1
    for number, record in records.checked(path):
        try:
            rewrite = _rewrite(record)
        except BadRecord as error:
            raise ConfigError(f"{path}: record {number}: {error}; {EXPECTED}") from error
        yield rewrite
    if number < 0:
        raise ConfigError(f"{path}: {EXPECTED}")


def _rewrite(record: Any) -> tuple[str, str]:
    if not isinstance(record, Mapping) or "id" not in record:
        raise BadRecord("field 'id' is missing")
    if not isinstance(record.get("safe"), bool):
        raise BadRecord(f"field 'safe' must be true or false, got {record.get('safe')!r}")
    name = "safe_instruction" if record["safe"] else "instruction"
    pairs = record.get("instr-resp")
    for pair in pairs if isinstance(pairs, list) else []:
        if isinstance(pair, Mapping) and isinstance(pair.get(name), str) and pair[name].strip():
            return str(record["id"]), pair[name]
    raise BadRecord(f"field 'instr-resp' has no {name!r} with text")
