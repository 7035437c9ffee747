"""MM-SafetyBench (Liu et al., ECCV 2024): thirteen scenarios, a JSON file each, with three pictures to a question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mirage_dist.data.formats.base import BadRecord, Format, Opened, table, text
from mirage_dist.data.sample import Sample

KEYS = (
    "Question",
    "Changed Question",
    "Key Phrase",
    "Phrase Type",
    "Rephrased Question",
    "Rephrased Question(SD)",
)
# Variant -> the text that goes with its picture: the picture drawn by Stable Diffusion, the phrase typeset, or both.
TEXTS = {
    "SD": "Rephrased Question(SD)",
    "TYPO": "Rephrased Question",
    "SD_TYPO": "Rephrased Question",
    "text_only": "Changed Question",
}


@dataclass(frozen=True)
class MMSafetyBench(Format):
    """variant: the picture of each question, and the text that goes with it."""

    variant: Literal["SD_TYPO", "SD", "TYPO", "text_only"] = "SD_TYPO"

    folder = "*.json"

    @property
    def answered(self) -> bool:
        return False

    def open(self) -> Opened:
        questions = table(Path(self.path)).items()
        records = [{**record, "id": key} if isinstance(record, Mapping) else record for key, record in questions]
        return Opened(records, self.parse)

    def parse(self, record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """The file's name is the scenario, which is the sample's category."""
        texts, scenario = {key: text(record, key) for key in KEYS}, Path(self.path).stem
        question = texts[TEXTS[self.variant]]
        if not question.strip():
            raise BadRecord(f"field {TEXTS[self.variant]!r} is empty")
        image = None
        if self.variant != "text_only":
            image = self.picture(f"{scenario}/{self.variant}/{record['id']}.jpg")
        yield Sample(f"{scenario}/{record['id']}", image, question, "", False, scenario, self.path)
