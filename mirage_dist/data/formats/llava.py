"""LLaVA's conversations: human and gpt in turns, about one picture or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mirage_dist.data.formats.base import BadRecord, Format, get, identity, image, text
from mirage_dist.data.sample import Sample

PICTURE = "<image>"  # marks the picture's place


@dataclass(frozen=True)
class Llava(Format):
    signature = frozenset({"conversations"})

    def parse(self, record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """The last turn is the sample; earlier ones are its history."""
        turns, picture, shown = conversation(record)
        question, answer = turns[-1]
        yield Sample(
            identity(record, number),
            self.picture(picture) if picture else None,
            question,
            answer,
            True,
            str(record.get("category", "")),
            self.path,
            tuple(turns[:-1]),
            shown=shown,
        )


def conversation(record: Mapping[str, Any]) -> tuple[list[tuple[str, str]], str | None, int]:
    """(human, gpt) pairs without the picture's mark, the picture's name, and the pair whose question shows it, from 0.

    A picture without a mark belongs to the first question. Raises BadRecord.
    """
    turns = get(record, "conversations", list)
    if not turns or len(turns) % 2:
        raise BadRecord("field 'conversations': expected human and gpt turns in pairs")
    texts = []
    for place, turn in enumerate(turns):
        speaker = ("human", "gpt")[place % 2]
        if not isinstance(turn, Mapping) or turn.get("from") != speaker:
            raise BadRecord(f"field 'conversations[{place}].from': expected {speaker!r}")
        texts.append(text(turn, "value"))
    if isinstance(record.get("image"), list):
        raise BadRecord("field 'image': expected one path; records of several pictures are not supported")
    picture = image(record) if record.get("image") is not None else None
    markers = sum(value.count(PICTURE) for value in texts)
    if markers > 1 or (markers and not picture):
        raise BadRecord(f"field 'conversations': {markers} {PICTURE} markers for {1 if picture else 0} picture")
    marked = [place for place, value in enumerate(texts) if PICTURE in value]
    if marked and marked[0] % 2:
        raise BadRecord(
            f"field 'conversations[{marked[0]}].value': {PICTURE} in a gpt turn; a question shows a picture"
        )
    cleaned = [value.replace(PICTURE, "").strip() for value in texts]
    return list(zip(cleaned[::2], cleaned[1::2], strict=True)), picture, marked[0] // 2 if marked else 0
