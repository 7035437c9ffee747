"""The files of a suite: each worker appends whole lines to a file of its own, readers use whole lines only.

    evals/SUITE/config.yaml  manifest.json  rows/worker-*.jsonl  verdicts/JUDGE.jsonl  metrics.json

All are private (mode 0600), because they hold model output. Each object and each line carries a seal (see `state`);
a reader counts and names the lines whose seal does not fit, and believes none of them. This module imports no heavy
library, so that any process can read the progress of a suite.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast, overload

from mirage_dist import disk, state
from mirage_dist.schema import EvalRecipe, RunError
from mirage_dist.schema.limits import LINE

KEPT = "whole answers are kept, and the next start does the rest"  # completes the message about a full disk
COMPLETE = "the evaluation is not complete: start it again, and it does what is missing"
KEY = re.compile(rb'\{"key": "([0-9a-f]{64})", ')  # how a row begins
NAMED_LINES = 3  # of each file with damaged lines, in a message


# `Served.finish` of a question that an endpoint's content filter blocked, or its answer; of an answer that the limit of
# tokens cut off; of a reply without content.
BLOCKED, CUT, NO_CONTENT = "content_filter", "length", "no_content"


class Served(TypedDict):
    """How an endpoint's answer came. finish: why it ends: BLOCKED, CUT, NO_CONTENT, or another word of the endpoint's,
    such as `stop`. What the endpoint did not state is left out.

    empty: present where the answer has no text. model: that the reply names. system_fingerprint: of the backend's
    configuration. partial: what came of an answer that the filter blocked.
    """

    finish: NotRequired[str]
    model: NotRequired[str]
    system_fingerprint: NotRequired[str]
    prompt_tokens: NotRequired[int]
    completion_tokens: NotRequired[int]
    partial: NotRequired[str]
    empty: NotRequired[bool]


class Row(TypedDict):
    """One answer and the question it belongs to (see `evals.rows`).

    image: the picture's path. question: as asked; original_question: as the data have it. shot: 0 for the question
    itself, k for the k-th rewrite. references: answers that a benchmark accepts. begun: where an attack began the
    answer, its first words; `response` is then the continuation. draw: temperature, top_p and seed of an answer that
    was drawn at random. original_image: where an attack changed the picture's pixels, the path of the picture before it
    (see `judges.base`). turns: how many answers its conversation has, of which `shot` counts this one; history: the
    (question, answer) turns before it. sent: under a defence, the question as it passes it on. filtered: under a
    filter, its guard's verdict. withheld: the model's own answer that it withheld; `response` is then its refusal.
    served: present of an endpoint's answer; of one that its content filter blocked, `response` is a sentence about it.
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
    draw: NotRequired[dict[str, float]]
    original_image: NotRequired[str]
    turns: NotRequired[int]
    history: NotRequired[list[list[str]]]
    sent: NotRequired[str]
    withheld: NotRequired[str]
    filtered: NotRequired[str]
    served: NotRequired[Served]
    response: str


def blocked(row: Mapping[str, Any]) -> bool:
    """Whether an endpoint's content filter blocked a row's question or its answer: a refusal of the system."""
    return row.get("served", {}).get("finish") == BLOCKED


def suite_dir(recipe: EvalRecipe) -> Path:
    return Path(recipe.run.dir) / "evals" / recipe.suite


DEFENCES = "defences"  # the folder in a suite of the answers under its defences


def title(suite: Path) -> str:
    """A suite's name for messages; of a defended one the suite's and the defence's."""
    return f"{suite.parent.parent.name}, defence {suite.name}" if suite.parent.name == DEFENCES else suite.name


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
            left = memoryview("".join(state.sealed("row", cast(Mapping, row)) for row in rows).encode())
            while left:
                left = left[os.write(self.descriptor, left) :]
            os.fsync(self.descriptor)


# --------------------------------------------------------------------------------------------- lines of any file


def lines(file: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Every complete line from the byte `start` on, with its offset. A line that is still being written is left out.

    Raises RunError for a file that cannot be read (see `state.lines`).
    """
    for offset, line in state.lines(file, start):
        if not line.endswith(b"\n"):
            return  # the end of the file; reading on, after it has grown, would give the line's rest as a line
        yield offset, line


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Raise RunError where a file cannot be read, or no longer exists."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror})") from error


class Damage:
    """The lines of a suite's files that are damaged or edited, by file, for messages."""

    def __init__(self) -> None:
        self.lines: dict[Path, list[int]] = {}

    def add(self, file: Path, number: int) -> None:
        """number: the line's, from 1."""
        self.lines.setdefault(file, []).append(number)

    def __len__(self) -> int:
        return sum(map(len, self.lines.values()))

    def __str__(self) -> str:
        return "; ".join(f"{file} {_numbered(numbers)}" for file, numbers in self.lines.items())


def _numbered(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:NAMED_LINES]))
    more = f" and {len(numbers) - NAMED_LINES} more" if len(numbers) > NAMED_LINES else ""
    return f"line{'s' if len(numbers) > 1 else ''} {listed}{more}"


