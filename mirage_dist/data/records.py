"""Records of a data file, one at a time: a JSON list, one object a line, CSV, Parquet, or a Hugging Face dataset.

Every reader of this package takes the same files: with a byte-order mark or without, lines that end in either way,
blank lines between records. No file is held whole, so that a corpus may be larger than memory.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mirage_dist.data import tables
from mirage_dist.schema import ConfigError, documents
from mirage_dist.schema.limits import LINE, VALUE_FILE, Limit
from mirage_dist.schema.texts import fault_within

CHUNK = 1 << 20  # bytes read at a time
LARGEST = LINE.value  # characters of one record of a JSON list, or bytes of a line or of blanks before the first
BLANKS = re.compile(r"[ \t\r\n]*")
SHEETS = {".csv": ",", ".tsv": "\t"}  # suffix -> delimiter
FORM = "expected a list of records, or one object a line"

OnBytes = Callable[[int], object]  # called with the number of further bytes that were read


def read(path: Path, on_bytes: OnBytes = lambda size: None, torn: Callable[[], object] | None = None) -> Iterator[Any]:
    """The records in order. A folder is a dataset written by `datasets.save_to_disk`, or holds Parquet or Arrow files.

    A .csv or .tsv file's first row names the fields. torn: called, in place of an error, for a last line that breaks
    off, as a process that was killed leaves it.
    Raises ConfigError for a file that cannot be read, is empty, or is none of these; for JSON with record, line and
    column.
    """
    if path.is_dir() or path.suffix in tables.TABLES:
        return tables.read(path, on_bytes)
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


def text(path: Path, limit: Limit = VALUE_FILE) -> str:
    """The text of a file without a byte-order mark.

    Raises ConfigError for a file that cannot be read, is empty, or is larger than `limit`.
    """
    content = documents.decoded(documents.read_bytes(path, limit), path)
    if not content.strip():
        raise ConfigError(f"{path}: the file is empty")
    return content


def value(path: Path, content: str | None = None) -> Any:
    """A file that is one JSON value. content: its text, where that has been read.

    Raises ConfigError as `text`, and naming the file for anything else, and for a text that cannot be encoded.
    """
    whole = documents.read_json(path, text(path) if content is None else content)
    if (why := fault_within(whole)) is not None:
        raise ConfigError(f"{path}: {why}")
    return whole


def size(path: Path) -> int:
    """Bytes that `read` will report to `on_bytes` in all. Raises ConfigError as `read` does."""
    try:
        return sum(file.stat().st_size for file in ([path] if path.is_file() else tables.parts(path)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


# --------------------------------------------------------------------------------------------------- JSON


def _json(path: Path, on_bytes: OnBytes, torn: Callable[[], object] | None) -> Iterator[Any]:
    chunks = _chunks(path, on_bytes)
    first = b""
    while len(first) < len(codecs.BOM_UTF8) and (chunk := next(chunks, None)) is not None:
        first += chunk
    start = [first.removeprefix(codecs.BOM_UTF8)]
    while not (mark := start[-1].lstrip()[:1]):
        if (chunk := next(chunks, None)) is None:
            raise ConfigError(f"{path}: the file is empty")
        if len(start) * CHUNK >= LARGEST:
            raise ConfigError(f"{path}: begins with more than {LINE} of blanks ({FORM})")
        start.append(chunk)
    chunks = chain(start, chunks)
    return _lines(path, chunks, torn) if mark == b"{" else _list(path, _Text(_decoded(path, chunks)))


def _chunks(path: Path, on_bytes: OnBytes) -> Iterator[bytes]:
    try:
        with documents.open_file(path) as file:
            while chunk := file.read(CHUNK):
                on_bytes(len(chunk))
                yield chunk
    except OSError as error:
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


def _raw_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends. One that is longer than LARGEST comes cut off, as the last one."""
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
        if len(raw) > LARGEST:
            raise ConfigError(f"{path}: record {number}: not JSON: {_too_long(at)} ({FORM})")
        if raw.strip():
            try:
                record = documents.parse_json(raw.decode(), at)
            except ValueError as error:
                if following is None and torn is not None:
                    torn()
                    return
                raise ConfigError(_broken_line(path, number, at, error)) from error
            yield record
            number += 1
        if following is not None:
            at, raw = following


def _too_long(line: int) -> str:
    return f"line {line} is longer than {LINE}, the limit of an {LINE.name}"


def _broken_line(path: Path, number: int, line: int, error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(path, line, error)
    return f"{path}: record {number}: not JSON: {error} ({FORM})"


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
        """Decode the value that begins here. Raises _NotJson.

        Each attempt has twice the text of the one before, so that all of them together read a few times its length.
        """
        while True:
            try:
                value, end = documents.DECODER.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise self.fault(documents.TOO_DEEP) from error
            except json.JSONDecodeError as error:
                # Either a syntax error, or the value's end has not arrived yet.
                if (size := len(self.text) - self.at) > LARGEST:
                    raise self.fault(f"{error.msg}, or a record of over {LINE}", error.pos) from error
                if not self._more(size):
                    raise self.fault(error.msg, error.pos) from error
            except ValueError as error:
                raise self.fault(str(error)) from error
            else:
                if documents.deep(self.text, value, self.at, end):
                    raise self.fault(documents.TOO_DEEP)
                self.at = end
                return value

    def fault(self, what: str, at: int | None = None) -> _NotJson:
        line, column = self._place(self.at if at is None else at)
        return _NotJson(f"{what}: line {line} column {column}")

    def _more(self, least: int = 1) -> bool:
        """Keep the unread rest and at least so many more characters; False when nothing is left to read."""
        pieces: list[str] = []
        held = 0
        while held < least and (piece := next(self.pieces, None)) is not None:
            pieces.append(piece)
            held += len(piece)
        if not pieces:
            return False
        self.line, self.column = self._place(self.at)
        self.text, self.at = "".join([self.text[self.at :], *pieces]), 0
        return True

    def _place(self, at: int) -> tuple[int, int]:
        lines, last = self.text.count("\n", 0, at), self.text.rfind("\n", 0, at)
        return self.line + lines, at - last if lines else self.column + at


# ------------------------------------------------------------------------------------------------- sheets


def _sheet(path: Path, on_bytes: OnBytes) -> Iterator[Any]:
    """Rows by the names in the first row; a row with more fields has the others under None, one with fewer None."""
    raw = enumerate(_raw_lines(_chunks(path, on_bytes)), start=1)
    rows = csv.DictReader(
        _sheet_lines(_decoded(path, (_bounded(path, *line) for line in raw))),
        delimiter=SHEETS[path.suffix.lower()],
        strict=True,  # a file that is cut off within quotes is no table
    )
    try:
        if not rows.fieldnames:
            raise ConfigError(f"{path}: the file is empty")
        yield from rows
    except csv.Error as error:
        raise ConfigError(f"{path}: line {rows.line_num}: not a table: {error}") from error


def _bounded(path: Path, number: int, line: bytes) -> bytes:
    if len(line) > LARGEST:
        raise ConfigError(f"{path}: {_too_long(number)}")
    return line + b"\n"


def _sheet_lines(pieces: Iterator[str]) -> Iterator[str]:
    """The lines that `csv` reads: the first is that of the names, without a byte-order mark."""
    named = False
    for line in pieces:
        line = line if named else line.removeprefix("\ufeff")
        named = named or bool(line.strip())
        if named:
            yield line
