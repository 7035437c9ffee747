"""Claims of workers on shared work, by atomic links, without locks, on any file system that several nodes share.

    claims/TOKEN.worker  TOKEN.beat        a living worker, and a file that changes while it lives
    claims/NAME.0  NAME.1 …                owners of NAME: the one with the highest number holds it

A claim is written whole to a file of its own and then linked to its name, which succeeds for one worker only, on NFS
too. A worker is dead when its process has gone (same host and container) or its beat has stood still for
`EXPIRY_SECONDS` on the observer's own clock. A dead worker's claim is not removed but followed by the next number,
which again one worker only can link. A worker that comes back late finds a higher number than its own.

Claims save work and decide nothing: only the answers on disk say what is done, and two workers that answer the same
question leave two rows with one key.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from mirage_dist import disk, state
from mirage_dist.evals.sharing.files import KEPT
from mirage_dist.liveness import Heartbeat, Observer, Owner
from mirage_dist.schema import RunError

EXPIRY_SECONDS = 60.0  # NFS may show an old file for half a minute; loading a model may delay beats for some seconds
LOOK_SECONDS = 0.5  # between two looks at a claim whose owner may be dead
LAST_NUMBER = 10**9 - 1
CLAIM = re.compile(r"(.+)\.(0|[1-9][0-9]{0,8})")  # NAME.NUMBER; a file with another name is no claim

Rows = Mapping[str, Mapping[str, int]]  # numbers of questions by set and attack


class Beat(TypedDict):
    """TOKEN.beat: the number of the beat, the rows that the worker has answered, and since how many seconds."""

    beat: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Claim:
    """NAME.NUMBER; its content is the owner's record (see `liveness.Owner`) and `rows`, see `Claims.take`."""

    name: str
    number: int