def append(file: Path, text: str) -> None:
    """Append lines to a private file that may end in a line that a kill cut; on disk when this returns.

    Raises OSError when the disk accepts no more.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # leave it a line of its own
        left = memoryview(("\n" * cut + text).encode())
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_objects(kind: str, file: Path, damage: Damage | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file's whole lines, whose writer may have been killed; none if the file does not exist.

    kind: of each line (see `state`). damage: gets the other lines. Raises RunError for a file that cannot be read.
    """
    if not file.exists():
        return
    for number, (_, line) in enumerate(lines(file), start=1):
        try:
            yield state.parse(kind, line, file)
        except state.Damaged:
            if damage is not None and line.strip():
                damage.add(file, number)


# ------------------------------------------------------------------------------------------------------ the rows


def row_key(line: bytes, file: Path) -> str | None:
    """The key of a row's line, which is not parsed; None for a line that is damaged or edited. file: for messages."""
    match = KEY.match(line)
    return match[1].decode() if match and state.whole("row", line, file) else None


class Answers:
    """The merge of all workers' rows: each whole row once, looked up by its key and read from disk on demand.

    Of several rows with one key the one in the first file by name counts, and within a file the first one; so the
    result depends on the files and not on when they were read. `repeated` counts the other rows, `differing` holds the
    keys of those with another content, `damage` names damaged and edited lines. Only keys are kept in memory.
    """

    def __init__(self, suite: Path) -> None:
        self.folder = suite / "rows"
        self.files: list[Path] = []
        self.repeated, self.differing = 0, set[str]()
        self.damage = Damage()
        self._read: dict[str, tuple[int, int]] = {}  # bytes and number of the lines read, by file name
        self._number: dict[str, int] = {}
        self._place: dict[bytes, tuple[int, int]] = {}

    def refresh(self) -> Answers:
        """Read what workers have appended since the last call. Raises RunError for a file that cannot be read."""
        for file in sorted(self.folder.glob("worker-*.jsonl")):
            if file.name not in self._number:
                self._number[file.name] = len(self.files)
                self.files.append(file)
                self._read[file.name] = 0, 0
            start, count = self._read[file.name]
            for offset, line in lines(file, start):
                count += 1
                self._read[file.name] = offset + len(line), count
                if key := row_key(line, file):
                    self._add(bytes.fromhex(key), (self._number[file.name], offset))
                else:
                    self.damage.add(file, count)
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
    def cut(self) -> int:
        """The number of files that end in an incomplete line."""
        return sum(file.exists() and file.stat().st_size > self._read[file.name][0] for file in self.files)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._place

    def __len__(self) -> int:
        return len(self._place)

    def row(self, key: str) -> Row:
        """Raises KeyError when there is no row with this key."""
        return self._at(self._place[bytes.fromhex(key)])

    def _at(self, place: tuple[int, int]) -> Row:
        return Merged(self.files, [place])[0]

    def of(self, keys: Iterable[str]) -> Merged:
        """The rows of these keys, in their order. Raises RunError when a key has no row."""
        keys = list(keys)
        places = [self._place.get(bytes.fromhex(key)) for key in keys]
        there = [place for place in places if place is not None]
        if len(there) < len(keys):
            damaged = f" ({len(self.damage)} lines are damaged or edited: {self.damage})" if self.damage else ""
            raise RunError(f"{self.folder}: {len(there)} of {len(keys)} answers{damaged}; {COMPLETE}")
        return Merged(self.files, there)


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
        """Raises RunError for a row that has been removed or damaged since it was found."""
        opened = {}
        try:
            for number, offset in self.places:
                file = self.files[number]
                with readable(file):
                    if number not in opened:
                        if len(opened) == 64:  # many restarts leave many files, and a process may open only so many
                            opened.pop(next(iter(opened))).close()
                        opened[number] = file.open("rb")
                    opened[number].seek(offset)
                    line = opened[number].readline(LINE.value)
                yield cast(Row, state.parse("row", line, f"{file}, the line at byte {offset}"))
        finally:
            for handle in opened.values():
                handle.close()
