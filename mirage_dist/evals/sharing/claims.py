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

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from mirage_dist import disk, liveness
from mirage_dist.evals.sharing.files import KEPT
from mirage_dist.liveness import Heartbeat, Observer, Owner

EXPIRY_SECONDS = 60.0  # NFS may show an old file for half a minute; loading a model may delay beats for some seconds


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
    """This process's claims in a suite, kept alive by a thread until the block's or the process's end."""

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
            disk.write(self.folder / f"{self.token}.worker", json.dumps(self.owner.record()), private=True)
        self.heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heartbeat.stop()
        for name in (f"{self.token}.worker", f"{self.token}.beat"):
            (self.folder / name).unlink(missing_ok=True)

    def take(self, name: str, rows: Mapping[str, Mapping[str, int]] | None = None) -> Claim | None:
        """Claim `name`; None while a living worker holds it.

        rows: the numbers of questions by set and attack, which `mirage eval --status` reports as claimed.
        Raises RunError when the disk is full.
        """
        last = self._last(name)
        if last is not None and not self._dead(f"{name}.{last}"):
            return None
        claim = Claim(name, 0 if last is None else last + 1)
        text = json.dumps({**self.owner.record(), "rows": rows or {}})
        with disk.refusals(self.folder, KEPT):
            return claim if disk.create(self.folder / f"{name}.{claim.number}", text, durable=False) else None

    def held(self, claim: Claim) -> bool:
        """Whether no worker has taken this process for dead and followed the claim."""
        return self._last(claim.name) == claim.number

    def release(self, claim: Claim) -> None:
        """Give the claim back, with those of dead workers before it. Whoever claims it next first reads the answers."""
        if not self.held(claim):
            return  # a successor must find a number below its own; it removes both
        for number in range(claim.number, -1, -1):
            (self.folder / f"{claim.name}.{number}").unlink(missing_ok=True)

    def _last(self, name: str) -> int | None:
        # Usually no worker holds it: one look-up then, instead of a listing.
        if not (self.folder / f"{name}.0").exists():
            return None
        numbers = (file.suffix[1:] for file in self.folder.glob(f"{name}.*"))
        return max((int(number) for number in numbers if number.isdecimal()), default=None)

    def _dead(self, name: str) -> bool:
        file = self.folder / name
        record = liveness.read(file)
        if record is None:  # given back since, or emptied by a power failure, since claims are not synced
            return file.exists() and self._observer.still_for(file) > EXPIRY_SECONDS
        owner = Owner.from_record(record)
        if (alive := owner.alive()) is not None:
            return not alive
        return self._observer.still_for(self.folder / f"{owner.token}.beat") > EXPIRY_SECONDS

    def _beat(self, count: int) -> str:
        beat: Beat = {"beat": count, "rows": self.done, "seconds": time.monotonic() - self.since}
        return json.dumps(beat)
