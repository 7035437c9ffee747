"""SafeEraser (Chen et al., ACL Findings 2025): pictures with unsafe and harmless questions, to forget and to retain.

A record has four unsafe questions with a model's answers, four harmless ones, and a second, harmless picture on which
the same unsafe questions should be answered ("prompt decoupling").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from mirage_dist.data.formats.base import BadRecord, Format, Split, get, image, text
from mirage_dist.data.sample import Sample

HARMLESS = ("UnharmPair_text1", "UnharmPair_text2", "UnharmPair_image1", "UnharmPair_image2")
PICTURES = ("image_path", "image_id")  # the field that the published scripts read, and the one of the published files


@dataclass(frozen=True)
class SafeEraser(Format):
    """part: unsafe questions about the picture, harmless ones about it, or the unsafe ones about the harmless picture.

    An answer that a record does not have is empty: an evaluation needs none, and training refuses it.
    """

    part: Literal["forget", "retain", "decoupled"] = "forget"

    signature = frozenset({"unsafe_pairs"})

    def parse(self, record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
        name = _picture(record)
        category = record.get("category") or PurePath(name).parent.name  # some records have the category empty
        if not isinstance(category, str):
            raise BadRecord(f"field 'category': expected str, got {category!r:.80}")
        shown = self.picture(image(record, "SDImage_path") if self.part == "decoupled" else name)
        pairs = _harmless(record, dropped) if self.part == "retain" else _unsafe(record, self.part)
        for key, question, answer in pairs:
            safe = self.part != "forget"
            yield Sample(f"{name}/{key}", shown, question, answer, safe, category, self.path)

    def of_split(self, split: Split) -> Format | None:
        own = "unsafes" if self.part == "forget" else "safe_safes"
        return self if split == own else None


def _picture(record: Mapping[str, Any]) -> str:
    given = [field for field in PICTURES if record.get(field) is not None]
    if not given:
        raise BadRecord(f"field {PICTURES[0]!r} is missing, and {PICTURES[1]!r} too; one of them names the picture")
    return text(record, given[0])


def _unsafe(record: Mapping[str, Any], part: str) -> Iterator[tuple[str, str, str]]:
    """Key, question and answer of each unsafe question."""
    listed = get(record, "unsafe_pairs", list)
    for i, pair in enumerate(listed):
        if not isinstance(pair, Mapping):
            raise BadRecord(f"field 'unsafe_pairs[{i}]': expected an object, got {type(pair).__name__}")
        answer = "sd_response" if part == "decoupled" else "model_response"
        yield f"{part}{i}", text(pair, "question"), text(pair, answer) if answer in pair else ""


def _harmless(record: Mapping[str, Any], dropped: Counter[str]) -> Iterator[tuple[str, str, str]]:
    for key in HARMLESS:
        if key not in record:
            dropped[f"no {key}"] += 1
            continue
        pair = get(record, key, dict)
        yield key, text(pair, "Question"), text(pair, "Prediction") if "Prediction" in pair else ""
