"""What goes wrong with words of its own, and how a field is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mirage_dist.schema import secrets


class _Fault(Exception):
    """An error for people. Its message never repeats what looks like a key, wherever somebody has written one."""

    def __init__(self, message: object = "") -> None:
        super().__init__(secrets.masked(str(message)))


class ConfigError(_Fault, ValueError):
    """A recipe, an override or a data file does not say what it must; the message says where and what to do."""

    status = 2  # of the process that ends by it


class RunError(_Fault, RuntimeError):
    """A run cannot go on, through no fault of its recipe; the message says what happened and what is left whole."""

    status = 1


def require(config: Any, names: Sequence[str], expected: str, right: Callable[[Any], bool]) -> None:
    """Raise ConfigError for a field that is given and not right; the recipe's key is put before it by `load`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not right(value):
            raise ConfigError(f"{name}={value!r}; expected {expected}")
