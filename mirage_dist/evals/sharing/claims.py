"""Who works on what: claims by atomic links, without locks, on any file system that several nodes share.

    claims/TOKEN.worker  TOKEN.beat        a living worker, and a counter that moves while it lives
    claims/NAME.0  NAME.1 …                who holds NAME: of several, the last

A claim is made whole in a file of the worker's own and linked to its name, which is given to one worker only, on NFS
too. A worker is dead when its process is gone (same host) or its counter has stood still for `EXPIRY_SECONDS` of the
observer's own clock; clocks are never compared. Its claim is not taken away but followed by the next number, which
again one worker only can make. Whoever comes back late finds a higher number than its own.

Claims save work and decide nothing: what is done is what stands in the answers, and two workers that answer one
question leave two rows of one key.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_dist import process
from mirage_dist.evals.sharing.files import create, write_atomically

BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0  # NFS may show an old file for half a minute; a worker that loads a model may not beat for some


@dataclass(frozen=True)
class Claim:
    name: str
    number: int


class Claims:
    """This process's claims in a suite, kept alive by a thread until `close` or the process's end."""

    def __init__(self, suite: Path) -> None:
        self.folder, self.token = suite / "claims", secrets.token_hex(6)
        self.done, self.since = 0, time.monotonic()  # rows that this worker has answered, for `mirage eval --status`
        self._seen: dict[str, tuple[str | None, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        write_atomically(self.folder / f"{self.token}.worker", json.dumps(self._self()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for name in (f"{self.token}.worker", f"{self.token}.beat"):
            (self.folder / name).unlink(missing_ok=True)

    def take(self, name: str, rows: Mapping[str, Mapping[str, int]] | None = None) -> Claim | None:
        """Claim `name` unless a living worker has it. `rows`, by set and attack, is what progress tells of it."""
        last = self._last(name)
        if last is not None and not self._dead(f"{name}.{last}"):
            return None
        claim = Claim(name, 0 if last is None else last + 1)
        text = json.dumps({**self._self(), "rows": rows or {}})
        return claim if create(self.folder / f"{name}.{claim.number}", text, durable=False) else None

    def held(self, claim: Claim) -> bool:
        """Whether nobody took this process for dead and the claim over."""
        return self._last(claim.name) == claim.number

    def release(self, claim: Claim) -> None:
        """Give the claim back, with those of dead workers before it. Who looks next, looks at the answers first."""
        if not self.held(claim):
            return  # the successor is to find a number below its own, and removes both
        for number in range(claim.number, -1, -1):
            (self.folder / f"{claim.name}.{number}").unlink(missing_ok=True)

    def _last(self, name: str) -> int | None:
        # The usual case is that nobody has it: one look-up then, instead of a listing.
        if not (self.folder / f"{name}.0").exists():
            return None
        numbers = (file.suffix[1:] for file in self.folder.glob(f"{name}.*"))
        return max((int(number) for number in numbers if number.isdecimal()), default=None)

    def _dead(self, name: str) -> bool:
        owner = read(self.folder / name)
        if owner is None:
            return False  # given back since, or not readable now: look again
        if (alive := process_alive(owner)) is not None:
            return not alive
        beat, now = _text(self.folder / f"{owner['token']}.beat"), time.monotonic()
        before = self._seen.setdefault(owner["token"], (beat, now))
        if before[0] != beat:
            self._seen[owner["token"]] = (beat, now)
            return False
        return now - before[1] > EXPIRY_SECONDS

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            told = {"beat": count, "rows": self.done, "seconds": time.monotonic() - self.since}
            with suppress(OSError):  # a full disk ends the work where it writes its answers
                (self.folder / f"{self.token}.beat").write_text(json.dumps(told))

    def _self(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "job": os.environ.get("SLURM_JOB_ID"),
            "host": socket.gethostname(),
            "boot": process.boot(),
            "pid": os.getpid(),
            "process": process.started(os.getpid()),
        }


def process_alive(owner: Mapping[str, Any]) -> bool | None:
    """What the process table says of a worker on this host; None for one on another, and where there is no table."""
    if owner["host"] == socket.gethostname() and owner["boot"] == process.boot() != "":
        return process.started(owner["pid"]) == owner["process"]
    return None


def read(file: Path) -> dict[str, Any] | None:
    """A claim, a worker or its beat; None where there is none, or none that is whole."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None
