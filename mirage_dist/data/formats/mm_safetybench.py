"""MM-SafetyBench (Liu et al., ECCV 2024): thirteen scenarios, a JSON file each, with three pictures to a question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mirage_dist.data.formats.base import BadRecord, Opened, picture, table, text
from mirage_dist.data.sample import Sample
from mirage_dist.schema import SourceConfig

KEYS = (
    "Question",
    "Changed Question",
    "Key Phrase",
    "Phrase Type",
    "Rephrased Question",
    "Rephrased Question(SD)",
)
# Which text stands with which picture: the picture drawn by Stable Diffusion, the phrase typeset, or both.
ASKED = {
    "SD": "Rephrased Question(SD)",
    "TYPO": "Rephrased Question",
    "SD_TYPO": "Rephrased Question",
    "text_only": "Changed Question",
}


def opened(config: SourceConfig) -> Opened:
    found = table(Path(config.path))
    records = [{**record, "id": key} if isinstance(record, Mapping) else record for key, record in found.items()]
    return Opened(records, lambda record, number, dropped: parse(config, record))


def parse(config: SourceConfig, record: Mapping) -> Iterator[Sample]:
    """The file's name is the scenario, which is the sample's category."""
    told, scenario = {key: text(record, key) for key in KEYS}, Path(config.path).stem
    question = told[ASKED[str(config.variant)]]
    if not question.strip():
        raise BadRecord(f"field {ASKED[str(config.variant)]!r} is empty")
    image = None
    if config.variant != "text_only":
        image = picture(config, f"{scenario}/{config.variant}/{record['id']}.jpg")
    yield Sample(f"{scenario}/{record['id']}", image, question, "", False, scenario, config.path)
