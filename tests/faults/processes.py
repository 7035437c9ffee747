"""A run as its user starts it, with its ranks in the process table, and SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

VICTIMS = ("a rank", "all ranks", "the launcher")


class Start:
    """One `launch/local.sh`, its output in a file, and the ranks that it started."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self, victim: str, rank: int) -> list[int]:
        """SIGKILL, as soon as there is such a process; the ranks that nobody waits for any more."""
        ranks = ranks_of(self.process.pid)
        while self.alive() and rank not in ranks:
            time.sleep(0.001)
            ranks = ranks_of(self.process.pid)
        if victim == "the launcher":
            send(self.process.pid, signal.SIGKILL)
            return list(ranks.values())
        end([number for r, number in ranks.items() if victim == "all ranks" or r == rank])
        return []

    def wait(self, seconds: float) -> int | None:
        """The exit status; None, with all its processes killed, when it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for number in (*ranks_of(self.process.pid).values(), self.process.pid):
                send(number, signal.SIGKILL)
            self.process.wait()
            return None


def ranks_of(launcher: int) -> dict[int, int]:
    """rank -> process id, of those that a launcher has started and that run."""
    ranks = {}
    with suppress(OSError):
        for child in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
            if running(child) and (rank := _rank(child)) is not None and (number := worker(child)) is not None:
                ranks[rank] = number
    return ranks


def marked(variable: str, value: str) -> set[int]:
    """The processes that have a variable with this value in the environment they were started with, and run."""
    entry, numbers = f"{variable}={value}".encode(), set()
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            number = int(folder.name)
            if entry in (folder / "environ").read_bytes().split(b"\0") and running(number):
                numbers.add(number)
    return numbers


def worker(number: int) -> int | None:
    """The process that does the work of `number`: itself, or the one that it is the client of (see tests/forkserver).

    None while the client waits for it, and when it has ended.
    """
    try:
        words = Path(f"/proc/{number}/cmdline").read_text().split("\0")
        if not any(word.endswith("forkserver/client.py") for word in words):
            return number
        return int(Path(words[3], str(number)).read_text())
    except OSError:
        return None


def send(number: int, name: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(number, name)


def end(orphans: Sequence[int]) -> bool:
    """SIGKILL, and wait until they are gone (they are not our children); whether one of them still ran."""
    alive = any(running(number) for number in orphans)
    for number in orphans:
        send(number, signal.SIGKILL)
    while any(running(number) for number in orphans):
        time.sleep(0.005)
    return alive


def _rank(number: int) -> int | None:
    """Which rank a process is; the launcher's own helpers are none."""
    if b"mirage_dist.cli" not in Path(f"/proc/{number}/cmdline").read_bytes():
        return None
    environment = dict(v.split(b"=", 1) for v in Path(f"/proc/{number}/environ").read_bytes().split(b"\0") if b"=" in v)
    return int(environment[b"RANK"]) if b"RANK" in environment else None


def running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
