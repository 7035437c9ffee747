"""Rewrites by templates that open with a word."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mirage_dist.data.sources import FIRST_WORD, Sample
from mirage_dist.evals.attacks.base import cased, first_word
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
        if not self.templates:
            raise ConfigError("templates is empty; give at least one, such as 'What {rest}'")
        for template in self.templates:
            first = FIRST_WORD.search(template)
            if not first or first[0].lower() != self.word.lower():
                raise ConfigError(f"templates: {template!r} does not open with the word {self.word!r}")
            unknown = set(re.findall(r"{(.*?)}", template)) - {"rest", "question"}
            if unknown or "{" not in template:
                raise ConfigError(f"templates: {template!r}; use {{rest}} or {{question}}, and nothing else in braces")

    @property
    def shots(self) -> int:
        return len(self.templates)

    def __call__(self, sample: Sample) -> list[Sample]:
        first = first_word(sample)
        rest = sample.question[first.end() :].lstrip(" ,:;")

        def fill(template: str) -> str:
            text = template.replace("{rest}", rest).replace("{question}", sample.question)
            return cased(text, first[0])

        return [replace(sample, question=fill(template)) for template in self.templates]
