"""Draws that meet their shares exactly: even choices, and the first words of safety questions."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def generator(seed: int, part: str) -> np.random.Generator:
    """An independent generator for each part of a world: drawing more from one does not change the others."""
    return np.random.default_rng([seed, zlib.crc32(part.encode())])


def evenly(rng: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    """`count` items in random order, each as often as any other (to one)."""
    return [items[i % len(items)] for i in rng.permutation(count)]


@dataclass(frozen=True)
class Openers:
    """The first words of safety questions, with their shares within a family.

    refused: those tied to refusals; answered: to answers; neutral: those that open both classes evenly.
    """

    refused: Mapping[str, float]
    answered: Mapping[str, float]
    neutral: Sequence[str]

    def of_class(
        self, rng: np.random.Generator, unsafe: bool, count: int, spurious: float, neutral: float
    ) -> list[str]:
        """The first words of `count` safety questions of one class, in random order.

        A share `neutral` is spread evenly over the neutral words, the same in both classes. Of the rest, a share
        `spurious` opens with the class's own family (refused words for unsafe questions) and the others with the
        other family. Shares are met exactly up to rounding, not on average, which reduces the variance of small sets.
        """
        own, other = (self.refused, self.answered) if unsafe else (self.answered, self.refused)
        of_neutral = round(neutral * count)
        of_own = round(spurious * (count - of_neutral))
        words = [
            *_spread(dict.fromkeys(self.neutral, 1 / len(self.neutral)), of_neutral),
            *_spread(own, of_own),
            *_spread(other, count - of_neutral - of_own),
        ]
        return [words[i] for i in rng.permutation(count)]


def _spread(shares: Mapping[str, float], count: int) -> list[str]:
    """`count` words with these shares; each word's number is off by less than one."""
    edges = np.rint(np.cumsum([0.0, *shares.values()]) * count).astype(int)
    return [word for word, times in zip(shares, np.diff(edges), strict=True) for _ in range(times)]
