"""A rank that dies or hangs ends the run within a set time, by name, where the others would wait in a collective.

Each rank tells the process group's store two counters: *beats*, the collectives that its main thread has entered, and
*ticks*, which its watchdog thread counts whatever the main thread does. Ticks that stand still: the process is dead
or stopped. Beats that stand still and are behind the others': that rank is what everyone waits for.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from mirage_dist import ranks
from mirage_dist.ranks import Group

CHECKS = 8  # a time limit


@dataclass
class _Seen:
    """What a rank told last, and when (on our clock) its beats and its ticks changed."""

    beats: int
    ticks: int
    where: str
    host: str
    beat_at: float
    tick_at: float


class Watchdog:
    """Watches from `start` to `stop`; silent unless a rank stands still for `seconds`."""

    def __init__(self, group: Group, seconds: float) -> None:
        self.group, self.seconds, self.every = group, seconds, min(5.0, seconds / CHECKS)
        self._seen: dict[int, _Seen] = {}
        self._answered = time.monotonic()  # when the store did last
        self._stop = threading.Event()
        # Two, because a store whose process is stopped holds whoever asks it.
        self._threads = [threading.Thread(target=t, name=t.__name__, daemon=True) for t in (self._talk, self._judge)]

    @property
    def _watched(self) -> Sequence[int]:
        """The first rank watches all; the others watch it."""
        return range(self.group.size) if self.group.main else (0,)

    def start(self) -> Watchdog:
        """Every rank calls this at the same point: one that is never heard of is missed from now on."""
        if self.group.size > 1:
            now = self._answered = time.monotonic()
            self._seen = {r: _Seen(0, 0, "the start", "an unknown host", now, now) for r in self._watched}
            for thread in self._threads:
                thread.start()
        return self

    def stop(self) -> None:
        """End watching; every rank calls this at the same point, since a silent watchdog looks like a dead process."""
        self._stop.set()

    def _talk(self) -> None:
        store = ranks.store()
        for ticks in itertools.count(1):
            beats, where = ranks.last_call()
            try:
                store.set(f"watchdog/{self.group.rank}", f"{beats}|{ticks}|{socket.gethostname()}|{where}")
                told = {r: store.get(f"watchdog/{r}") for r in self._watched if store.check([f"watchdog/{r}"])}
            except RuntimeError:
                return  # the judge will miss the answers
            self._answered = time.monotonic()
            for rank, text in told.items():
                self._seen[rank] = _seen(self._seen[rank], text.decode(), self._answered)
            if self._stop.wait(self.every):
                return

    def _judge(self) -> None:
        while not self._stop.wait(self.every):
            now = time.monotonic()
            fault = verdict(dict(self._seen), now, self.seconds)
            if now - self._answered > self.seconds:
                fault = "rank 0 is dead or stopped: its store does not answer"
            if fault and not self._stop.is_set():
                self._end(fault)

    def _end(self, fault: str) -> NoReturn:
        """The main thread waits in a collective that cannot be left, so the process ends here."""
        print(f"mirage: {fault}; the run ends (train.hang_seconds={self.seconds:g})", file=sys.stderr, flush=True)
        os._exit(1)


def _seen(last: _Seen, text: str, now: float) -> _Seen:
    beats, ticks, host, where = text.split("|", 3)
    beat_at = last.beat_at if last.beats == int(beats) else now
    tick_at = last.tick_at if last.ticks == int(ticks) else now
    return _Seen(int(beats), int(ticks), where, host, beat_at, tick_at)


def verdict(seen: dict[int, _Seen], now: float, seconds: float) -> str | None:
    """Which rank everyone waits for, None while all move."""
    silent = [rank for rank, s in seen.items() if now - s.tick_at > seconds]
    if silent:
        return f"{_name(silent[0], seen)} is dead or stopped: it has not answered for {seconds:g} s"
    # Who sees one rank only cannot tell whether that rank is waited for or waits itself.
    if len(seen) < 2 or any(now - s.beat_at <= seconds for s in seen.values()):
        return None
    behind = min(seen, key=lambda rank: seen[rank].beats)
    if seen[behind].beats == max(s.beats for s in seen.values()):
        return f"all ranks have stood still behind {seen[behind].where!r} for {seconds:g} s"
    return f"{_name(behind, seen)} hangs: it has not moved for {seconds:g} s"


def _name(rank: int, seen: dict[int, _Seen]) -> str:
    return f"rank {rank} on {seen[rank].host}, last at {seen[rank].where!r},"
