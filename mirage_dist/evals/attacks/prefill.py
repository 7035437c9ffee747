"""The prefill attack: the model continues an answer whose first words are already given.

Whoever runs a model can fill in the beginning of its answer. A guard that sits in an answer's first words is bypassed,
and what the weights still hold comes out (Carlini et al., arXiv 2202.07646, prompt for memorised text in this way).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Attack
from mirage_dist.schema import ConfigError
from mirage_dist.schema.numbers import Count, Repeats

WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Prefill(Attack):
    """The first `words` words of the sample's answer are given; only the model's continuation is judged.

    content: a regular expression of the part of an answer that must not be given. Where it begins within the first
    `words` words, the given text ends before it. Without one, all words but the last may be given. A sample of whose
    answer nothing can be given has no rewrite.
    """

    words: Count  # of the answer that are given, at most
    content: str | None = None
    shots: Repeats = 1  # always 1: an answer is begun in one way

    begins = True

    def __post_init__(self) -> None:
        if self.shots != 1:
            raise ConfigError(f"shots={self.shots}: an answer is begun in one way")
        check_pattern("content", self.content)

    def __call__(self, sample: Sample) -> list[Sample]:
        given = begin(sample.answer, self.words, self.content)
        return [replace(sample, begun=given)] if given else []


def begin(answer: str, words: int, content: str | None) -> str:
    """The first words of an answer up to its content; empty when it begins with the content."""
    spans = list(WORD.finditer(answer))
    end = spans[-1].start() if spans else 0
    if content is not None and (match := re.search(content, answer)):
        end = match.start()
    given = [span.end() for span in spans if span.end() <= end][:words]
    return answer[: given[-1]] if given else ""


def check_pattern(name: str, pattern: str | None) -> None:
    """Raise ConfigError for an invalid regular expression and for one that matches the empty text."""
    try:
        empty = pattern is not None and re.fullmatch(pattern, "") is not None
    except re.error as error:
        raise ConfigError(f"{name}={pattern!r}: no regular expression: {error}") from error
    if empty:
        raise ConfigError(f"{name}={pattern!r}: matches the empty text; expected a pattern of the content of an answer")
