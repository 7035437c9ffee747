"""LLaVA's conversations: human and gpt in turns, about one picture or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from mirage_dist.data.formats.base import BadRecord, get, identity, picture, text
from mirage_dist.data.sample import Sample
from mirage_dist.schema import SourceConfig

PICTURE = "<image>"  # marks the picture's place


def parse(config: SourceConfig, record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
    turns, image = conversation(record)
    question, answer = turns[-1]
    yield Sample(
        identity(record, number),
        picture(config, image) if image else None,
        question,
        answer,
        True,
        str(record.get("category", "")),
        config.path,
        tuple(turns[:-1]),
    )


def conversation(record: Mapping) -> tuple[list[tuple[str, str]], str | None]:
    """(human, gpt) pairs without the picture's mark, and the picture's name."""
    turns = get(record, "conversations", list)
    if not turns or len(turns) % 2:
        raise BadRecord("field 'conversations': expected human and gpt turns in pairs")
    texts = []
    for place, turn in enumerate(turns):
        speaker = ("human", "gpt")[place % 2]
        if not isinstance(turn, Mapping) or turn.get("from") != speaker:
            raise BadRecord(f"field 'conversations[{place}].from': expected {speaker!r}")
        texts.append(text(turn, "value"))
    image = record.get("image")
    if image is not None and not isinstance(image, str):
        raise BadRecord("field 'image': expected one path; records of several pictures are not supported")
    markers = sum(said.count(PICTURE) for said in texts)
    if markers > 1 or (markers and not image):
        raise BadRecord(f"field 'conversations': {markers} {PICTURE} markers for {1 if image else 0} picture")
    cleaned = [said.replace(PICTURE, "").strip() for said in texts]
    return list(zip(cleaned[::2], cleaned[1::2], strict=True)), image
