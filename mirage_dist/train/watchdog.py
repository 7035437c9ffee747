"""Names a rank that is dead or hangs and ends the run within a set time, instead of waiting in a collective.

Each rank publishes two counters in the process group's store: *beats*, the collectives that its main thread has
entered, and *ticks*, which its watchdog thread counts independently of the main thread. When the ticks of a rank stand
still, its process is dead or stopped. When the beats of all ranks stand still, every rank waits for the one with the
fewest.

Before it ends the run, every rank that can writes where it stands into the run directory (`hang/`): the stack of each
thread, and the last collectives that torch's flight recorder holds. Both are names of files, lines and functions, and
shapes of tensors; neither holds a value.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mirage_dist import calls, ranks
from mirage_dist.progress import show
from mirage_dist.ranks import Group

CHECKS = 8  # in one time limit
RECORDER_SECONDS = 5.0  # for the flight recorder, which may wait for what hangs
REQUEST = "watchdog/write"  # key of the store: all ranks are to write where they stand


@dataclass
class Observation:
    """The last counters of a rank, and when they changed, in seconds on this process's clock.

    where: the name of the last collective that the rank entered.
    """

    beats: int
    ticks: int
    where: str
    host: str
    beat_at: float
    tick_at: float


class Watchdog:
    """Watches from `start` to `stop`, and ends the run when a rank stands still for `seconds`."""

    def __init__(self, group: Group, seconds: float, folder: Path | None = None) -> None:
        """folder: where the ranks write where they stand; None for nowhere."""
        self.group, self.seconds, self.every = group, seconds, min(5.0, seconds / CHECKS)
        self.folder, self._written = folder, threading.Lock()
        self._observations: dict[int, Observation] = {}
        self._answered = time.monotonic()  # time of the store's last answer
        self._stop = threading.Event()
        # Two threads, because a call to a store whose process is stopped does not return.
        threads = (self._exchange, self._judge)
        self._threads = [threading.Thread(target=t, name=t.__name__, daemon=True) for t in threads]

    @property
    def _watched(self) -> Sequence[int]:
        """Rank 0 watches all ranks; the others watch rank 0."""
        return range(self.group.size) if self.group.main else (0,)

    def start(self) -> Watchdog:
        """Every rank calls this at the same point: a rank that never answers counts as silent from now on."""
        if self.group.size > 1:
            now = self._answered = time.monotonic()
            self._observations = {r: Observation(0, 0, "the start", "an unknown host", now, now) for r in self._watched}
            for thread in self._threads:
                thread.start()
        return self

    def stop(self) -> None:
        """Every rank calls this at the same point, since a silent watchdog looks like a dead process."""
        self._stop.set()

    def _exchange(self) -> None:
        store = ranks.store()
        for ticks in itertools.count(1):
            beats, where = calls.last()
            try:
                store.set(f"watchdog/{self.group.rank}", f"{beats}|{ticks}|{socket.gethostname()}|{where}")
                answers = {r: store.get(f"watchdog/{r}") for r in self._watched if store.check([f"watchdog/{r}"])}
                if store.check([REQUEST]) and self._write():
                    store.set(f"{REQUEST}/{self.group.rank}", "written")
            except RuntimeError:
                return  # the judging thread notices that answers are missing
            self._answered = time.monotonic()
            for rank, text in answers.items():
                self._observations[rank] = updated(self._observations[rank], text.decode(), self._answered)
            if self._stop.wait(self.every):
                return

    def _judge(self) -> None:
        while not self._stop.wait(self.every):
            now = time.monotonic()
            fault = verdict(dict(self._observations), now, self.seconds)
            if now - self._answered > self.seconds:
                fault = "rank 0 is dead or stopped: its store does not answer"
            fault = calls.different() or fault
            if fault and not self._stop.is_set():
                self._end(fault)

    def _end(self, fault: str) -> NoReturn:
        """End the process here: its main thread waits in a collective that cannot be interrupted."""
        if self.folder is not None:
            written = self._write() + (self._others() if self.group.main else 0)
            fault += f"; the stacks of {written} of {self.group.size} ranks are in {self.folder}"
        show(f"mirage: {fault}; the run ends (train.hang_seconds={self.seconds:g})", error=True)
        os._exit(1)

    def _others(self) -> int:
        """Ask every rank to write; how many have, after a wait for those whose watchdog still answers."""
        now, written = time.monotonic(), set[int]()
        ticking = {rank for rank, o in self._observations.items() if now - o.tick_at <= self.seconds}
        limit = now + 2 * self.every + RECORDER_SECONDS
        with suppress(RuntimeError):
            store = ranks.store()
            store.set(REQUEST, "")
            while waiting := ticking - written - {self.group.rank}:
                written |= {rank for rank in waiting if store.check([f"{REQUEST}/{rank}"])}
                if time.monotonic() > limit:
                    break
                time.sleep(0.1)
        return len(written)

    def _write(self) -> bool:
        """Write where this rank stands, once; whether this call did."""
        if self.folder is None or not self._written.acquire(blocking=False):
            return False
        name = f"rank-{self.group.rank:05d}"
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            with (self.folder / f"{name}.txt").open("w") as file:
                beats, where = calls.last()
                place = f"rank {self.group.rank} on {socket.gethostname()}"
                file.write(f"{time.strftime('%FT%T%z')}: {place}, last at {where!r} (call {beats})\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            recorder = threading.Thread(target=self._write_collectives, args=(name,), daemon=True)
            recorder.start()
            recorder.join(RECORDER_SECONDS)
        return True

    def _write_collectives(self, name: str) -> None:
        assert self.folder is not None
        with suppress(OSError, RuntimeError):
            if recorded := _collectives():
                (self.folder / f"{name}.json").write_bytes(recorded)


def _collectives() -> bytes | None:
    """The last collectives of this process, as JSON, by torch's flight recorder; None where it recorded none."""
    from torch._C import _distributed_c10d

    own: Any = _distributed_c10d
    read = getattr(own, "_dump_nccl_trace_json", None) or getattr(own, "_dump_fr_trace_json", None)
    recorded = None if read is None else read()
    if recorded is None or (b'"entries"' not in recorded and '"entries"' not in str(recorded)):
        return None
    return recorded if isinstance(recorded, bytes) else str(recorded).encode()


