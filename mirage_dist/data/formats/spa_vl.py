"""SPA-VL (Zhang et al., CVPR 2025): preferences (training has no classes), and test questions without answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mirage_dist.data.formats.base import BadRecord, Format, identity, image, text
from mirage_dist.data.refusals import PhraseList
from mirage_dist.data.sample import Sample

CLASSES = ("class1", "class2", "class3")


@dataclass(frozen=True)
class SpaVL(Format):
    """response: the side of the preference that is the answer; absent for a test set, which has neither.

    refusals: a JSON file of phrases of refusal, for answers in another language than English.
    """

    response: Literal["chosen", "rejected", "absent"] = "chosen"
    refusals: str | None = None

    signature = frozenset({"chosen", "rejected"})

    @property
    def answered(self) -> bool:
        return self.response != "absent"

    @cached_property
    def _refuses(self) -> PhraseList:
        return PhraseList.read(self.refusals)

    def other_files(self) -> dict[str, str]:
        return {} if self.refusals is None else {"refusals": self.refusals}

    def parse(self, record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """`safe` is whether the chosen answer answers: a preference record has no label of its own, a test one none."""
        classed = any(name in record for name in CLASSES)
        category = "/".join(text(record, name) for name in CLASSES) if classed else ""
        picture, question = self.picture(image(record)), text(record, "question")
        if self.response == "absent":
            if given := [name for name in ("chosen", "rejected") if name in record]:
                raise BadRecord(f"field {given[0]!r}: response: absent is for test sets, whose records have no answers")
            answer, safe = "", False
        else:
            chosen, rejected = text(record, "chosen"), text(record, "rejected")
            answer, safe = (chosen if self.response == "chosen" else rejected), not self._refuses(chosen)
        yield Sample(identity(record, number), picture, question, answer, safe, category, self.path)
