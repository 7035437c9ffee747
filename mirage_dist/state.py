"""State that a run writes and reads back: JSON objects, one a file or one a line, whose last member is a seal.

    {"step": 3, "loss": 0.25, "seal": "metrics 1 4a3b0c6e17d2f985"}

The seal names what the object is, the version of its format, and a checksum: the first 16 hexadecimal digits of the
SHA-256 of the text before the seal, followed by kind and version. It shows an object that was torn by a crash, damaged
by a disk, edited, or written by another version of this package. It is no signature: whoever wants to forge an object
can compute it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mirage_dist.schema import documents
from mirage_dist.schema.errors import ConfigError, RunError
from mirage_dist.schema.limits import LINE, Limit

# The version of each kind of object, raised when what it holds or means changes.
VERSIONS = {
    "attempt": 1,
    "beat": 1,
    "checkpoint": 3,
    "claim": 1,
    "data": 1,
    "erasure": 1,
    "held": 1,
    "hashes": 1,
    "history": 1,
    "index": 1,
    "kept": 1,
    "metrics": 1,
    "openers": 1,
    "owner": 1,
    "perplexity": 1,
    "prepared": 1,
    "rates": 1,
    "rewrite": 1,
    "row": 1,
    "run": 1,
    "samples": 1,
    "served": 1,
    "start": 1,
    "suite": 1,
    "sweep": 1,
    "verdict": 1,
    "world": 2,
}
SEAL = re.compile(rb',\s*"seal": "([a-z]+) ([0-9]{1,9}) ([0-9a-f]{16})"\s*\}\s*\Z')
DIGITS = 16
LARGEST = 1 << 28  # bytes of a file


class Damaged(RunError):
    """A state file does not hold what was written into it; the message names the file and what is wrong."""


def sealed(kind: str, content: Mapping[str, Any], indent: int | None = None, compact: bool = False) -> str:
    """The text of an object with its seal, and a line's end. content: anything but empty, without a member `seal`.

    compact: without the spaces after commas and colons.
    """
    separators = (",", ":") if compact else None
    body = json.dumps(content, ensure_ascii=False, indent=indent, separators=separators)[:-1].rstrip()
    try:
        raw = body.encode()
    except UnicodeEncodeError:  # a path whose bytes are not UTF-8 has surrogates, which only escaped can be encoded
        body = json.dumps(content, indent=indent, separators=separators)[:-1].rstrip()
        raw = body.encode()
    version = VERSIONS[kind]
    gap = " " if indent is None else "\n" + " " * indent
    end = "" if indent is None else "\n"
    return f'{body},{gap}"seal": "{kind} {version} {_checksum(raw, kind, version)}"{end}}}\n'


def whole(kind: str, raw: bytes, where: object = "") -> bool:
    """Whether `sealed` wrote this text, by its seal alone: the JSON is not parsed. Raises ConfigError as `parse`."""
    try:
        _body(kind, raw, where)
    except Damaged:
        return False
    return True


def parse(kind: str, raw: bytes, where: object) -> dict[str, Any]:
    """The object that `sealed` wrote, without its seal.

    where: names the text in messages. Raises Damaged when the text is torn, edited, of another kind or of another
    version; ConfigError when a newer version of this package wrote it.
    """
    body = _body(kind, raw, where)
    try:
        content = json.loads(body + b"}")
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise Damaged(f"{where}: expected a JSON object, found {type(content).__name__}")
    return content


def read(kind: str, file: Path, remedy: str = "") -> dict[str, Any]:
    """The object in a file. remedy: what to do about one that is damaged, a sentence that ends the message.

    Raises FileNotFoundError when there is no file, Damaged and ConfigError as `parse` does, and Damaged for a file
    that cannot be read: one that is no regular file, or larger than `LARGEST`.
    """
    try:
        return _read(kind, file)
    except Damaged as error:
        raise Damaged(f"{error}. {remedy}" if remedy else str(error)) from error


def content(file: Path, limit: Limit, remedy: str = "") -> bytes:
    """What a file of state holds that is no single object, such as lines. remedy: as in `read`.

    Raises Damaged where it cannot be read: there is none, it is no regular file, or larger than `limit`.
    """
    try:
        return documents.read_bytes(file, limit)
    except ConfigError as error:
        raise Damaged(f"{error}. {remedy}" if remedy else str(error)) from error


def lines(file: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The offset of each line from the byte `start` on, and the line; the last one may lack its end.

    Raises Damaged where the file cannot be read: there is none, it is no regular file, or a line is longer than LINE.
    """
    try:
        with documents.open_file(file) as handle:
            handle.seek(start)
            while line := handle.readline(LINE.value + 1):
                if len(line) > LINE.value:
                    raise Damaged(f"{file}: the line at byte {start} is longer than {LINE}, which no line of state is")
                yield start, line
                start += len(line)
    except ConfigError as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        raise Damaged(f"{file}: cannot be read: {error.strerror or error}") from error


def _read(kind: str, file: Path) -> dict[str, Any]:
    if not file.is_symlink() and not file.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    try:
        with documents.open_file(file) as handle:
            raw = handle.read(LARGEST + 1)
    except ConfigError as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        raise Damaged(f"{file}: cannot be read: {error}") from error
    if len(raw) > LARGEST:
        raise Damaged(f"{file}: larger than {LARGEST >> 20} MiB, which no state file is")
    return parse(kind, raw, file)


def _body(kind: str, raw: bytes, where: object) -> bytes:
    """The text before the seal, without the brace that ends the object. Raises as `parse`."""
    seal = SEAL.search(raw, max(0, len(raw) - 200))
    if seal is None:
        raise Damaged(f"{where}: holds no whole object with a seal; it is torn or edited, or an older version wrote it")
    name, version, checksum = seal[1].decode(), int(seal[2]), seal[3].decode()
    if name != kind:
        raise Damaged(f"{where}: holds a {name!r} object where a {kind!r} object belongs")
    if version > VERSIONS[kind]:
        raise ConfigError(
            f"{where}: format {kind} {version}; this version of mirage_dist reads {kind} {VERSIONS[kind]}. Use the "
            "version that wrote it, or a newer one"
        )
    if version < VERSIONS[kind]:
        raise Damaged(f"{where}: format {kind} {version}, of an older version; this one reads {VERSIONS[kind]}")
    body = raw[: seal.start()]
    if _checksum(body, kind, version) != checksum:
        raise Damaged(f"{where}: its content does not have the checksum that it states; it is damaged or edited")
    return body


def _checksum(body: bytes, kind: str, version: int) -> str:
    return hashlib.sha256(body + f"{kind} {version}".encode()).hexdigest()[:DIGITS]
