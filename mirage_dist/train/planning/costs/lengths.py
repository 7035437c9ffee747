"""How long the samples are: measured on the data, or described before there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mirage_dist.schema import ConfigError
from mirage_dist.schema.limits import COUNT, TOKENS

DRAWN = 2048  # rows that stand for described data


@dataclass(frozen=True)
class Lengths:
    """Tokens of a stream's rows after truncation, and of the responses in them: (n,) each.

    samples: their number; the rows of described data stand for all of them. pictured: the share that has a picture.
    """

    rows: np.ndarray
    responses: np.ndarray
    samples: int
    pictured: float = 1.0

    @cached_property
    def mean(self) -> float:
        """Tokens of a row."""
        return float(self.rows.mean())

    @cached_property
    def square(self) -> float:
        """The mean of squared lengths: what attention costs."""
        return float((self.rows.astype(float) ** 2).mean())

    @cached_property
    def response(self) -> float:
        """Response tokens of a row."""
        return float(self.responses.mean())

    @property
    def longest(self) -> int:
        return int(self.rows.max())

    @property
    def longest_response(self) -> int:
        return int(self.responses.max())


@dataclass(frozen=True)
class Described:
    """Data that are not there yet. tokens, responses: mean and largest number of each sample."""

    samples: int
    tokens: tuple[float, int]
    responses: tuple[float, int]

    def __post_init__(self) -> None:
        for what, (mean, longest) in (("--tokens", self.tokens), ("--responses", self.responses)):
            if not 1 <= mean <= longest:
                raise ConfigError(f"{what} {mean:g},{longest}: expected MEAN,LONGEST with 1 <= MEAN <= LONGEST")
        if self.responses[0] > self.tokens[0] or self.responses[1] > self.tokens[1]:
            raise ConfigError("--responses: they are part of --tokens, so neither number can be the larger one")

    def of(self, max_length: int) -> Lengths:
        """Lengths of this mean and longest, cut at `max_length`."""
        rows, responses = _spread(*self.tokens), _spread(*self.responses)
        return Lengths(np.minimum(rows, max_length), np.minimum(responses, max_length), self.samples)


def described(samples: int | None, tokens: str | None, responses: str | None) -> Described | None:
    """The data that three options describe: a number, and MEAN or MEAN,LONGEST. None where none is given.

    Raises ConfigError when some of them are missing, or are no such numbers.
    """
    given = {"--samples": samples, "--tokens": tokens, "--responses": responses}
    if all(value is None for value in given.values()):
        return None
    if missing := [name for name, value in given.items() if value is None]:
        raise ConfigError(f"{' and '.join(missing)}: missing; data are described by all of {', '.join(given)}")
    assert samples is not None
    if not 1 <= samples <= COUNT.value:
        raise ConfigError(f"--samples {samples}: expected a whole number from 1 to {COUNT}")
    return Described(samples, _pair("--tokens", tokens), _pair("--responses", responses))


def measured(lengths: np.ndarray, longest: int, pictured: np.ndarray) -> Lengths:
    """Of a stream whose samples were measured: lengths (2, n) as in `Feed.measured`, cut at `longest` tokens.

    pictured: whether each sample has a picture: (n,).
    """
    rows, responses = lengths
    return Lengths(np.minimum(rows, longest), responses, len(rows), float(np.mean(pictured)))


def padded(lengths: Mapping[str, Lengths], micro_batch: int) -> float:
    """The expected width of a padded micro-batch: the longest of `micro_batch` rows drawn from each stream.

    P(longest <= x) is the product over streams of P(row <= x) ^ micro_batch.
    """
    values = np.unique(np.concatenate([own.rows for own in lengths.values()]))
    below = np.ones(len(values))
    for own in lengths.values():
        below *= (np.searchsorted(np.sort(own.rows), values, side="right") / len(own.rows)) ** micro_batch
    return float((values * np.diff(below, prepend=0.0)).sum())


def _pair(option: str, text: Any) -> tuple[float, int]:
    mean, _, longest = str(text).partition(",")
    try:
        pair = float(mean), int(longest or round(float(mean)))
    except (ValueError, OverflowError):
        pair = 0.0, 0
    if not 1 <= pair[0] <= TOKENS.value or not 1 <= pair[1] <= TOKENS.value:
        raise ConfigError(f"{option} {text!r}: expected MEAN or MEAN,LONGEST in tokens, such as 700 or 700,1200")
    return pair


def _spread(mean: float, longest: int) -> np.ndarray:
    """DRAWN lengths from 1 to `longest` of this mean: 1 + (longest − 1) · u^k for even u, whose mean fixes k."""
    if mean >= longest - 0.5:
        return np.full(DRAWN, longest)
    power = (longest - 1) / max(mean - 1, 1e-9) - 1
    spread = 1 + (longest - 1) * ((np.arange(DRAWN) + 0.5) / DRAWN) ** power
    spread[-1] = longest
    return np.rint(spread).astype(np.int64)
