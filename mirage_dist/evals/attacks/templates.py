"""Rewrites by templates that open with a word."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mirage_dist.data import rewording
from mirage_dist.data.sources import FIRST_WORD, Sample
from mirage_dist.schema import ConfigError


@dataclass(frozen=True)
class Templates:
    """K rewrites of each question, one a template, each opening with `word`.

    A template may hold {rest}, the question from its second word on, and {question}, the whole of it.
    """

    word: str
    templates: list[str]
    control: bool = False

    def __post_init__(self) -> None:
        rewording.check(self.templates, "templates")
        for template in self.templates:
            first = FIRST_WORD.search(template)
            if not first or first[0].lower() != self.word.lower():
                raise ConfigError(f"templates: {template!r} does not open with the word {self.word!r}")

    @property
    def shots(self) -> int:
        return len(self.templates)

    def __call__(self, sample: Sample) -> list[Sample]:
        return [replace(sample, question=rewording.fill(template, sample)) for template in self.templates]
