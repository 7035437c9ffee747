"""The settings of a method: every combination of a grid's values, or a random search's draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mirage_dist.data.stream import derived_seed
from mirage_dist.schema import ConfigError
from mirage_dist.schema.limits import POINTS
from mirage_dist.sweep.recipe import DrawConfig, MethodConfig, RandomConfig

DIGITS = 4  # significant ones of a drawn number: what a reader can type again
ATTEMPTS = 100  # draws for one setting before the keys are taken to have no further one

Values = Mapping[str, Any]  # swept key -> value


def settings(method: MethodConfig, key: str) -> list[Values]:
    """The values of every setting, in order. key: of the method in the recipe, for errors.

    Raises ConfigError for more settings than a sweep may have, a grid that names a value twice, and a random search
    whose keys have fewer different settings than it is to draw.
    """
    if method.random is not None:
        return list(_drawn(method.random, f"{key}.random"))
    grid = method.grid or {}
    count = math.prod(len(values) for values in grid.values())
    if count > POINTS.value:
        raise ConfigError(f"{key}.grid: {count:,} settings; a sweep has at most {POINTS}")
    for name, values in grid.items():
        for number, value in enumerate(values):
            if value in values[:number]:
                raise ConfigError(f"{key}.grid.{name}: {value!r} stands there twice; the points would be the same")
    return [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*grid.values())]


def _drawn(search: RandomConfig, key: str) -> Iterator[Values]:
    """One setting after another; a draw that repeats an earlier setting is drawn again."""
    seen: list[Values] = []
    for number in range(search.settings):
        for attempt in range(ATTEMPTS):
            drawn = {
                name: _draw(own, np.random.default_rng(derived_seed(search.seed, "sweep", number, attempt, name)))
                for name, own in search.keys.items()
            }
            if drawn not in seen:
                break
        else:
            raise ConfigError(
                f"{key}.settings={search.settings}: the keys have no more than {len(seen)} different settings, it "
                "seems; lower it, or give the keys more values"
            )
        seen.append(drawn)
        yield drawn


def _draw(own: DrawConfig, generator: np.random.Generator) -> Any:
    if own.values is not None:
        return own.values[int(generator.integers(len(own.values)))]
    assert own.low is not None
    assert own.high is not None
    if own.whole and own.scale == "linear":
        return int(generator.integers(math.ceil(own.low), math.floor(own.high), endpoint=True))
    if own.scale == "log":
        value = math.exp(generator.uniform(math.log(own.low), math.log(own.high)))
    else:
        value = float(generator.uniform(own.low, own.high))
    if own.whole:
        return min(max(round(value), math.ceil(own.low)), math.floor(own.high))
    return min(max(float(f"{value:.{DIGITS}g}"), own.low), own.high)
