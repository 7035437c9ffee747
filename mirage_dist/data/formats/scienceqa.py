"""ScienceQA (Lu et al., NeurIPS 2022): LLaVA's conversations, with the right option from the official problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mirage_dist.data.formats.base import BadRecord, Opened, get, table, text
from mirage_dist.data.formats.llava import conversation
from mirage_dist.data.formats.vqa import OfficialAnswers
from mirage_dist.data.sample import Sample

OPTIONS = "ABCDE"
LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA's prompt for one letter


@dataclass(frozen=True)
class ScienceQA(OfficialAnswers):
    """annotations: the official problems (problems.json)."""

    score = "option"
    required = True
    official = "problems.json, published at scienceqa.github.io"

    def open(self) -> Opened:
        problems = table(self.answers())

        def parse(record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
            """The category is whether there is a picture, as in LLaVA's script, and the subject."""
            name = text(record, "id")
            if not isinstance(problem := problems.get(name), Mapping):
                raise BadRecord(f"field 'id': {name!r} is no problem of {self.annotations}")
            turns, image, _ = conversation(record)
            if len(turns) != 1:
                raise BadRecord("field 'conversations': expected one question")
            question = turns[0][0].removesuffix(LETTER) + LETTER
            category = f"{'with picture' if image else 'text only'}/{text(problem, 'subject')}"
            path = self.picture(image) if image else None
            yield Sample(name, path, question, self._letter(problem), True, category, self.path)

        return Opened(None, parse)

    def _letter(self, problem: Mapping[str, Any]) -> str:
        choices, answer = get(problem, "choices", list), get(problem, "answer", int)
        if not (2 <= len(choices) <= len(OPTIONS) and 0 <= answer < len(choices)):
            raise BadRecord(
                f"in {self.annotations}: answer {answer} of {len(choices)} choices; expected 2 to 5 choices"
            )
        return OPTIONS[answer]
