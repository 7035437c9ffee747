"""Records of a data file, one at a time: a JSON list, one object a line, Parquet, or a Hugging Face dataset on disk.

No file is held whole, so that a corpus may be larger than memory.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mirage_dist.schema import ConfigError

CHUNK = 1 << 20  # bytes read at a time
LARGEST = 1 << 26  # characters of one record of a JSON list; a record that does not end by then counts as broken
BLANKS = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
TABLES = (".parquet", ".arrow")
EMBEDDED = "picture-inside-the-dataset"  # in place of the path of a picture that is stored in the table itself

OnBytes = Callable[[int], object]  # called with the number of further bytes that were read


def read(path: Path, on_bytes: OnBytes = lambda size: None) -> Iterator[Any]:
    """The records in order. A folder is a dataset written by `datasets.save_to_disk`, or holds Parquet or Arrow files.

    Raises ConfigError for a file that cannot be read, is empty, or is none of these; for JSON with record, line and
    column.
    """
    return _tables(path, on_bytes) if path.is_dir() or path.suffix in TABLES else _json(path, on_bytes)


def size(path: Path) -> int:
    """Bytes that `read` will report to `on_bytes` in all. Raises ConfigError as `read` does."""
    try:
        return sum(file.stat().st_size for file in ([path] if path.is_file() else _parts(path)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


# --------------------------------------------------------------------------------------------------- JSON


def _json(path: Path, on_bytes: OnBytes) -> Iterator[Any]:
    pieces = _pieces(path, on_bytes)
    start = next((piece for piece in pieces if piece.strip()), "")
    mark = start.strip()[:1]
    if not mark:
        raise ConfigError(f"{path}: the file is empty")
    pieces = chain([start], pieces)
    return _lines(path, pieces) if mark == "{" else _list(path, _Text(pieces))


def _pieces(path: Path, on_bytes: OnBytes) -> Iterator[str]:
    """The file's text, a piece at a time, with or without a byte-order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                on_bytes(len(chunk))
                yield decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _lines(path: Path, pieces: Iterator[str]) -> Iterator[Any]:
    def lines() -> Iterator[str]:
        rest = ""
        for piece in pieces:
            *whole, rest = (rest + piece).split("\n")
            yield from whole
        yield rest

    for number, line in enumerate(filter(str.strip, lines())):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}: record {number}: not JSON: {error} (expected a list of records, or one object a line)"
            ) from error
        yield record


def _list(path: Path, text: _Text) -> Iterator[Any]:
    number = 0
    try:
        if text.mark() != "[":
            raise ConfigError(f"{path}: expected a list of records, got {type(text.value()).__name__}")
        text.at += 1
        more = text.mark() != "]"
        while more:
            yield text.value()
            number += 1
            more = text.mark() == ","
            if more:
                text.at += 1
                text.mark()
            elif text.mark() != "]":
                raise text.fault("Expecting ',' delimiter")
        text.at += 1
        if text.mark():
            raise text.fault("Extra data")
    except _NotJson as error:
        raise ConfigError(f"{path}: record {number}: not JSON: {error}") from error


class _NotJson(ValueError):
    """A syntax error, with line and column."""


class _Text:
    """A text that arrives in pieces, of which only the unread rest is kept."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces, self.text, self.at = pieces, "", 0
        self.line, self.column = 1, 1  # of the first character that is kept

    def mark(self) -> str:
        """Advance to the next character that is no blank, and return it; "" at the end."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """Decode the value that begins here. Raises _NotJson."""
        while True:
            try:
                value, self.at = DECODER.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                # Either a syntax error, or the value's end has not arrived yet.
                if len(self.text) - self.at > LARGEST or not self._more():
                    raise self.fault(error.msg, error.pos) from error

    def fault(self, what: str, at: int | None = None) -> _NotJson:
        line, column = self._place(self.at if at is None else at)
        return _NotJson(f"{what}: line {line} column {column}")

    def _more(self) -> bool:
        piece = next(self.pieces, None)
        if piece is None:
            return False
        self.line, self.column = self._place(self.at)
        self.text, self.at = self.text[self.at :] + piece, 0
        return True

    def _place(self, at: int) -> tuple[int, int]:
        lines, last = self.text.count("\n", 0, at), self.text.rfind("\n", 0, at)
        return self.line + lines, at - last if lines else self.column + at


# ------------------------------------------------------------------------------------------------- tables


def _parts(path: Path) -> list[Path]:
    """The files of a folder of tables, in order."""
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(json.loads((path / "dataset_dict.json").read_text())["splits"])
        raise ConfigError(f"{path}: holds several splits ({splits}); name the folder of one split")
    if (path / "state.json").is_file():
        return [path / part["filename"] for part in json.loads((path / "state.json").read_text())["_data_files"]]
    files = sorted(file for file in path.glob("*") if file.suffix in TABLES)
    if not files:
        raise ConfigError(f"{path}: no such file, or a folder without a dataset (state.json, *.parquet or *.arrow)")
    if len({file.suffix for file in files}) > 1:
        raise ConfigError(f"{path}: holds Parquet and Arrow files; name the files of one kind")
    return files


def _tables(path: Path, on_bytes: OnBytes) -> Iterator[Any]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{path}: datasets on disk need pyarrow: pip install 'mirage-dist[arrow]'")
    errors = (OSError, _pyarrow("lib").ArrowException)
    for file in _parts(path) if path.is_dir() else [path]:
        try:
            for batch in _batches(file):
                columns = [_column(column) for column in batch.columns]
                for values in zip(*columns, strict=True):
                    yield _without_nulls(dict(zip(batch.schema.names, values, strict=True)))
        except errors as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from error
        on_bytes(file.stat().st_size)


def _pyarrow(part: str) -> Any:
    """A module of pyarrow, which is optional: a type checker may not have it either."""
    return importlib.import_module(f"pyarrow.{part}")


def _batches(file: Path) -> Iterator[Any]:
    """Record batches; bytes of pictures are left on the disk where the format allows."""
    if file.suffix == ".parquet":
        table = _pyarrow("parquet").ParquetFile(file)
        names = [table.schema.column(i).path for i in range(len(table.schema))]
        yield from table.iter_batches(1024, columns=[name for name in names if not name.endswith(".bytes")])
        return
    ipc = _pyarrow("ipc")
    with _pyarrow("lib").memory_map(str(file)) as source:
        if source.read(6) != b"ARROW1":
            source.seek(0)
            yield from ipc.open_stream(source)  # as `datasets` writes
        else:
            opened = ipc.open_file(source)
            yield from (opened.get_batch(i) for i in range(opened.num_record_batches))


def _column(column: Any) -> list[Any]:
    """A column's values; a picture ({"bytes", "path"}) is its path."""
    if not (_pyarrow("types").is_struct(column.type) and column.type.get_field_index("path") >= 0):
        return column.to_pylist()
    present = column.is_valid().to_pylist()
    return [
        (path or EMBEDDED) if valid else None
        for path, valid in zip(column.field("path").to_pylist(), present, strict=True)
    ]


def _without_nulls(value: Any) -> Any:
    """The value without fields that are null, since in a table every record has every field."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
