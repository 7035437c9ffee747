"""Who may write a run directory: one job at a time, and none that comes back after another took over.

    owner.json             who: token, job, host, process
    work-TOKEN.tmp/        the owner's workspace; `beat` in it counts while the owner lives

The fence: whatever the owner publishes (a checkpoint, `latest`, an export) is a rename out of its workspace, and what
it takes away is a rename into it. A job that takes over removes its predecessor's workspace, and every later rename
of the predecessor fails, however late it comes. Liveness is a counter that moves, never a clock that may be wrong.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mirage_dist import process
from mirage_dist.schema import RunError

BEAT_SECONDS = 5.0
BEATS_MISSED = 3  # how many silent beats make an owner on another host dead
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a disk that takes nothing more


class Fenced(RunError):
    """Another job has taken this run directory over; nothing more can be written here."""


class Lease:
    """The right to write one run directory, held by rank 0 until `release` or the process's end."""

    def __init__(self, root: Path, token: str) -> None:
        self.root, self.token = root, token
        self.workspace = root / f"work-{token}.tmp"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Raise Fenced when another job has taken over."""
        if not self.workspace.is_dir():
            owner = _read(self.root / "owner.json")
            raise Fenced(f"{self.root} was taken over by {_told(owner)}; this process stops and writes nothing more")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Say what a failed write under the run directory means. Raises Fenced, or RunError where the disk refused."""
        try:
            yield
        except OSError as error:
            self.check()
            if error.errno in REFUSALS:
                raise RunError(f"{self.root}: cannot be written ({error}); every checkpoint in it is whole") from error
            raise

    def publish(self, name: str, text: str) -> None:
        """Put a file of this name into the run directory."""
        (self.workspace / name).write_text(text, encoding="utf-8")
        self.put(name)

    def put(self, name: str) -> None:
        """Move a file from the workspace into the run directory: the old one or the whole new one is there."""
        with (self.workspace / name).open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(self.workspace / name, self.root / name)

    def start(self) -> Lease:
        self._thread.start()
        return self

    def release(self) -> None:
        """Give the directory back. What is still in the workspace was never committed and goes."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        with suppress(OSError):  # another job took over: the file is its own
            os.rename(self.root / "owner.json", self.workspace / "owner.json")
        _remove(self.workspace)

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            # A full disk must not end the owner; its successor then waits for a beat that does not come, and asks pid.
            with suppress(OSError):
                (self.workspace / "beat").write_text(str(count))


def acquire(root: Path) -> Lease:
    """Take the run directory, from a predecessor that is dead or that Slurm has requeued.

    Raises RunError naming the owner when it is alive, or the fault when the directory cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(root / "owner.lock"):
            owner = _read(root / "owner.json")
            if owner is not None and not _superseded(owner) and _alive(root, owner):
                raise RunError(
                    f"{root} belongs to {_told(owner)}, which is running. Wait for it or cancel it, or choose another "
                    "run.dir"
                )
            lease = Lease(root, secrets.token_hex(6))
            lease.workspace.mkdir()
            # The predecessor is fenced before our name stands there, so that it cannot take that away.
            for other in root.glob("work-*"):
                if other != lease.workspace:
                    _remove(other)
            lease.publish("owner.json", json.dumps({"token": lease.token, **_self()}, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{root}: the run directory cannot be written: {error}") from error
    return lease.start()


def _self() -> dict[str, Any]:
    return {
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "host": socket.gethostname(),
        "boot": process.boot(),
        "pid": os.getpid(),
        "process": process.started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _superseded(owner: Mapping[str, Any]) -> bool:
    """Slurm restarts a job only after it has given the last start up; what is left of that is an orphan."""
    mine = _self()
    return mine["job"] is not None and owner["job"] == mine["job"] and owner["restart"] < mine["restart"]


def _alive(root: Path, owner: Mapping[str, Any]) -> bool:
    """On this host the process table tells, where there is one to read; else a beat that moves, on our own clock."""
    if owner["host"] == socket.gethostname() and owner["boot"] == process.boot() != "":
        return process.started(owner["pid"]) == owner["process"]
    workspace = root / f"work-{owner['token']}.tmp"
    first = _beats(workspace)
    for _ in range(BEATS_MISSED):
        if not workspace.is_dir():
            return False
        time.sleep(BEAT_SECONDS)
        if _beats(workspace) != first:
            return True
    return False


def _beats(workspace: Path) -> str | None:
    try:
        return (workspace / "beat").read_text()
    except OSError:
        return None


def _told(owner: Mapping[str, Any] | None) -> str:
    if owner is None:
        return "a job that has ended since"
    job = f"Slurm job {owner['job']} (restart {owner['restart']})" if owner["job"] else "a job"
    return f"{job} on {owner['host']}, process {owner['pid']}, since {owner['since']}"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Two jobs that start at once decide one after the other; where the file system has no locks, at their own risk."""
    with file.open("w") as handle:
        with suppress(OSError):
            fcntl.lockf(handle, fcntl.LOCK_EX)
        yield


def _remove(workspace: Path) -> None:
    """Remove a workspace although its former owner may still be busy in it.

    The rename comes first: from then on no path of the former owner leads anywhere, so it can publish nothing, not even
    a folder half of whose files are gone.
    """
    gone = workspace.with_suffix(".gone")
    with suppress(FileNotFoundError):
        os.rename(workspace, gone)
    for _ in range(20):
        shutil.rmtree(gone, ignore_errors=True)
        if not gone.exists():
            return
        time.sleep(0.1)
    raise OSError(f"{gone} cannot be removed: something keeps writing into it")
