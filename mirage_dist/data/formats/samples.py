"""Our own format: one sample an object, as `sources.write_samples` writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from mirage_dist.data.formats.base import BadRecord, get, picture, text
from mirage_dist.data.sample import Sample
from mirage_dist.schema import SourceConfig


def parse(config: SourceConfig, record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
    history = get(record, "history", list)
    if not all(isinstance(t, list) and len(t) == 2 and all(isinstance(x, str) for x in t) for t in history):
        raise BadRecord("field 'history': expected a list of [question, answer]")
    references = record.get("references", [])
    if not isinstance(references, list) or not all(isinstance(said, str) for said in references):
        raise BadRecord("field 'references': expected a list of answers")
    yield Sample(
        text(record, "id"),
        picture(config, text(record, "image")) if record.get("image") is not None else None,
        text(record, "question"),
        text(record, "answer"),
        get(record, "safe", bool),
        str(record.get("category", "")),
        config.path,
        tuple((q, a) for q, a in history),
        tuple(references),
    )
