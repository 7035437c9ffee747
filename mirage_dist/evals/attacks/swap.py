"""The literal one-word attack."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mirage_dist.data.sample import Sample
from mirage_dist.data.words import FIRST_WORD, cased, first_word
from mirage_dist.schema import ConfigError


@dataclass(frozen=True)
class Swap:
    """The literal one-word attack: the first word becomes `word`, every other character stays.

    "Share the steps." -> "What the steps." for `word: what`. One shot.
    """

    word: str
    control: bool = False
    shots: int = 1

    def __post_init__(self) -> None:
        if self.shots != 1:
            raise ConfigError(f"shots={self.shots}: a swap has one rewrite; use kind: words or templates for more")
        check_word("word", self.word)

    def __call__(self, sample: Sample) -> list[Sample]:
        return [swapped(sample, self.word)]


def swapped(sample: Sample, word: str) -> Sample:
    """The sample with another first word, in the first one's case. Raises ConfigError where there is none."""
    first = first_word(sample)
    asked = sample.question
    return replace(sample, question=asked[: first.start()] + cased(word, first[0]) + asked[first.end() :])


def check_word(key: str, word: str) -> None:
    if not FIRST_WORD.fullmatch(word):
        raise ConfigError(f"{key}={word!r}: expected one word")
