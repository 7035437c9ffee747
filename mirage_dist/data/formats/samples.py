"""Our own format: one sample an object, a line each as `write_samples` writes them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_dist.data.formats.base import BadRecord, Format, get, image, text
from mirage_dist.data.sample import Sample


@dataclass(frozen=True)
class Samples(Format):
    signature = frozenset({"answer", "history"})
    labelled = True

    def parse(self, record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
        history = get(record, "history", list)
        if not all(isinstance(t, list) and len(t) == 2 and all(isinstance(x, str) for x in t) for t in history):
            raise BadRecord("field 'history': expected a list of [question, answer]")
        references = record.get("references", [])
        if not isinstance(references, list) or not all(isinstance(answer, str) for answer in references):
            raise BadRecord("field 'references': expected a list of answers")
        shown = record.get("shown", 0)
        if type(shown) is not int or not 0 <= shown <= len(history):
            raise BadRecord(f"field 'shown': expected a turn from 0 to {len(history)}, got {shown!r:.80}")
        yield Sample(
            text(record, "id"),
            self.picture(image(record)) if record.get("image") is not None else None,
            text(record, "question"),
            text(record, "answer"),
            get(record, "safe", bool),
            str(record.get("category", "")),
            self.path,
            tuple((q, a) for q, a in history),
            tuple(references),
            shown=shown,
        )


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write `lines_of` the samples."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines_of(samples))


def lines_of(samples: Iterable[Sample]) -> Iterator[str]:
    """One object a line, pictures by absolute path; what attacks add is left out."""
    for sample in samples:
        row = dataclasses.asdict(sample)
        if not sample.references:
            del row["references"]
        if not sample.shown:
            del row["shown"]
        row["image"] = os.path.realpath(sample.image) if sample.image else None
        del row["begun"], row["draw"], row["turn"]
        yield json.dumps(row, ensure_ascii=False) + "\n"