class Claims:
    """This process's claims in a suite, kept alive by a thread until the block's or the process's end.

    What dead workers left in `claims/` is removed when the block begins, as far as they are known to be dead by then,
    and when it ends.
    """

    def __init__(self, suite: Path) -> None:
        self.folder, self.owner = suite / "claims", Owner.current()
        self.done, self.since = 0, time.monotonic()  # rows that this worker has answered, for `mirage eval --status`
        self.heartbeat = Heartbeat(self.folder / f"{self.token}.beat", self._beat)
        self._observer = Observer()

    @property
    def token(self) -> str:
        """Names this worker among all of the suite."""
        return self.owner.token

    def __enter__(self) -> Claims:
        with disk.refusals(self.folder, KEPT):
            text = state.sealed("owner", self.owner.record())
            disk.write(self.folder / f"{self.token}.worker", text, private=True)
        self.sweep()
        self.heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heartbeat.stop()
        self.sweep()
        for name in (f"{self.token}.worker", f"{self.token}.beat"):
            (self.folder / name).unlink(missing_ok=True)

    def take(self, name: str, rows: Rows | None = None) -> Claim | None:
        """Claim `name`; None while a worker holds it that may be alive.

        rows: the numbers of questions by set and attack, which `mirage eval --status` reports as claimed.
        Raises RunError when the disk is full.
        """
        last = _last(self.folder, name)
        if last is not None:
            record = _record("claim", self.folder / f"{name}.{last}")
            if record is not None and record.get("token") == self.token:
                return Claim(name, last)  # a release that overlapped with it hid it from this worker meanwhile
            if not self._dead(f"{name}.{last}", record):
                return None
            if last >= LAST_NUMBER:  # no worker counts so far
                _remove(self.folder / f"{name}.{last}")
                return None
        claim = Claim(name, 0 if last is None else last + 1)
        text = state.sealed("claim", {**self.owner.record(), "rows": rows or {}})
        with disk.refusals(self.folder, KEPT):
            return claim if disk.create(self.folder / f"{name}.{claim.number}", text, durable=False) else None

    def take_unless_alive(self, name: str, stop: Callable[[], None]) -> Claim | None:
        """Claim `name`, or return None when its owner is alive for certain: what only waits for `name` may then end.

        An owner that this process cannot look up, or whose claim cannot be read, is observed until its beat moves or it
        counts as dead. stop: called between two looks; raises to give up.
        """
        seen: tuple[str, float] | None = None
        while (claim := self.take(name)) is None:
            last = _last(self.folder, name)
            record = None if last is None else _record("claim", self.folder / f"{name}.{last}")
            if record is not None:
                owner = Owner.from_record(record)
                if owner.alive():
                    return None
                if owner.alive() is None:
                    still = self._observer.still_for(self.folder / f"{owner.token}.beat")
                    if seen is not None and seen[0] == owner.token and still < seen[1]:
                        return None
                    seen = owner.token, still
            stop()
            time.sleep(min(LOOK_SECONDS, EXPIRY_SECONDS / 10))
        return claim

    def held(self, claim: Claim) -> bool:
        """Whether no worker has taken this process for dead and followed the claim."""
        return _last(self.folder, claim.name) == claim.number

    def release(self, claim: Claim) -> None:
        """Give the claim back, with those of dead workers before it. Whoever claims it next first reads the answers."""
        if not self.held(claim):
            return  # a successor must find a number below its own; it removes both
        numbers = [number for name, number in _claims(self.folder) if name == claim.name]
        for number in sorted(numbers, reverse=True):
            if number <= claim.number:
                _remove(self.folder / f"{claim.name}.{number}")

    # ------------------------------------------------------------------------------------------------- removal

    def sweep(self) -> None:
        """Remove what dead workers left: their claims, marks and beats.

        Those whose owner may be alive stay. What cannot be removed stays too: it is in nobody's way.
        """
        with suppress(OSError, RunError):
            for name in sorted({name for name, _ in _claims(self.folder)}):
                # Followed and then released, as by any worker: a name may not vanish under one that follows it too.
                # Twice, for numbers whose first ones are gone.
                for _ in range(2):
                    if claim := self.take(name):
                        self.release(claim)
            for file in self.folder.glob("*.worker"):
                if self._gone(file):
                    _remove(file)
            for file in self.folder.glob("*.beat"):
                if self.gone(file.stem):
                    _remove(file)

    def gone(self, token: str) -> bool:
        """Whether the worker with this token has ended and is swept away."""
        return not (self.folder / f"{token}.worker").exists()

    def _gone(self, mark: Path) -> bool:
        """Whether the worker of a mark is dead."""
        record = _record("owner", mark)
        if record is None:
            return self._still(mark)
        owner = Owner.from_record(record)
        return not alive if (alive := owner.alive()) is not None else self._still(mark.with_suffix(".beat"))

    def _dead(self, name: str, record: Mapping[str, Any] | None) -> bool:
        file = self.folder / name
        if record is None:  # given back since; or emptied by a power failure, since claims are not synced; or damaged
            return file.exists() and self._still(file)
        owner = Owner.from_record(record)
        if (alive := owner.alive()) is not None:
            return not alive
        return self._still(self.folder / f"{owner.token}.beat")

    def _still(self, file: Path) -> bool:
        return self._observer.still_for(file) > EXPIRY_SECONDS

    def _beat(self, count: int) -> str:
        beat: Beat = {"beat": count, "rows": self.done, "seconds": time.monotonic() - self.since}
        return state.sealed("beat", cast(dict[str, Any], beat))


# ------------------------------------------------------------------------------------------------------- reading


def holding(folder: Path) -> Iterator[tuple[Owner, Rows]]:
    """Owner and rows of each claim that holds: for each name, the one with the highest number."""
    last: dict[str, int] = {}
    for name, number in _claims(folder):
        last[name] = max(last.get(name, 0), number)
    for name, number in last.items():
        if record := _record("claim", folder / f"{name}.{number}"):
            yield Owner.from_record(record), record.get("rows", {})


def workers(folder: Path) -> Iterator[tuple[Owner, Beat | None]]:
    """Every worker that has not ended in order, and its last beat."""
    for file in folder.glob("*.worker"):
        if record := _record("owner", file):
            yield Owner.from_record(record), cast(Beat | None, _record("beat", file.with_suffix(".beat")))


def _claims(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and number of every claim."""
    for file in folder.glob("*"):
        if match := CLAIM.fullmatch(file.name):
            yield match[1], int(match[2])


def _last(folder: Path, name: str) -> int | None:
    # Usually no worker holds it: one look-up then, instead of a listing.
    if not (folder / f"{name}.0").exists():
        return None
    return max((number for own, number in _claims(folder) if own == name), default=None)


def _record(kind: str, file: Path) -> dict[str, Any] | None:
    """The object in a file; None where no file exists, or it is damaged."""
    try:
        return state.read(kind, file)
    except (FileNotFoundError, state.Damaged):
        return None


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink(missing_ok=True)
