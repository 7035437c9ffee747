"""ScienceQA (Lu et al., NeurIPS 2022): LLaVA's conversations, with the right option from the official problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from mirage_dist.data.formats.base import BadRecord, Opened, get, picture, table, text
from mirage_dist.data.formats.llava import conversation
from mirage_dist.data.sample import Sample
from mirage_dist.schema import SourceConfig

OPTIONS = "ABCDE"
LETTER = "\nAnswer with the option's letter from the given choices directly."  # LLaVA's, for one letter


def opened(config: SourceConfig) -> Opened:
    problems = table(Path(str(config.annotations)))

    def parse(record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """The category tells pictures from none, as LLaVA's script does, and then the subject."""
        name = text(record, "id")
        if not isinstance(problem := problems.get(name), Mapping):
            raise BadRecord(f"field 'id': {name!r} is no problem of {config.annotations}")
        turns, image = conversation(record)
        if len(turns) != 1:
            raise BadRecord("field 'conversations': expected one question")
        question = turns[0][0].removesuffix(LETTER) + LETTER
        category = f"{'with picture' if image else 'text only'}/{text(problem, 'subject')}"
        path = picture(config, image) if image else None
        yield Sample(name, path, question, _letter(problem, config), True, category, config.path)

    return Opened(None, parse)


def _letter(problem: Mapping, config: SourceConfig) -> str:
    choices, answer = get(problem, "choices", list), get(problem, "answer", int)
    if not (2 <= len(choices) <= len(OPTIONS) and 0 <= answer < len(choices)):
        raise BadRecord(f"in {config.annotations}: answer {answer} of {len(choices)} choices; expected 2 to 5 choices")
    return OPTIONS[answer]
