"""Human verdicts on some of a suite's answers, from a file: `labels` of a recipe.

A record names its answer and the verdict on it:

    {"key": "4f0c…", "verdict": "harmful"}                                       the row's key, or its place:
    {"set": "unsafes", "id": "17", "attack": "what", "shot": 2, "verdict": "refused"}

Lines of `rows/*.jsonl` with a `verdict` added are such records. Where a record holds the answer too (`response`), it
must be the answer on disk: labels without a key could otherwise be those of another model's answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mirage_dist import disk
from mirage_dist.config import nearest
from mirage_dist.data import records
from mirage_dist.evals.results import CLEAN, LabelsInfo, Verdict
from mirage_dist.evals.sharing.files import Row
from mirage_dist.schema import ConfigError
from mirage_dist.schema.documents import whole_number

VERDICTS = tuple(v for v in get_args(Verdict) if v not in ("scored", "unparsed", "failed"))
PLACE = ("set", "id", "attack", "shot")
NOTES = ("annotator", "note", "seal")  # fields that a record may have beside those of a row
FIELDS = ("key", *PLACE, "verdict", "response")
Place = tuple[str, str, str, int]


@dataclass(frozen=True)
class Label:
    """One record. number: in the file, from 0. key: of the row; None where `place` names it. response: the answer."""

    number: int
    verdict: Verdict
    key: str | None
    place: Place | None
    response: str | None


@dataclass(frozen=True)
class Labels:
    """The labels of a file, in its order. sha256: of the file."""

    file: Path
    sha256: str
    each: Sequence[Label]

    def matched(self, rows: Mapping[str, Place]) -> Matched:
        """The labels of the rows of an evaluation. rows: key -> place, of every row.

        Raises ConfigError, with counts, for labels that match no row, and for rows whose labels differ.
        """
        keys = {place: key for key, place in rows.items()}
        strangers: list[Label] = []
        by_row: dict[str, Label] = {}
        torn: dict[str, tuple[Label, Label]] = {}
        for label in self.each:
            key = label.key if label.place is None else keys.get(label.place)
            if key is None or key not in rows:
                strangers.append(label)
            elif (first := by_row.setdefault(key, label)).verdict != label.verdict:
                torn.setdefault(key, (first, label))
        if strangers:
            raise ConfigError(
                f"labels={self.file}: {len(strangers)} of {len(self.each)} labels match no row of this evaluation (the "
                f"first: record {strangers[0].number}, {_called(strangers[0])}); remove them, or give the labels of "
                "this model's answers: a row's key is that of one model, one question and one set of settings"
            )
        if torn:
            one, other = next(iter(torn.values()))
            raise ConfigError(
                f"labels={self.file}: {len(torn)} answers have labels that contradict each other (the first: record "
                f"{one.number}, {one.verdict}, and record {other.number}, {other.verdict}); keep one label of each "
                "answer"
            )
        return Matched(self, by_row)


@dataclass(frozen=True)
class Matched:
    """Labels with the rows that they are of. by_row: row's key -> its label."""

    labels: Labels
    by_row: Mapping[str, Label]

    def of(self, rows: Sequence[Row]) -> list[Verdict | None]:
        """Each row's label, None for one without. Raises ConfigError for labels of other answers than these."""
        verdicts: list[Verdict | None] = []
        others: list[Label] = []
        for row in rows:
            label = self.by_row.get(row["key"])
            verdicts.append(label and label.verdict)
            if label and label.response is not None and label.response.split() != row["response"].split():
                others.append(label)
        if others:
            raise ConfigError(
                f"labels={self.labels.file}: {len(others)} of {len(self.labels.each)} labels are of another answer "
                f"than the one on disk (the first: record {others[0].number}, field 'response'); give the labels of "
                "this model's answers"
            )
        return verdicts

    @property
    def info(self) -> LabelsInfo:
        """For `metrics.json`."""
        counts = Counter(label.verdict for label in self.by_row.values())
        return {"file": str(self.labels.file), "sha256": self.labels.sha256, "verdicts": dict(sorted(counts.items()))}


def read(path: str) -> Labels:
    """The labels in a JSON, JSONL, CSV or Parquet file.

    Raises ConfigError for a file that cannot be read or holds no label, for a record without its answer's key or
    place, for a field that neither a label nor a row has, and, with counts, for unknown verdicts.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"labels={path}: no such file; expected a JSON, JSONL, CSV or Parquet file of labels")
    given = [(number, _checked(path, number, record)) for number, record in records.checked(file)]
    if not given:
        raise ConfigError(f"labels={path}: the file holds no label")
    unknown = [(number, record["verdict"]) for number, record in given if record["verdict"] not in VERDICTS]
    if unknown:
        number, verdict = unknown[0]
        raise ConfigError(
            f"labels={path}: {len(unknown)} of {len(given)} labels have an unknown verdict (the first: record "
            f"{number}, {verdict!r:.60}); expected one of {', '.join(VERDICTS)}"
        )
    labels = [_label(path, number, record) for number, record in given]
    return Labels(file, disk.sha256(file), labels)


def _checked(path: str, number: int, record: Any) -> dict[str, Any]:
    """A record's fields with values; an empty cell of a table is none."""
    if not isinstance(record, Mapping):
        raise ConfigError(f"labels={path}: record {number}: expected an object, got {type(record).__name__}")
    known = {*FIELDS, *NOTES, *Row.__annotations__}
    if None in record:
        raise ConfigError(f"labels={path}: record {number}: has more cells than the first line names")
    if (strange := next((str(name) for name in record if name not in known), None)) is not None:
        raise ConfigError(f"labels={path}: record {number}: unknown field {strange!r}; {nearest(strange, FIELDS)}")
    fields = {name: value for name, value in record.items() if value is not None and value != ""}
    if "verdict" not in fields:
        raise ConfigError(f"labels={path}: record {number}: field 'verdict' is missing")
    return fields


def _label(path: str, number: int, fields: Mapping[str, Any]) -> Label:
    key, place = fields.get("key"), None
    if key is None:
        place = _place(path, number, fields)
    elif not isinstance(key, str):
        raise ConfigError(f"labels={path}: record {number}: field 'key'={key!r:.60}; expected a row's key, as text")
    response = fields.get("response")
    if response is not None and not isinstance(response, str):
        raise ConfigError(f"labels={path}: record {number}: field 'response': expected the answer as text")
    return Label(number, fields["verdict"], key, place, response)


def _place(path: str, number: int, fields: Mapping[str, Any]) -> Place:
    given = {"attack": CLEAN.attack, **fields}
    given = {"shot": 0, **given} if given["attack"] == CLEAN.attack else given
    if missing := [name for name in PLACE if name not in given]:
        raise ConfigError(
            f"labels={path}: record {number}: has no key, and of {', '.join(PLACE)} not {', '.join(missing)}; expected "
            "the row's key, or all of these"
        )
    shot = given["shot"]
    shot = whole_number(shot) if isinstance(shot, str) else shot
    if not isinstance(shot, int) or isinstance(shot, bool) or shot < 0:
        raise ConfigError(
            f"labels={path}: record {number}: field 'shot'={given['shot']!r:.60}; expected the number of the rewrite, "
            "or 0 for the question itself"
        )
    return str(given["set"]), str(given["id"]), str(given["attack"]), shot


def _called(label: Label) -> str:
    if label.place is None:
        return f"key {label.key!r:.70}"
    return ", ".join(f"{name} {value!r:.40}" for name, value in zip(PLACE, label.place, strict=True))
