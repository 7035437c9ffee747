"""Answers to forget: harvested from an evaluation's rows, or the data's own, by question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage_dist import disk
from mirage_dist.data import records
from mirage_dist.data.refusals import OURS, PhraseList
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

Key = tuple[str, str]  # (id, question)


@dataclass
class Answers:
    """Answers to forget by question.

    refuses: the list that decides which are refusals. left_out: reason -> count of answers that were not taken.
    unread: number of those that were taken although the list has no phrase in their script.
    """

    refuses: PhraseList = OURS
    by_question: dict[Key, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    unread: int = 0

    def add(self, key: Key, answer: str) -> None:
        """Keep the longest of several answers, whatever their order; leave out and count a refusal."""
        reason = "empty" if not answer.strip() else "refusals" if self.refuses(answer) else None
        if reason:
            self.left_out[reason] += 1
        else:
            self.unread += not self.refuses.reads(answer)
            self.by_question[key] = max(self.by_question.get(key, ""), answer, key=lambda text: (len(text), text))

    def digest(self) -> str:
        """SHA-256 of the answers by content, the same whichever worker wrote them."""
        return disk.digest(sorted(self.by_question.items()))


def harvest(path: Path, refuses: PhraseList = OURS) -> Answers:
    """A model's answers to unchanged questions; attacked rows are left out.

    path: a file of any form that `data.records` reads, or a folder of JSONL files.

    Raises ConfigError when there is no file, and naming file, record and field for a row that is no answer.
    """
    answers = Answers(refuses)
    for file in _files(path):
        for row in _rows(file, answers.left_out):
            if row.get("attack") in (None, "clean"):
                answers.add((str(row["id"]), row["question"]), row["response"])
            else:
                answers.left_out["attacked"] += 1
    return answers


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
            f"harvest={path}: no JSONL file here; `mirage eval configs/eval/harvest.yaml` writes a folder of them"
        )
    return files


def _rows(file: Path, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows with an id, a question and a response. A last line that breaks off was cut by a worker's death; counted."""
    if records.size(file) == 0:  # of a worker that has not answered yet
        return
    for number, row in records.checked(file, torn=lambda: left_out.update(half_lines=1)):
        for name in ("id", "question", "response"):
            kinds = (str, int) if name == "id" else str
            if not isinstance(row, dict) or not isinstance(row.get(name), kinds):
                raise ConfigError(f"{file}: record {number}: field {name!r} is missing or no text; is this a harvest?")
        yield row
