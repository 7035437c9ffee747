"""Records of a data file, one at a time: a JSON list, one object a line, CSV, Parquet, or a Hugging Face dataset.

Every reader of this package takes the same files: with a byte-order mark or without, lines that end in either way,
blank lines between records. No file is held whole, so that a corpus may be larger than memory.
"""

from __future__ import annotations

import codecs
import csv
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mirage_dist.schema import ConfigError
from mirage_dist.schema.texts import fault_within

CHUNK = 1 << 20  # bytes read at a time
LARGEST = 1 << 26  # characters of one record of a JSON list, or bytes of a line; a longer record counts as broken
BLANKS = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
TABLES = (".parquet", ".arrow")
SHEETS = {".csv": ",", ".tsv": "\t"}  # suffix -> delimiter
EMBEDDED = "picture-inside-the-dataset"  # in place of the path of a picture that is stored in the table itself
FORM = "expected a list of records, or one object a line"

OnBytes = Callable[[int], object]  # called with the number of further bytes that were read


def read(path: Path, on_bytes: OnBytes = lambda size: None, torn: Callable[[], object] | None = None) -> Iterator[Any]:
    """The records in order. A folder is a dataset written by `datasets.save_to_disk`, or holds Parquet or Arrow files.

    A .csv or .tsv file's first row names the fields. torn: called, in place of an error, for a last line that breaks
    off, as a process that was killed leaves it.
    Raises ConfigError for a file that cannot be read, is empty, or is none of these; for JSON with record, line and
    column.
    """
    if path.is_dir() or path.suffix in TABLES:
        return _tables(path, on_bytes)
    if path.suffix.lower() in SHEETS:
        return _sheet(path, on_bytes)
    return _json(path, on_bytes, torn)


def checked(path: Path, torn: Callable[[], object] | None = None) -> Iterator[tuple[int, Any]]:
    """Each record with its number, for readers without `on_bad_record`.

    Raises ConfigError as `read`, and naming file, record and field for a text that cannot be encoded.
    """
    for number, record in enumerate(read(path, torn=torn)):
        if (why := fault_within(record)) is not None:
            raise ConfigError(f"{path}: record {number}: {why}")
        yield number, record


def text(path: Path) -> str:
    """The text of a file without a byte-order mark. Raises ConfigError for a file that cannot be read or is empty."""
    content = "".join(_decoded(path, _chunks(path, lambda size: None))).removeprefix("\ufeff")
    if not content.strip():
        raise ConfigError(f"{path}: the file is empty")
    return content


def value(path: Path, content: str | None = None) -> Any:
    """A file that is one JSON value. content: its text, where that has been read.

    Raises ConfigError as `text`, and naming the file for anything else, and for a text that cannot be encoded.
    """
    try:
        whole = json.loads(text(path) if content is None else content)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {_without_offset(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not readable as JSON: nested too deep") from error
    if (why := fault_within(whole)) is not None:
        raise ConfigError(f"{path}: {why}")
    return whole


def size(path: Path) -> int:
    """Bytes that `read` will report to `on_bytes` in all. Raises ConfigError as `read` does."""
    try:
        return sum(file.stat().st_size for file in ([path] if path.is_file() else _parts(path)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


# --------------------------------------------------------------------------------------------------- JSON


def _json(path: Path, on_bytes: OnBytes, torn: Callable[[], object] | None) -> Iterator[Any]:
    chunks = _chunks(path, on_bytes)
    start = b""
    for chunk in chunks:
        start += chunk
        if not codecs.BOM_UTF8.startswith(start) and start.removeprefix(codecs.BOM_UTF8).strip():
            break
    mark = start.removeprefix(codecs.BOM_UTF8).strip()[:1]
    if not mark:
        raise ConfigError(f"{path}: the file is empty")
    chunks = chain([start.removeprefix(codecs.BOM_UTF8)], chunks)
    return _lines(path, chunks, torn) if mark == b"{" else _list(path, _Text(_decoded(path, chunks)))


def _chunks(path: Path, on_bytes: OnBytes) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                on_bytes(len(chunk))
                yield chunk
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _decoded(path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
    """The text of a file in pieces. Raises ConfigError naming the line for what is not UTF-8."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    for chunk in chain(chunks, [None]):
        try:
            piece = decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            raise ConfigError(_not_utf8(path, line + error.object.count(b"\n", 0, error.start), error)) from error
        line += piece.count("\n")
        yield piece


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> str:
    return f"{path}: cannot be read: line {line} is not UTF-8 ({error.reason}); convert the file to UTF-8"


def _without_offset(error: json.JSONDecodeError, line: int = 1) -> str:
    """What is wrong, and where in the file. line: that with which the text begins."""
    return f"{error.msg}: line {line + error.lineno - 1} column {error.colno}"


def _raw_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends. One that is longer than LARGEST comes cut off."""
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*parts, line])
            parts, held = [], 0
        parts.append(rest)
        held += len(rest)
        if held > LARGEST:
            break
    yield b"".join(parts)


def _lines(path: Path, chunks: Iterator[bytes], torn: Callable[[], object] | None) -> Iterator[Any]:
    number = 0
    lines = enumerate(_raw_lines(chunks), start=1)
    at, raw = next(lines)
    for following in chain(lines, [None]):
        if raw.strip():
            try:
                record = json.loads(raw.decode())
            except (ValueError, RecursionError) as error:
                if following is None and torn is not None:
                    torn()
                    return
                raise ConfigError(_broken_line(path, number, at, raw, error)) from error
            yield record
            number += 1
        if following is not None:
            at, raw = following


def _broken_line(path: Path, number: int, line: int, raw: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(path, line, error)
    if len(raw) > LARGEST:
        why = f"line {line} is longer than {LARGEST >> 20} MiB"
    elif isinstance(error, json.JSONDecodeError):
        why = _without_offset(error, line)
    else:
        why = f"nested too deep: line {line}"
    return f"{path}: record {number}: not JSON: {why} ({FORM})"


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
            except RecursionError as error:
                raise self.fault("nested too deep") from error
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


# ------------------------------------------------------------------------------------------------- sheets


def _sheet(path: Path, on_bytes: OnBytes) -> Iterator[Any]:
    """Rows by the names in the first row; a row with more fields has the others under None, one with fewer None."""
    raw = (line + b"\n" for line in _raw_lines(_chunks(path, on_bytes)))
    rows = csv.DictReader(_sheet_lines(_decoded(path, raw)), delimiter=SHEETS[path.suffix.lower()])
    try:
        if not rows.fieldnames:
            raise ConfigError(f"{path}: the file is empty")
        yield from rows
    except csv.Error as error:
        raise ConfigError(f"{path}: line {rows.line_num}: not a table: {error}") from error


def _sheet_lines(pieces: Iterator[str]) -> Iterator[str]:
    """The lines that `csv` reads: the first is that of the names, without a byte-order mark."""
    named = False
    for line in pieces:
        line = line if named else line.removeprefix("\ufeff")
        named = named or bool(line.strip())
        if named:
            yield line


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
    errors = (OSError, UnicodeDecodeError, _pyarrow("lib").ArrowException)
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
