"""SHA-256 of files, texts and trees."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def open_regular(file: str | Path) -> Iterator[BinaryIO]:
    """A regular file, opened for reading. Raises OSError, also for what may never end: a FIFO, a device."""
    # O_NONBLOCK: to open a FIFO would wait for its writer.
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as handle:
        if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            raise OSError(errno.ENXIO, "is no regular file", str(file))
        yield handle


def sha256(file: str | Path) -> str:
    """SHA-256 of a regular file's content, which is read (see `hashes` for what is known). Raises OSError."""
    with open_regular(file) as handle:
        return digest_of(handle)


def digest_of(handle: BinaryIO) -> str:
    """SHA-256 of the rest of an open file. Raises OSError."""
    return hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]


def sha256_text(text: str | bytes) -> str:
    """SHA-256 of a text in UTF-8, or of bytes."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def sha256_files(files: Iterable[Path], folder: Path, own: Callable[[Path], str] = sha256) -> str:
    """SHA-256 over files in the order of their names: name, a zero byte and the binary SHA-256 of the content, each.

    A name is the path within `folder`. own: SHA-256 of one file. Raises OSError.
    """
    total = hashlib.sha256()
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        total.update(os.fsencode(name) + b"\0" + bytes.fromhex(own(file)))
    return total.hexdigest()


def digest(tree: Any, default: Callable[[Any], Any] | None = None) -> str:
    """SHA-256 of a tree as JSON with sorted keys.

    default: turns what JSON cannot hold into what it can (see `json.dumps`); without it TypeError is raised.
    """
    return sha256_text(json.dumps(tree, sort_keys=True, default=default))
