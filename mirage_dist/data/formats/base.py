"""What every format shares: its base class, readers for files that are looked up whole, and checked record fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from mirage_dist.data import pictures, tables
from mirage_dist.data import records as streamed
from mirage_dist.data.published import hub
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError, SourceConfig
from mirage_dist.schema.limits import ANNOTATIONS

Split = Literal["unsafes", "safe_safes", "safe_unsafes"]  # unsafe pictures; safe and unsafe questions on safe pictures
Parse = Callable[[Mapping[str, Any], int, Counter[str]], Iterator[Sample]]


class BadRecord(ValueError):
    """A record that does not conform to its format. `data.sources` adds the file and the record's number."""


@dataclass(frozen=True)
class Opened:
    """A source's records, unchecked, and the function that turns a record (and its number from 0) into samples.

    records: None for the records of the file itself, read one at a time by `data.records`.
    parse: see `Format.parse`.
    """

    records: Iterable[Any] | None
    parse: Parse


@dataclass(frozen=True)
class Format(SourceConfig):
    """One source in one format. A format is a subclass; its own dataclass fields are the options that recipes may set.

    `parse` is all that most formats define. The class attributes say what the rest of the package may do with it.
    """

    signature: ClassVar[frozenset[str]] = frozenset()  # fields that identify its records for `mirage audit`
    labelled: ClassVar[bool] = False  # whether `safe` is a label of the data, for `mirage audit --response-kind label`
    folder: ClassVar[str | None] = None  # glob of its files when `path` may be a folder, such as "*.json"

    def parse(self, record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
        """The samples of one record. number: its position in the file, from 0.

        dropped: reason -> count; add to it what is left out on purpose. Raises BadRecord naming field and expectation.
        """
        raise NotImplementedError(f"{type(self).__name__}.parse")

    def open(self) -> Opened:
        """Override it for a file that is no list of records, or to read other files (annotations) once.

        Raises ConfigError naming a file that cannot be read.
        """
        return Opened(None, self.parse)

    def pattern(self) -> str | None:
        """The glob of its files where `path` is a folder of them (see `folder`); None for any other path."""
        return self.folder if self.folder is not None and Path(self.path).is_dir() else None

    def published(self) -> hub.Split | None:
        """What the cache has of the hub's split; None for a path of this machine. Raises ConfigError as `hub.split`."""
        where = hub.address(self.path)
        return None if where is None else hub.split(where, self.config, self.hub_split)

    def parts(self) -> list[Format]:
        """This source as sources of files on this machine: itself, or one for each file of the hub's split."""
        if (published := self.published()) is None:
            whole: list[Format] = [self]
            return whole
        own = {"config": None, self.split_key: None}
        return [replace(self, path=str(file), **own) for file in published.files]

    @classmethod
    def recognises(cls, record: Mapping[str, Any]) -> bool:
        """Whether a record looks like this format's: for `mirage audit` without --format."""
        return bool(cls.signature) and cls.signature <= record.keys()

    def of_split(self, split: Split) -> Format | None:
        """This source restricted to one split, None when it has no sample of that split.

        Formats other than VLGuard's have safe and unsafe pairs, distinguished by `Sample.safe`.
        """
        return None if split == "safe_unsafes" else self

    def other_files(self) -> dict[str, str]:
        """Option -> path of the files that are read besides `path`: `mirage prepare` records their hashes."""
        return {}

    def picture(self, name: str) -> str:
        """The path of a picture under `images`, by default the file's own folder. An absolute path stays.

        So does a picture that is stored in a table (see `image`). Raises BadRecord for a URL or base64.
        """
        if isinstance(name, pictures.Reference):
            return str(name)
        if (fault := pictures.no_path(name)) is not None:
            raise BadRecord(f"field 'image': {fault}")
        return str(_folder(self.images, self.path) / name)


def records(path: Path) -> list[Any]:
    """All records of a file at once, for files that are looked up. Raises ConfigError as `data.records.read` does."""
    return list(streamed.read(path))


def table(path: Path) -> dict[str, Any]:
    """A file that is one JSON object, such as problems by their id. Raises ConfigError for anything else."""
    value = streamed.value(path, streamed.text(path, ANNOTATIONS))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected one JSON object, got {type(value).__name__}")
    return value


def within(path: Path, key: str) -> list[Any]:
    """The list of records under `key` of a file that is one JSON object. Raises ConfigError for anything else."""
    listed = table(path).get(key)
    if not isinstance(listed, list):
        raise ConfigError(f"{path}: field {key!r}: expected a list of records")
    return listed


def get(record: Mapping, name: str, kind: type) -> Any:
    """The value of a record's field. Raises BadRecord when it is missing or not of this type."""
    if name not in record:
        raise BadRecord(f"field {name!r} is missing")
    if not isinstance(record[name], kind):
        raise BadRecord(f"field {name!r}: expected {kind.__name__}, got {record[name]!r:.80}")
    return record[name]


def text(record: Mapping, name: str) -> str:
    """The text of a record's field; an id may be a whole number. Raises BadRecord as `get`."""
    value = record.get(name)
    if name in ("id", "question_id", "image_id") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return get(record, name, str)


def image(record: Mapping, name: str = "image") -> str:
    """What a record's field says about its picture, for `Format.picture`: a path, or where a table stores it.

    Raises BadRecord as `get`.
    """
    value = record.get(name)
    return value.reference if isinstance(value, tables.Binary) else text(record, name)


def identity(record: Mapping, number: int) -> str:
    """The record's id, or its number when it has none."""
    return text(record, "id") if record.get("id") is not None else str(number)


@lru_cache
def _folder(images: str | None, file: str) -> Path:
    return Path(images or Path(file).parent)