def updated(last: Observation, text: str, now: float) -> Observation:
    """The observation after a rank's message `text` (beats|ticks|host|where) at the time `now`."""
    beats, ticks, host, where = text.split("|", 3)
    beat_at = last.beat_at if last.beats == int(beats) else now
    tick_at = last.tick_at if last.ticks == int(ticks) else now
    return Observation(int(beats), int(ticks), where, host, beat_at, tick_at)


def verdict(observations: dict[int, Observation], now: float, seconds: float) -> str | None:
    """A sentence that names the rank for which the others wait; None while ranks make progress."""
    silent = [rank for rank, o in observations.items() if now - o.tick_at > seconds]
    if silent:
        return f"{_name(silent[0], observations)} is dead or stopped: it has not answered for {seconds:g} s"
    # From one rank alone it cannot be decided whether others wait for that rank or that rank waits for them.
    if len(observations) < 2 or any(now - o.beat_at <= seconds for o in observations.values()):
        return None
    last = min(observations, key=lambda rank: observations[rank].beats)
    if observations[last].beats == max(o.beats for o in observations.values()):
        return f"all ranks have stood still after {observations[last].where!r} for {seconds:g} s"
    return f"{_name(last, observations)} hangs: it has not moved for {seconds:g} s"


def _name(rank: int, observations: dict[int, Observation]) -> str:
    return f"rank {rank} on {observations[rank].host}, last at {observations[rank].where!r},"
