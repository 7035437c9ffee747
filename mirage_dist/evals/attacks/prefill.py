"""The attack that begins the answer: the model is asked and finds its first words said already.

Whoever runs a model can put words into its mouth. A guard that sits in an answer's first words is walked around, and
what the weights still hold comes out (Carlini et al., arXiv 2202.07646, ask for memorised text so).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Prefill:
    """The first `words` words of the sample's answer are given; what the model goes on with is what gets judged.

    content: a regular expression of the part of an answer that is not to be told. Nothing of it is ever given: where it
    begins earlier, what is given ends before it. Without one, all words but the last may be given. No rewrite for an
    answer of which nothing could be given then.
    """

    words: int
    content: str | None = None
    control: bool = False
    shots: int = 1

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ConfigError(f"words={self.words}: expected 1 or more")
        if self.shots != 1:
            raise ConfigError(f"shots={self.shots}: an answer is begun in one way")
        check_pattern("content", self.content)

    def __call__(self, sample: Sample) -> list[Sample]:
        given = begin(sample.answer, self.words, self.content)
        return [replace(sample, begun=given)] if given else []


def begin(answer: str, words: int, content: str | None) -> str:
    """The first words of an answer, nothing of its content among them; empty where it begins with that."""
    found = list(WORD.finditer(answer))
    end = found[-1].start() if found else 0
    if content is not None and (told := re.search(content, answer)):
        end = told.start()
    given = [word.end() for word in found if word.end() <= end][:words]
    return answer[: given[-1]] if given else ""


def check_pattern(name: str, pattern: str | None) -> None:
    """Raise ConfigError for what is no regular expression, or one that matches nothing at all."""
    try:
        empty = pattern is not None and re.fullmatch(pattern, "") is not None
    except re.error as error:
        raise ConfigError(f"{name}={pattern!r}: no regular expression: {error}") from error
    if empty:
        raise ConfigError(f"{name}={pattern!r}: matches the empty text; expected a pattern of what is told")
