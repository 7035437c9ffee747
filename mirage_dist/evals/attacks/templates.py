"""Attacks that put fixed text before or around a question."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mirage_dist.data.sample import Sample
from mirage_dist.data.words import begins_with, check_templates, fill_template
from mirage_dist.evals.attacks.base import Attack
from mirage_dist.schema import ConfigError

QUESTION = "{question}"


@dataclass(frozen=True)
class Templates(Attack):
    """K rewrites of each question, one for each template, each of which opens with `word`.

    A template may hold {rest}, the question from its second word on, and {question}, the whole question.
    """

    word: str  # the first word of every rewrite
    templates: list[str]  # one a shot, each with {rest} or {question}

    def __post_init__(self) -> None:
        check_templates(self.templates, "templates")
        for template in self.templates:
            if not begins_with(template, [self.word]):
                raise ConfigError(f"templates: {template!r} does not open with the word {self.word!r}")

    @property
    def shots(self) -> int:
        return len(self.templates)

    def __call__(self, sample: Sample) -> list[Sample]:
        """None at all when a template cannot be filled, since the question's first word cannot be measured."""
        filled = [fill_template(template, sample) for template in self.templates]
        questions = [question for question in filled if question is not None]
        return [replace(sample, question=q) for q in questions] if len(questions) == self.shots else []


@dataclass(frozen=True)
class Prefix(Attack):
    """K rewrites of each question, one for each prefix: "what {question}", or "what", which means the same.

    Every character of the question stays, and nothing follows it.
    """

    prefixes: list[str]  # one a shot, with or without {question} at the end

    def __post_init__(self) -> None:
        if not self.prefixes:
            raise ConfigError("prefixes is empty; give at least one, such as 'what {question}'")
        for prefix in self.prefixes:
            before = prefix.removesuffix(QUESTION)
            if not before.strip() or re.search(r"[{}]", before):
                raise ConfigError(f"prefixes: {prefix!r}; expected text, then {{question}} or nothing")

    @property
    def shots(self) -> int:
        return len(self.prefixes)

    def __call__(self, sample: Sample) -> list[Sample]:
        return [replace(sample, question=_before(prefix) + sample.question) for prefix in self.prefixes]


def _before(prefix: str) -> str:
    return prefix.removesuffix(QUESTION) if prefix.endswith(QUESTION) else f"{prefix} "
