"""The files of a suite: each worker appends whole lines to a file of its own, readers use whole lines only.

    evals/SUITE/config.yaml  manifest.json  rows/worker-*.jsonl  verdicts/JUDGE.jsonl  metrics.json

All are private (mode 0600), because they hold model output. This module imports no heavy library, so that any process
can read the progress of a suite.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict, overload

from mirage_dist import disk
from mirage_dist.schema import EvalRecipe

KEPT = "whole answers are kept, and the next start does the rest"  # completes the message about a full disk
KEY = re.compile(rb'\{"key": "([0-9a-f]{64})", [^\0]*\}\n')  # a zero byte is a page that a dying machine never wrote
BLOCK_BYTES = 1 << 20


class Row(TypedDict):
    """One answer and the question it belongs to (see `evals.rows`).

    image: the picture's path. question: as asked; original_question: as the data have it. shot: 0 for the question
    itself, k for the k-th rewrite. references: answers that a benchmark accepts. begun: where an attack began the
    answer, its first words; `response` is then the continuation.
    """

    key: str
    set: str
    kind: str
    id: str
    category: str
    image: str | None
    attack: str
    shot: int
    question: str
    original_question: str
    expected: str
    references: NotRequired[list[str]]
    begun: NotRequired[str]
    response: str


def suite_dir(recipe: EvalRecipe) -> Path:
    return Path(recipe.run.dir) / "evals" / recipe.suite


def write(file: Path, content: disk.Content) -> None:
    """Replace a private file of a suite atomically and durably. Raises RunError when the disk is full."""
    with disk.refusals(file.parent, KEPT):
        disk.write(file, content, private=True)


class Writer:
    """Appends whole lines to a file that no other worker writes. The first line creates the file."""

    def __init__(self, suite: Path) -> None:
        # The time comes first, so that sorted file names are in the order in which the workers started.
        self.file = suite / "rows" / f"worker-{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
        self.descriptor: int | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def append(self, rows: Iterable[Row]) -> None:
        """On disk when this returns. Raises RunError when the disk is full; do not use this writer after that, because
        its file may end in an incomplete line.
        """
        with disk.refusals(self.file.parent, KEPT):
            if self.descriptor is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            left = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            while left:
                left = left[os.write(self.descriptor, left) :]
            os.fsync(self.descriptor)


def lines(file: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Every complete line from the byte `start` on, with its offset. A line that is still being written is left out."""
    with file.open("rb", buffering=BLOCK_BYTES) as handle:
        handle.seek(start)
        for line in handle:
            if not line.endswith(b"\n"):
                return  # the end of the file; reading on, after it has grown, would give the line's rest as a line
            yield start, line
            start += len(line)


class Answers:
    """The merge of all workers' rows: each whole row once, looked up by its key and read from disk on demand.

    Of several rows with one key the one in the first file by name counts, and within a file the first one; so the
    result depends on the files and not on when they were read. `repeated` counts the other rows, `differing` holds the
    keys of those with another content, `broken` counts incomplete and damaged lines. Only keys are kept in memory.
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
        """Read what workers have appended since the last call."""
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
        first = self._place.setdefault(key, place)
        if first is place:
            return
        self.repeated += 1
        if self._at(first) != self._at(place):
            self.differing.add(key.hex())
        self._place[key] = min(first, place, key=lambda p: (self.files[p[0]].name, p[1]))

    @property
    def broken(self) -> int:
        return self._damaged + sum(file.stat().st_size > self._read[file.name] for file in self.files)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._place

    def __len__(self) -> int:
        return len(self._place)

    def row(self, key: str) -> Row:
        """Raises KeyError when there is no row with this key."""
        return self._at(self._place[bytes.fromhex(key)])

    def _at(self, place: tuple[int, int]) -> Row:
        with self.files[place[0]].open("rb") as handle:
            handle.seek(place[1])
            return json.loads(handle.readline())

    def of(self, keys: Iterable[str]) -> Merged:
        """The rows of these keys, in their order. Raises KeyError when a key has no row."""
        return Merged(self.files, [self._place[bytes.fromhex(key)] for key in keys])


class Merged(Sequence[Row]):
    """Rows in the order of the work list. Each access reads them from their files."""

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
                    if len(opened) == 64:  # many restarts leave many files, and a process may open only so many
                        opened.pop(next(iter(opened))).close()
                    opened[number] = self.files[number].open("rb")
                opened[number].seek(offset)
                yield json.loads(opened[number].readline())
        finally:
            for handle in opened.values():
                handle.close()


def whole_objects(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file's whole lines, whose writer may have been killed; none if the file does not exist."""
    if not file.exists():
        return
    for _, line in lines(file):
        with suppress(ValueError):
            yield json.loads(line)
