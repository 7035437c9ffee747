"""Rewrites by templates that open with a word."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mirage_dist.data.sample import Sample
from mirage_dist.data.words import FIRST_WORD, check_templates, fill_template
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
        check_templates(self.templates, "templates")
        for template in self.templates:
            first = FIRST_WORD.search(template)
            if not first or first[0].lower() != self.word.lower():
                raise ConfigError(f"templates: {template!r} does not open with the word {self.word!r}")

    @property
    def shots(self) -> int:
        return len(self.templates)

    def __call__(self, sample: Sample) -> list[Sample]:
        return [replace(sample, question=fill_template(template, sample)) for template in self.templates]
