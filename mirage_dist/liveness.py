"""Which process owns a directory and whether it still runs: identity, heartbeat, and observation of a heartbeat.

A process on this host, in this boot and in this pid namespace is looked up in the process table. Every other one (on
another host, or in another container, which may have the same host name) is judged by its heartbeat: a file whose
content changes while the owner lives, timed on the observer's own clock. Clocks of two machines are never compared.

To fence a dead owner off, remove the folder out of which it publishes by renames (`disk.remove`, which renames first):
every later rename of that owner fails, however late it comes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_dist.schema import documents
from mirage_dist.schema.errors import ConfigError
from mirage_dist.schema.names import shown

BEAT_SECONDS = 5.0  # between two beats
PARENTS = "MIRAGE_PARENTS"  # the processes with which one that they started ends: BOOT/NAMESPACE/PID, by spaces
PARENTS_SECONDS = 0.5  # between two looks at them
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True)
class Owner:
    """A process, unmistakable among all hosts, containers, boots and reused process numbers; a JSON object on disk.

    token: drawn at random, also part of file names. job, cluster, restart: Slurm's. boot, namespace: see `boot_id` and
    `pid_namespace`. process: see `process_start`. since: local time, for people.
    """

    token: str
    job: str | None = None
    cluster: str | None = None
    restart: int = 0
    host: str = ""
    boot: str = ""
    namespace: str = ""
    pid: int = 0
    process: str | None = None
    since: str = ""

    @classmethod
    def current(cls) -> Owner:
        """This process, with a new token."""
        return cls(
            token=secrets.token_hex(6),
            job=os.environ.get("SLURM_JOB_ID"),
            cluster=os.environ.get("SLURM_CLUSTER_NAME"),
            restart=restart_count(),
            host=socket.gethostname(),
            boot=boot_id(),
            namespace=pid_namespace(),
            pid=os.getpid(),
            process=process_start(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Owner:
        """An owner as `record` wrote it. Other keys are ignored; one that is missing, or whose value has another type,
        matches no process.
        """
        whole = {"restart": int, "pid": int}  # what is no text
        names = (field.name for field in dataclasses.fields(cls))
        right = {name: record[name] for name in names if isinstance(record.get(name), whole.get(name, str))}
        return cls(**{"token": "", **right})

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def alive(self) -> bool | None:
        """Whether the process runs, by the process table; None where this process cannot see it there."""
        place = (socket.gethostname(), boot_id(), pid_namespace())
        if place != (self.host, self.boot, self.namespace) or not all(place):
            return None
        if (start := process_start(self.pid)) is None and _hidden(self.pid):
            return None
        return start is not None and start == self.process

    def superseded(self) -> bool:
        """Whether this process is a later start of the same Slurm job.

        Slurm restarts a job only after it has given up the last start, so what is left of that is an orphan.
        """
        job, restart = os.environ.get("SLURM_JOB_ID"), restart_count()
        cluster = os.environ.get("SLURM_CLUSTER_NAME")  # clusters that share a file system count their jobs alike
        return job is not None and (self.job, self.cluster) == (job, cluster) and self.restart < restart

    def __str__(self) -> str:
        if not self.host:
            return f"a job of which only the token {self.token} is known"
        job = f"Slurm job {self.job} (restart {self.restart})" if self.job else "a job"
        return f"{job} on {self.host}, process {self.pid}, since {self.since}"


class Heartbeat:
    """A thread that writes a new content to `file` every BEAT_SECONDS until `stop` or the process's end."""

    def __init__(self, file: Path, content: Callable[[int], str] = str) -> None:
        """content: from the number of the beat, which counts from 1, to what is written."""
        self.file, self.content = file, content
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat {file.parent.name}", daemon=True)

    def start(self) -> Heartbeat:
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; does nothing when it was never started."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SECONDS):
            count += 1
            # A full disk must not end the owner here: it ends where it writes its results.
            with suppress(OSError):
                self.file.write_text(self.content(count))


class Observer:
    """Times on this process's own clock how long files that others write have stood still."""

    def __init__(self) -> None:
        self._last: dict[Path, tuple[str | None, float]] = {}

    def still_for(self, file: Path) -> float:
        """Seconds for which the content has not changed (no file counts as a content).

        0.0 at the first look at a file and at every look that finds a change.
        """
        content, now = _text(file), time.monotonic()
        before, since = self._last.setdefault(file, (content, now))
        if before != content:
            self._last[file] = (content, now)
            return 0.0
        return now - since


def read(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where no file exists or it does not hold a whole object."""
    try:
        record = json.loads(documents.read_bytes(file))
    except (ConfigError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def process_start(pid: int) -> str | None:
    """When the process started, in clock ticks since boot: unlike a number, never used again. None for no process."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # a zombie is dead, whoever was to reap it


def child_environment() -> dict[str, str]:
    """The variables of a process that this one starts and that ends with it (see `end_with_parents`)."""
    return {PARENTS: f"{os.environ.get(PARENTS, '')} {boot_id()}/{pid_namespace()}/{os.getpid()}"}


def end_with_parents() -> None:
    """Send this process SIGTERM once a process has ended that MIRAGE_PARENTS names, as SIGKILL ends one.

    Nobody waits for it then, and it would hold the directory that its parent's next start wants. It stops in order
    where it does at SIGTERM. Does nothing without the variable, which `child_environment` and launch/local.sh set, nor
    about processes on another host or in another container, where it may have been passed on to.
    """
    here, parents = f"{boot_id()}/{pid_namespace()}", {}
    for place, _, number in (word.rpartition("/") for word in os.environ.get(PARENTS, "").split()):
        if place == here and (pid := documents.whole_number(number)) is not None:
            parents[pid] = process_start(pid)
    if parents:
        threading.Thread(target=_watch_parents, args=(parents,), name="parents", daemon=True).start()


def _watch_parents(parents: Mapping[int, str | None]) -> None:
    while all(start is not None and process_start(pid) == start for pid, start in parents.items()):
        time.sleep(PARENTS_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as the thread that started it has ended, whatever it is at then.

    parent: the process number of that thread's process, which may have ended already. For a process that has nothing
    to stop in order, such as one of an engine on a GPU, which may be in a kernel or a collective for minutes.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def restart_count() -> int:
    """How often Slurm has restarted this job; 0 outside one. Raises ConfigError for a variable that is no number."""
    value = os.environ.get("SLURM_RESTART_COUNT") or "0"
    if (count := documents.whole_number(value)) is None:
        raise ConfigError(f"SLURM_RESTART_COUNT={shown(value)}: expected a whole number, as Slurm sets it; unset it")
    return count


def boot_id() -> str:
    """The id of this boot of this host, the same in all its containers; empty where none can be read."""
    return (_text(Path("/proc/sys/kernel/random/boot_id")) or "").strip()


def pid_namespace() -> str:
    """The namespaces in which this process's number and start time are valid, those of a container.

    Empty where none can be read, and where /proc shows another container's processes: its numbers would name others.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        kinds = [kind for kind in ("pid", "time") if kind in os.listdir("/proc/self/ns")]
        return ",".join(os.readlink(f"/proc/self/ns/{kind}") for kind in kinds)
    except OSError:
        return ""


def _hidden(pid: int) -> bool:
    """Whether a process of another user exists that /proc does not show (mount option hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _text(file: Path) -> str | None:
    try:
        return documents.read_bytes(file).decode()
    except (ConfigError, ValueError):
        return None
