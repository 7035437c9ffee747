"""Answers to forget: harvested from an evaluation's rows, or the data's own, by question.

The paper's scripts write a JSON object of answers in place of rows, by the picture of each question
(`aggregated_results.json` of its selection, results of VLGuard's evaluation) or by its id (the paper's evaluation).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from mirage_dist import disk
from mirage_dist.data import records
from mirage_dist.data.refusals import OURS, PhraseList
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError, documents
from mirage_dist.schema.limits import ANNOTATIONS
from mirage_dist.schema.texts import fault_within

Key = tuple[str, str]  # (id, question)


@dataclass
class Answers:
    """Answers to forget by question.

    by_name: answers by a question's picture, relative to any folder, or id, where nothing else names the question.
    refuses: the list that decides which are refusals. left_out: reason -> count of answers that were not taken.
    unread: number of those that were taken although the list has no phrase in their script.
    """

    refuses: PhraseList = OURS
    by_question: dict[Key, str] = field(default_factory=dict)
    by_name: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    unread: int = 0

    def add(self, key: Key | str, answer: str) -> None:
        """Keep the longest of several answers, whatever their order; leave out and count a refusal.

        key: of the question, or its picture or id alone.
        """
        reason = "empty" if not answer.strip() else "refusals" if self.refuses(answer) else None
        if reason:
            self.left_out[reason] += 1
            return
        self.unread += not self.refuses.reads(answer)
        if isinstance(key, str):
            self.by_name[key] = _longest(self.by_name.get(key, ""), answer)
        else:
            self.by_question[key] = _longest(self.by_question.get(key, ""), answer)

    def of(self, samples: Sequence[Sample]) -> list[str | None]:
        """The answer to each question, None where there is none.

        Raises ConfigError where several questions have one picture or id by which an answer is kept.
        """
        names = [_name(sample, self.by_name) for sample in samples]
        taken: dict[str, Sample] = {}
        for sample, name in zip(samples, names, strict=True):
            if name is not None and taken.setdefault(name, sample) is not sample:
                raise ConfigError(
                    f"harvest: the answer under {name!r} may be to {taken[name].id!r} or to {sample.id!r}; harvest "
                    "with `mirage eval`, whose rows have the question"
                )
        own = [self.by_question.get((sample.id, sample.question)) for sample in samples]
        named = [None if name is None else self.by_name[name] for name in names]
        return [given if other is None else other for given, other in zip(named, own, strict=True)]

    @property
    def count(self) -> int:
        return len(self.by_question) + len(self.by_name)

    def digest(self) -> str:
        """SHA-256 of the answers by content, the same whichever worker wrote them."""
        named = [sorted(self.by_name.items())] if self.by_name else []
        return disk.digest([*sorted(self.by_question.items()), *named])


def harvest(path: Path, refuses: PhraseList = OURS) -> Answers:
    """A model's answers to unchanged questions; attacked rows are left out.

    path: a file of any form that `data.records` reads, a folder of JSONL files, or a JSON object of answers.

    Raises ConfigError when there is no file, for an endpoint's answers, and naming file, record and field for a row
    that is no answer.
    """
    answers = Answers(refuses)
    for file in _files(path):
        if (named := _named(file)) is not None:
            for name, answer in named.items():
                answers.add(name, answer)
            continue
        for row in _rows(file, answers.left_out):
            if "served" in row:
                raise ConfigError(
                    f"{file}: these are answers of a model behind an endpoint{_served_by(row)}; the answers to forget "
                    "are those of the model that is trained: harvest them from its directory (model.path)"
                )
            if "sent" in row or "filtered" in row:
                answers.left_out["defended"] += 1
            elif row.get("attack") in (None, "clean"):
                answers.add((str(row["id"]), row["question"]), row["response"])
            else:
                answers.left_out["attacked"] += 1
    return answers


def _served_by(row: Mapping[str, Any]) -> str:
    name = row["served"].get("model") if isinstance(row["served"], dict) else None
    return f" ({name})" if isinstance(name, str) else ""


def as_given(samples: Sequence[Sample], refuses: PhraseList = OURS) -> Answers:
    """The data's own answers."""
    answers = Answers(refuses)
    for sample in samples:
        answers.add((sample.id, sample.question), sample.answer)
    return answers


def _files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ConfigError(
            f"harvest={path}: no JSONL file here; `mirage eval configs/eval/harvest.yaml` writes a folder of them. "
            "Name a JSON object of answers, as the paper's scripts write it, by its file"
        )
    return files


def _longest(one: str, other: str) -> str:
    return max(one, other, key=lambda text: (len(text), text))


def _name(sample: Sample, names: Mapping[str, str]) -> str | None:
    """The name by which a question has an answer: its id, or the longest end of its picture's path."""
    parts = PurePath(sample.image or "").parts if names else ()
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    return next((name for name in [*ends, sample.id] if name in names), None)


def _named(file: Path) -> dict[str, str] | None:
    """A file that is one JSON object of answers, by picture or id; None for any other file, and for a single row."""
    if file.suffix != ".json":
        return None
    content = records.text(file, ANNOTATIONS)
    if not content.lstrip().startswith("{"):
        return None
    try:
        value = documents.parse_json(content)
    except documents.Malformed:  # one object a line, or broken: the reader of rows says where
        return None
    if {"id", "question", "response"} <= value.keys():
        return None
    for name, answer in value.items():
        if not isinstance(answer, str) or (why := fault_within(answer)) is not None:
            expected = f"expected an answer, got {answer!r:.80}" if not isinstance(answer, str) else why
            raise ConfigError(f"{file}: field {name!r:.80}: {expected}")
    return value


def _rows(file: Path, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows with an id, a question and a response.

    A last line of a .jsonl file that breaks off was cut by a worker's death, and is counted.
    """
    if records.size(file) == 0:  # of a worker that has not answered yet
        return
    torn = (lambda: left_out.update(half_lines=1)) if file.suffix == ".jsonl" else None
    for number, row in records.checked(file, torn=torn):
        for name in ("id", "question", "response"):
            kinds = (str, int) if name == "id" else str
            if not isinstance(row, dict) or not isinstance(row.get(name), kinds):
                raise ConfigError(f"{file}: record {number}: field {name!r} is missing or no text; is this a harvest?")
        yield row
