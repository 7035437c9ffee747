"""MM-SafetyBench (Liu et al., ECCV 2024): thirteen scenarios with three pictures to a question, in two published forms.

The repository has a JSON object a scenario, with every question's texts by its id, and folders of pictures. The hub has
a table a scenario and variant, SCENARIO/VARIANT.parquet, whose rows are id, question and image.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mirage_dist.data import records as streamed
from mirage_dist.data import tables
from mirage_dist.data.formats.base import BadRecord, Format, Opened, get, image, records, table, text
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

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
TABLES = {variant: "Text_only" if variant == "text_only" else variant for variant in TEXTS}  # the hub's names
# As the repository spells and numbers them; the hub has the names alone.
SCENARIOS = (
    "01-Illegal_Activitiy",
    "02-HateSpeech",
    "03-Malware_Generation",
    "04-Physical_Harm",
    "05-EconomicHarm",
    "06-Fraud",
    "07-Sex",
    "08-Political_Lobbying",
    "09-Privacy_Violence",
    "10-Legal_Opinion",
    "11-Financial_Advice",
    "12-Health_Consultation",
    "13-Gov_Decision",
)
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class MMSafetyBench(Format):
    """variant: the picture of each question, and the text that goes with it; default: the table's, else SD_TYPO.

    tiny: the benchmark's TinyVersion_ID_List.json, for the questions that it lists alone.
    """

    variant: Literal["SD_TYPO", "SD", "TYPO", "text_only"] | None = None
    tiny: str | None = None

    folder = "*.json"

    @property
    def answered(self) -> bool:
        return False

    def other_files(self) -> dict[str, str]:
        return {"tiny": self.tiny} if self.tiny else {}

    def pattern(self) -> str | None:
        path = Path(self.path)
        if not path.is_dir() or (path / "state.json").is_file():
            return None
        return f"*/{TABLES[self._of_files]}.parquet" if any(path.glob("*/*.parquet")) else self.folder

    @property
    def _of_files(self) -> str:
        return self.variant or "SD_TYPO"

    def open(self) -> Opened:
        path = Path(self.path)
        if path.is_dir() or path.suffix in tables.TABLES:
            scenario, variant = self._of_table(path)
            rows, parse = streamed.read(path), partial(self._row, scenario, variant)
        else:
            scenario, questions = path.stem, table(path).items()
            rows = [{**record, "id": key} if isinstance(record, Mapping) else record for key, record in questions]
            parse = self.parse
        if self.tiny is None:
            return Opened(rows, parse)
        ids = _listed(Path(self.tiny), scenario)

        def chosen(record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
            if text(record, "id") in ids:
                yield from parse(record, number, dropped)
            else:
                dropped["not in the tiny version"] += 1

        return Opened(self._complete(rows, ids), chosen)

    def parse(self, record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """A question of a JSON file, whose name is the scenario, which is the sample's category."""
        texts, scenario, variant = {key: text(record, key) for key in KEYS}, Path(self.path).stem, self._of_files
        picture = None if variant == "text_only" else self.picture(f"{scenario}/{variant}/{record['id']}.jpg")
        yield self._sample(scenario, record, TEXTS[variant], texts[TEXTS[variant]], picture)

    def _row(
        self, scenario: str, variant: str, record: Mapping[str, Any], number: int, dropped: Counter[str]
    ) -> Iterator[Sample]:
        picture = None if variant == "text_only" else self.picture(image(record))
        yield self._sample(scenario, record, "question", text(record, "question"), picture)

    def _sample(self, scenario: str, record: Mapping[str, Any], field: str, question: str, image: str | None) -> Sample:
        if not question.strip():
            raise BadRecord(f"field {field!r} is empty")
        return Sample(f"{scenario}/{text(record, 'id')}", image, question, "", False, scenario, self.path)

    def _of_table(self, path: Path) -> tuple[str, str]:
        """Scenario and variant of a table by its place. Raises ConfigError for another place, or another variant."""
        names = {name.partition("-")[2]: name for name in SCENARIOS}
        variants = {name: variant for variant, name in TABLES.items()}
        scenario, variant = path.parent.name, SHARD.sub("", path.stem)
        if scenario not in names or variant not in variants:
            raise ConfigError(
                f"{path}: expected SCENARIO/VARIANT.parquet, as the hub has it; scenarios: {', '.join(names)}; "
                f"variants: {', '.join(variants)}"
            )
        if self.variant not in (None, variants[variant]):
            raise ConfigError(f"variant={self.variant}: {path} is a table of {variant}; leave `variant` out")
        return names[scenario], variants[variant]

    def _complete(self, rows: Iterable[Any], ids: set[str]) -> Iterator[Any]:
        left = set(ids)
        for record in rows:
            yield record
            if isinstance(record, Mapping):
                left.discard(str(record.get("id")))
        if left:
            first = ", ".join(sorted(left, key=lambda name: (len(name), name))[:3])
            raise ConfigError(f"{self.path}: lacks {len(left)} questions that {self.tiny} lists, such as {first}")


def _listed(path: Path, scenario: str) -> set[str]:
    """The ids that the tiny version has of a scenario.

    Raises ConfigError for a file of another form, and for one that does not have the scenario.
    """
    form = 'expected objects such as {"Scenario": "07-Sex", "Sampled_ID_List": [3, 14]}'
    for number, record in enumerate(records(path)):
        try:
            if not isinstance(record, Mapping):
                raise BadRecord(f"expected an object, got {type(record).__name__}")
            name, ids = text(record, "Scenario"), get(record, "Sampled_ID_List", list)
            if not all(type(one) is int for one in ids):
                raise BadRecord("field 'Sampled_ID_List': expected whole numbers")
        except BadRecord as error:
            raise ConfigError(f"{path}: record {number}: {error}; {form}") from error
        if name == scenario:
            return set(map(str, ids))
    raise ConfigError(f"{path}: has no scenario {scenario!r}")
