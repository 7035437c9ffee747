"""The right to write a run directory: one job at a time has it, and none that comes back after another took over.

    owner.json             the owner (see `liveness.Owner`), also in the mark of its workspace
    work-TOKEN.tmp/        the owner's workspace (marked, see `disk.own`); `beat` in it changes while it lives

The fence: everything that the owner publishes (a checkpoint, `latest`, an export) is a rename out of its workspace, and
everything that it removes is a rename into it. A job that takes over removes its predecessor's workspace, and every
later rename of the predecessor fails, however late it comes. The owner is alive when the process table or a changing
heartbeat shows it, never by a clock, which may be wrong.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mirage_dist import disk, liveness, state
from mirage_dist.liveness import Heartbeat, Observer, Owner
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, RunError

WORKSPACE = re.compile(r"work-([0-9a-f]{12})\.tmp(\.[0-9a-f]{8}\.gone)?")
LOCK = "owner.lock"  # made by the first start and never removed
LOCK_SECONDS, LOCK_PAUSE = 60.0, 0.05
BEATS_MISSED = 3  # after so many missed beats an owner that is not in the process table is dead


class Fenced(RunError):
    """Another job has taken this run directory over; this process can write nothing more in it."""


class Lease:
    """The right to write one run directory, held by rank 0 until `release` or the process's end."""

    def __init__(self, root: Path, owner: Owner) -> None:
        self.root, self.owner = root, owner
        self.workspace = workspace_of(root, owner)
        self.heartbeat = Heartbeat(self.workspace / "beat")

    def check(self) -> None:
        """Raise Fenced when another job has taken over."""
        if not self.workspace.is_dir():
            owner = _read(self.root)
            successor = "a job that has ended since" if owner is None else str(owner)
            raise Fenced(f"{self.root} was taken over by {successor}; this process stops and writes nothing more")

    @contextmanager
    def write_failures(self) -> Iterator[None]:
        """Explain a failed write under the run directory.

        Raises Fenced when another job has taken over, and RunError when the disk accepts no more data.
        """
        with disk.refusals(self.root, "every checkpoint in it is whole"):
            try:
                yield
            except OSError:
                self.check()
                raise

    def publish(self, name: str, text: str) -> None:
        """Write a file of this name in the run directory: a reader sees the old content or the new one."""
        disk.write(self.root / name, text, workspace=self.workspace)

    def put(self, name: str) -> None:
        """Move a file from the workspace into the run directory, in one step."""
        disk.publish(self.workspace / name, self.root / name)

    def start(self) -> Lease:
        self.heartbeat.start()
        return self

    def release(self) -> None:
        """Give the directory back. What is still in the workspace was never committed, and is removed."""
        self.heartbeat.stop()
        with suppress(OSError):  # another job took over: the file is that job's
            os.rename(self.root / "owner.json", self.workspace / "owner.json")
        disk.remove(self.workspace)


def workspace_of(root: Path, owner: Owner) -> Path:
    return root / f"work-{owner.token}.tmp"


def acquire(root: Path) -> Lease:
    """Take the run directory, from a predecessor that is dead or that Slurm has requeued.

    Raises RunError naming the owner when it is alive, or the fault when the directory cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(root / LOCK):
            owner = _read(root)
            for candidate in _of_workspaces(root) if owner is None else [owner]:
                if not candidate.superseded() and _alive(root, candidate):
                    raise RunError(
                        f"{root} belongs to {candidate}, which is running. Wait for it or cancel it, or choose another "
                        "run.dir"
                    )
            lease = Lease(root, Owner.current())
            disk.own(lease.workspace, lease.owner)
            # The predecessor is fenced before our name is published, so that it cannot remove that.
            for other in root.glob("work-*"):
                if other != lease.workspace and WORKSPACE.fullmatch(other.name):
                    disk.remove_own(other)
            if owner is not None and workspace_of(root, owner).exists():
                raise RunError(
                    f"{workspace_of(root, owner)}: the workspace of {owner}, which has ended, holds no {disk.MARK}; "
                    "remove it when no job writes there, then start again"
                )
            lease.publish("owner.json", state.sealed("owner", lease.owner.record(), indent=1))
    except OSError as error:
        raise RunError(f"{root}: the run directory cannot be written: {error}") from error
    return lease.start()


def _alive(root: Path, owner: Owner) -> bool:
    """By the process table where the owner can be seen in it, otherwise by its heartbeat."""
    if (alive := owner.alive()) is not None:
        return alive
    workspace, observer = workspace_of(root, owner), Observer()
    observer.still_for(workspace / "beat")
    for _ in range(BEATS_MISSED):
        if not workspace.is_dir():
            return False
        time.sleep(liveness.BEAT_SECONDS)
        if observer.still_for(workspace / "beat") == 0.0:
            return True
    return False


def _read(root: Path) -> Owner | None:
    """The owner by owner.json; None where there is none, or where it is damaged, which is reported."""
    try:
        return Owner.from_record(state.read("owner", root / "owner.json"))
    except FileNotFoundError:
        return None
    except (state.Damaged, ConfigError) as error:
        log.warning(f"{error}. Whether an owner is alive is decided by the workspaces in {root}")
        return None


def _of_workspaces(root: Path) -> Iterator[Owner]:
    """The owners of all workspaces, by their marks. One whose mark is damaged is known by its token alone."""
    for workspace in sorted(root.glob("work-*.tmp")):
        if (name := WORKSPACE.fullmatch(workspace.name)) and disk.owned(workspace):
            owner = Owner.from_record(liveness.read(workspace / disk.MARK) or {})
            # The token names the beat to watch.
            yield owner if owner.token == name[1] else Owner(name[1])


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Two jobs that start at once decide one after the other, where the file system has locks.

    Raises RunError when another process has held the lock for `LOCK_SECONDS`: it takes milliseconds unless that process
    is stopped.
    """
    end = time.monotonic() + LOCK_SECONDS
    with file.open("w") as handle:
        while True:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    break  # no locks here
                if time.monotonic() > end:
                    raise RunError(
                        f"{file}: another process has held it for {LOCK_SECONDS:g} s while it takes this directory; it "
                        "is stopped or hangs. End it, then start again"
                    ) from error
                time.sleep(LOCK_PAUSE)
        yield
