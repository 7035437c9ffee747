"""Names and places that a recipe gives, which become parts of paths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from mirage_dist.schema.errors import ConfigError

LONGEST_NAME = 80  # characters
LONGEST_PLACE = 3000  # bytes; Linux takes 4096, and files and folders are made below a place
LONGEST_PART = 220  # bytes of one part of a path: file systems take 255, and temporaries have longer names
DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)")


@dataclass(frozen=True)
class Check:
    """Marks a field in a schema, `Annotated[str, Check(…)]`. problem: what is wrong with a value, None if nothing."""

    problem: Callable[[Any], str | None]

    def __call__(self, value: object, key: str) -> None:
        """Raise ConfigError, which begins with `key`, for a value that is not right."""
        if problem := self.problem(value):
            raise ConfigError(f"{key}={shown(value)}; {problem}")


def shown(value: object) -> str:
    """A value for a message: its repr, without its middle where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:70]}…{text[-20:]}"


def _no_name(value: str) -> str | None:
    if DEVICE.match(value):
        return "expected another name: shared file systems of Windows cannot hold this one"
    if re.fullmatch(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}", value) and not value.endswith("."):
        return None
    return f"expected a name: 1 to {LONGEST_NAME} of A-Z, a-z, 0-9, '.', '_' and '-', no dot at either end"


def _no_place(value: str) -> str | None:
    if not value or "\0" in value:
        return "expected a path: not empty, and without a NUL character"
    try:
        raw = os.fsencode(value)
    except UnicodeEncodeError:
        return "expected a path that UTF-8 can hold"
    if len(raw) > LONGEST_PLACE or any(len(part) > LONGEST_PART for part in raw.split(b"/")):
        return f"expected a path of at most {LONGEST_PLACE} bytes, each part of it at most {LONGEST_PART}"
    return None


NAME, PLACE = Check(_no_name), Check(_no_place)
Name = Annotated[str, NAME]  # of a run, suite, set, attack or judge: part of a file's name
Place = Annotated[str, PLACE]  # of a file or folder
