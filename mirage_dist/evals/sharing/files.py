"""The files of a suite: each worker appends whole lines to one of its own, readers take whole lines only.

    evals/SUITE/config.yaml  manifest.json  rows/worker-*.jsonl  verdicts/JUDGE.jsonl  metrics.json

All are private (mode 0600): they hold what models said. Imports nothing heavy, so that progress can be read anywhere.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

from mirage_dist.schema import EvalRecipe, RunError

Row = dict[str, Any]

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a disk that takes nothing more
KEY = re.compile(rb'\{"key": "([0-9a-f]{64})", [^\0]*\}\n')  # a zero byte is a page that a dying machine never wrote
BLOCK_BYTES = 1 << 20


def suite_dir(recipe: EvalRecipe) -> Path:
    return Path(recipe.run.dir) / "evals" / recipe.suite


@contextmanager
def told(place: Path) -> Iterator[None]:
    """Raise RunError where a write under `place` failed because the disk takes nothing more."""
    try:
        yield
    except OSError as error:
        if error.errno in REFUSALS:
            raise RunError(
                f"{place}: cannot be written ({error}); whole answers are kept, the next start does the rest"
            ) from error
        raise


class Writer:
    """Appends whole lines to a file that no other worker writes; made with the first of them."""

    def __init__(self, suite: Path) -> None:
        # The time first, so that sorted files are in the order in which their workers started.
        self.file = suite / "rows" / f"worker-{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
        self.descriptor: int | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def append(self, rows: Iterable[Row]) -> None:
        """On disk when this returns. Raises RunError where the disk is full; this writer is then not to be used again,
        for its file may end in a cut line.
        """
        with told(self.file.parent):
            if self.descriptor is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            left = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            while left:
                left = left[os.write(self.descriptor, left) :]
            os.fsync(self.descriptor)


def lines(file: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Every line that has its end, from the byte `start` on, with its offset; what a worker is still writing is not."""
    with file.open("rb", buffering=BLOCK_BYTES) as handle:
        handle.seek(start)
        for line in handle:
            if line.endswith(b"\n"):
                yield start, line
            start += len(line)


class Answers:
    """The merge: every whole row once, found by key, read from the workers' files when asked for.

    Of rows with one key that of the first file in the order of names counts, and in a file the first: so it depends
    on what is there and not on when it was read. `repeated` counts the others, `differing` names the keys of those
    that say something else. `broken` counts cut or damaged lines. Memory is that of the keys, not of the rows.
    """

    def __init__(self, suite: Path) -> None:
        self.folder = suite / "rows"
        self.files: list[Path] = []
        self.repeated, self.differing = 0, set[str]()
        self._damaged = 0
        self._read: dict[str, int] = {}  # bytes of whole lines, by file name
        self._number: dict[str, int] = {}
        self._place: dict[bytes, tuple[int, int]] = {}

    def refresh(self) -> Answers:
        """Take in what workers have appended since the last time."""
        for file in sorted(self.folder.glob("worker-*.jsonl")):
            if file.name not in self._number:
                self._number[file.name] = len(self.files)
                self.files.append(file)
                self._read[file.name] = 0
            for offset, line in lines(file, self._read[file.name]):
                self._read[file.name] = offset + len(line)
                if match := KEY.fullmatch(line):
                    self._add(bytes.fromhex(match[1].decode()), (self._number[file.name], offset))
                else:
                    self._damaged += 1
        return self

    def _add(self, key: bytes, place: tuple[int, int]) -> None:
        there = self._place.setdefault(key, place)
        if there is place:
            return
        self.repeated += 1
        if self._at(there) != self._at(place):
            self.differing.add(key.hex())
        self._place[key] = min(there, place, key=lambda p: (self.files[p[0]].name, p[1]))

    @property
    def broken(self) -> int:
        return self._damaged + sum(file.stat().st_size > self._read[file.name] for file in self.files)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._place

    def __len__(self) -> int:
        return len(self._place)

    def row(self, key: str) -> Row:
        """Raises KeyError for one that is not answered."""
        return self._at(self._place[bytes.fromhex(key)])

    def _at(self, place: tuple[int, int]) -> Row:
        with self.files[place[0]].open("rb") as handle:
            handle.seek(place[1])
            return json.loads(handle.readline())

    def of(self, keys: Iterable[str]) -> Merged:
        """The rows of these keys in their order. Raises KeyError when one is not answered."""
        return Merged(self.files, [self._place[bytes.fromhex(key)] for key in keys])


class Merged(Sequence[Row]):
    """Rows in the order of the work list; each is read from its file whenever it is asked for."""

    def __init__(self, files: Sequence[Path], places: Sequence[tuple[int, int]]) -> None:
        self.files, self.places = files, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Merged: ...
    def __getitem__(self, index: int | slice) -> Row | Merged:
        if isinstance(index, slice):
            return Merged(self.files, self.places[index])
        return next(iter(self[index : index + 1 or None]))

    def __iter__(self) -> Iterator[Row]:
        opened = {}
        try:
            for number, offset in self.places:
                if number not in opened:
                    if len(opened) == 64:  # many restarts leave many files, and a process may open few
                        opened.pop(next(iter(opened))).close()
                    opened[number] = self.files[number].open("rb")
                opened[number].seek(offset)
                yield json.loads(opened[number].readline())
        finally:
            for handle in opened.values():
                handle.close()


def whole_objects(file: Path) -> Iterator[Row]:
    """Of a JSONL file, if it is there, that a dying process may have left half written: every whole line's object."""
    if not file.exists():
        return
    for _, line in lines(file):
        with suppress(ValueError):
            yield json.loads(line)


def write_atomically(file: Path, text: str | Iterable[str]) -> None:
    """Beside, fsynced, renamed: a reader sees the old file or the new one. Raises RunError on a full disk."""
    with _beside(file, text) as whole:
        os.replace(whole, file)


def create(file: Path, text: str, durable: bool = True) -> bool:
    """Write a file whole unless there is one: False. Of several processes that try at once, one is told True.

    durable: on disk when this returns, for what has to outlive the machine.
    """
    with _beside(file, text, durable) as whole:
        try:
            # link() is atomic on NFS too, and unlike rename() it never replaces.
            os.link(whole, file)
        except FileExistsError:
            return False
        return True


@contextmanager
def _beside(file: Path, text: str | Iterable[str], durable: bool = True) -> Iterator[Path]:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with told(file.parent), open(beside, "x", encoding="utf-8", opener=private) as handle:
            handle.writelines([text] if isinstance(text, str) else text)
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        yield beside
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()


def private(path: str, flags: int) -> int:
    """An opener for `open`: what it makes only its owner may read."""
    return os.open(path, flags, 0o600)
