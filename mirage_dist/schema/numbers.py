"""Ranges of the numbers in a recipe: each type here is a number with a check that names its range.

Every number of a recipe, in this package and in the options of its objectives, optimizers, attacks, judges and formats,
has one of these types (held by tests/unit/test_limits.py).
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from mirage_dist.schema.errors import ConfigError
from mirage_dist.schema.limits import (
    BATCH,
    CEILING,
    COUNT,
    DRAWN,
    EPOCHS,
    LAYERS,
    LOCAL,
    MAGNITUDE,
    RANKS,
    REPEATS,
    SECONDS,
    SEED,
    STEPS,
    TOKENS,
    WIDTH,
)
from mirage_dist.schema.names import Check

DAY = 86_400  # seconds


def whole(low: int, high: int) -> Check:
    """The check of a whole number in a range, both ends included."""
    start = "above 0, at most" if low == 1 else f"from {low} to"
    return Check(lambda x: None if low <= x <= high else f"expected a whole number {start} {high:,}")


def real(low: float, high: float, what: str = "a number", above: bool = False, below: bool = False) -> Check:
    """The check of a number in a range. above, below: without its lower, its upper end. what: names it in messages."""
    if above:
        expected = f"{what} above {low:,g}, {'below' if below else 'at most'} {high:,g}"
    else:
        expected = f"{what} of at least {low:,g}, {'below' if below else 'at most'} {high:,g}"

    def problem(x: float) -> str | None:
        inside = (low < x if above else low <= x) and (x < high if below else x <= high)
        return None if inside else f"expected {expected}"

    return Check(problem)


def or_word(hints: Sequence[Any], value: Any, check: Callable[[Any], Any]) -> Any:
    """The value of a field that may also be null, or one of the words beside its type, such as `auto`.

    hints: the parts of the field's union. check: gives the value as one of them has it, or raises ConfigError.
    """
    if value is None and type(None) in hints:
        return None
    first, *others = (hint for hint in hints if hint is not type(None))
    words = [word for hint in others for word in typing.get_args(hint)]
    if isinstance(value, str) and value in words:
        return value
    try:
        return check(first)
    except ConfigError as error:
        if not words:
            raise
        raise ConfigError(f"{error}, or {', '.join(words)}") from error


Count = Annotated[int, whole(1, COUNT.value)]
FromZero = Annotated[int, whole(0, COUNT.value)]
Steps = Annotated[int, whole(1, STEPS.value)]
Batch = Annotated[int, whole(1, BATCH.value)]
Layer = Annotated[int, whole(0, LAYERS.value - 1)]
Ranks = Annotated[int, whole(1, RANKS.value)]
Drawn = Annotated[int, whole(1, DRAWN.value)]  # samples of the embedded world
Width = Annotated[int, whole(1, WIDTH.value)]
Tokens = Annotated[int, whole(1, TOKENS.value)]
Workers = Annotated[int, whole(0, LOCAL.value)]  # processes beside the one that starts them
Parallel = Annotated[int, whole(1, LOCAL.value)]  # at a time
Repeats = Annotated[int, whole(1, REPEATS.value)]
Retries = Annotated[int, whole(0, REPEATS.value)]
Seed = Annotated[int, whole(0, SEED.value)]
Pixels = Annotated[int, whole(1, CEILING.value)]

Shades = Annotated[int, whole(1, 255)]  # by which a value of a picture's pixel may change
Side = Annotated[int, whole(1, 4096)]  # of a square of pixels

Positive = Annotated[float, real(0, MAGNITUDE.value, above=True)]
Weight = Annotated[float, real(0, MAGNITUDE.value)]  # also a coefficient that may be 0
Temperature = Annotated[float, real(0.01, 100, "a temperature")]  # vLLM takes one below .01 for .01
ShadeStep = Annotated[float, real(0, 255, "a number of shades", above=True)]
Epochs = Annotated[float, real(0, EPOCHS.value, above=True)]
Seconds = Annotated[float, real(0, SECONDS.value, "a number of seconds", above=True)]
Timeout = Annotated[float, real(0, DAY, "a number of seconds", above=True)]
Pause = Annotated[float, real(0, DAY, "a number of seconds")]
Share = Annotated[float, Check(lambda x: None if 0 <= x <= 1 else "expected a share from 0 to 1")]
SomeShare = Annotated[float, real(0, 1, "a share", above=True)]  # not 0
PartShare = Annotated[float, Check(lambda x: None if 0 <= x < 1 else "expected a share from 0 to below 1")]
