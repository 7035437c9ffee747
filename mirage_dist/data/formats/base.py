"""What every format shares: how files are read, and how a bad record is told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mirage_dist.data import records as streamed
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError, SourceConfig


class BadRecord(ValueError):
    """A record that is not what the format says; whoever reads the file adds its name and the number."""


@dataclass(frozen=True)
class Opened:
    """A file's records, not yet looked at, and how one of them (with its number from 0) becomes samples.

    records: None for those of the file itself as `data.records` reads it, one at a time.
    parse: counts what is left out on purpose by its reason. Raises BadRecord naming field and expectation.
    """

    records: Sequence[Any] | None
    parse: Callable[[Mapping, int, Counter[str]], Iterator[Sample]]


Parse = Callable[[SourceConfig, Mapping, int, Counter[str]], Iterator[Sample]]


def listed(parse: Parse) -> Callable[[SourceConfig], Opened]:
    """The format of a file that is a JSON list, one object a line, or a table."""
    return lambda config: Opened(None, lambda *told: parse(config, *told))


def records(path: Path) -> list[Any]:
    """All records of a file at once, for what has to be looked up. Raises ConfigError as `data.records.read` does."""
    return list(streamed.read(path))


def contents(path: Path) -> str:
    """The text of a file that is not empty, without a byte-order mark."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty")
    return text


def decoded(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def table(path: Path) -> dict[str, Any]:
    """A file that is one JSON object, such as problems by their id."""
    value = decoded(path, contents(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected one JSON object, got {type(value).__name__}")
    return value


def within(path: Path, key: str) -> list[Any]:
    """The list of records under `key` of a file that is one JSON object."""
    found = table(path).get(key)
    if not isinstance(found, list):
        raise ConfigError(f"{path}: field {key!r}: expected a list of records")
    return found


def get(record: Mapping, name: str, kind: type) -> Any:
    """A field of this type."""
    if name not in record:
        raise BadRecord(f"field {name!r} is missing")
    if not isinstance(record[name], kind):
        raise BadRecord(f"field {name!r}: expected {kind.__name__}, got {record[name]!r:.80}")
    return record[name]


def text(record: Mapping, name: str) -> str:
    """A field of text; an id may be a whole number."""
    value = record.get(name)
    if name in ("id", "question_id", "image_id") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return get(record, name, str)


def identity(record: Mapping, number: int) -> str:
    """The record's id, or its number where it has none."""
    return text(record, "id") if record.get("id") is not None else str(number)


def picture(config: SourceConfig, name: str) -> str:
    """Under `images`; the file's own folder by default. An absolute path stays."""
    return str(_folder(config.images, config.path) / name)


@lru_cache
def _folder(images: str | None, file: str) -> Path:
    return Path(images or Path(file).parent)
