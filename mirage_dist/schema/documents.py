"""Files that a user names: opened without waiting, read within limits, and parsed strictly.

Only regular files are read. A FIFO, a socket or a device could block, or never end.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from mirage_dist.schema.errors import ConfigError
from mirage_dist.schema.limits import DIGITS, NESTING, RECIPE_NESTING, RECIPE_VALUES, VALUE_FILE, Limit

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CHUNK = 1 << 20  # bytes read at a time


TOO_DEEP = f"nested too deep: over {NESTING}"


class Malformed(ValueError):
    """A text that is not what it should be. The message says why, and where in it."""


def open_file(path: Path | str) -> BinaryIO:
    """A regular file, opened for reading bytes.

    Raises ConfigError, which begins with the path, for anything else, at once: nothing waits for a writer or a device.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            # Should a FIFO take the file's place meanwhile, O_NONBLOCK keeps `open` from waiting for a writer.
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL character, or one that the file system's encoding cannot hold
        raise ConfigError(f"{path!s:.300}: cannot be read: {error}") from error
    what = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
    raise ConfigError(f"{path}: cannot be read: it is {what}; expected a regular file")


def read_bytes(path: Path | str, limit: Limit = VALUE_FILE) -> bytes:
    """The content of a regular file. Raises ConfigError as `open_file` does, and for one larger than `limit`."""
    parts, size = [], 0
    try:
        with open_file(path) as file:
            # A file of /proc states no size, so that only reading shows it.
            while (part := file.read(CHUNK)) and size <= limit.value:
                parts.append(part)
                size += len(part)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size > limit.value:
        raise ConfigError(f"{path}: larger than {limit}, the limit of a {limit.name}")
    return b"".join(parts)


def decoded(raw: bytes, path: Path | str) -> str:
    """The text of a file in UTF-8, without a byte-order mark. Raises ConfigError naming the line for any other file."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise ConfigError(
            f"{path}: cannot be read: line {line} is not UTF-8 ({error.reason}); convert the file to UTF-8"
        ) from error


# ---------------------------------------------------------------------------------------------------- JSON


def parse_json(text: str, line: int = 1) -> Any:
    """The value of a JSON text. line: that in which the text begins, for messages.

    Raises Malformed with line and column, for nesting over its limit, and for a whole number of too many digits.
    """
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Malformed(f"{error.msg}: line {line + error.lineno - 1} column {error.colno}") from error
    except RecursionError:
        raise Malformed(f"{TOO_DEEP}: line {line}") from None
    except ValueError as error:
        raise Malformed(f"{error}: line {line}") from error
    if deep(text, value):
        raise Malformed(f"{TOO_DEEP}: line {line}")
    return value


def read_json(path: Path | str, content: str | None = None) -> Any:
    """A file that is one JSON value. content: its text, if that has been read. Raises ConfigError naming the file."""
    try:
        return parse_json(decoded(read_bytes(path), path) if content is None else content)
    except Malformed as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def deep(text: str, value: Any, start: int = 0, end: int | None = None) -> bool:
    """Whether a value of JSON is nested over the limit. text, start, end: its text is text[start:end]."""
    if text.count("[", start, end) + text.count("{", start, end) <= NESTING.value:
        return False
    level = [value]
    for _ in range(NESTING.value):
        level = [part for node in level for part in _parts(node) if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _parts(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _whole(digits: str) -> int:
    if len(digits) > DIGITS.value:
        raise ValueError(f"a number of {len(digits)} digits; at most {DIGITS.value} are read")
    return int(digits)


DECODER = json.JSONDecoder(parse_int=_whole)


# ---------------------------------------------------------------------------------------------------- YAML


def check_yaml(text: str) -> None:
    """Raise Malformed for YAML that would take too much memory or stack to build.

    That is for nesting over the limit, for aliases that expand to too many values, and for a value that holds itself.
    Syntax that only building shows to be wrong is left to the builder; what the scanner rejects raises yaml.YAMLError.
    """
    sizes: dict[str, tuple[int, int]] = {}  # anchor -> values and levels of what it stands for
    stack: list[list[Any]] = [["", 0, 0]]  # anchor, values and levels of each open collection
    for event in yaml.parse(text, Loader=LOADER):
        anchor, size, levels = None, 1, 0
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append([event.anchor, 1, 1])
            if len(stack) - 1 > RECIPE_NESTING.value:
                raise Malformed(f"nested too deep: over {RECIPE_NESTING}{_line(event)}")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size, levels = stack.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor = event.anchor
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == name for name, *_ in stack):
                raise Malformed(f"the alias *{event.anchor} stands within what it names{_line(event)}")
            size, levels = sizes.get(event.anchor, (1, 0))
        else:
            continue
        if anchor:
            sizes[anchor] = size, levels
        top = stack[-1]
        top[1] += size
        top[2] = max(top[2], levels + 1)
        if top[1] > RECIPE_VALUES.value:
            raise Malformed(f"holds more than {RECIPE_VALUES}, aliases expanded{_line(event)}")
        if len(stack) - 1 + levels > RECIPE_NESTING.value:
            raise Malformed(f"nested too deep: over {RECIPE_NESTING}, aliases expanded{_line(event)}")


def _line(event: Any) -> str:
    return f": line {event.start_mark.line + 1}" if event.start_mark is not None else ""


def value_fault(value: Any, place: str = "") -> str | None:
    """Why a value in a recipe cannot be written to JSON and read back as the same, with its place; None if it can."""
    stack = [(value, place)]
    while stack:
        node, at = stack.pop()
        if isinstance(node, Mapping):
            for name, part in node.items():
                if not isinstance(name, str):
                    return f"{at or 'the recipe'} has the key {name!r}; expected text as a key, in quotes"
                stack.append((part, f"{at}.{name}" if at else name))
        elif isinstance(node, list | tuple):
            stack += [(part, f"{at}[{number}]") for number, part in enumerate(node)]
        elif isinstance(node, float) and not math.isfinite(node):
            return f"{at}={node}; expected a finite number"
        elif isinstance(node, int) and not isinstance(node, bool) and not -(2**63) <= node < 2**64:
            return f"{at}: a whole number of more than 64 bits; put text of digits in quotes"
        elif node is not None and not isinstance(node, str | int | float):
            return f"{at}: {type(node).__name__}; expected text, a number, true, false, a list or a mapping"
    return None


def whole_number(text: str) -> int | None:
    """The number that a text of one to nine decimal digits is, such as a process id; None for any other text.

    Of thousands of digits `int` makes no number but an error.
    """
    return int(text) if text.isdecimal() and len(text) <= 9 else None
