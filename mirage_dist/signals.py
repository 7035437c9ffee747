"""SIGUSR1 and SIGTERM as a request to stop in order: finish the step, commit, exit with a status that says "again".

A scheduler sends them before a time limit, at a preemption and at a cancellation. The handler only records the signal;
the code at work checks for it wherever it can stop safely.

Until training begins (`start_up`), nothing is uncommitted, and the process may be anywhere: in an import, in a library
that computes for minutes, in a collective that another rank does not join. There it ends GRACE seconds after the signal
at the latest.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mirage_dist.progress import rank
from mirage_dist.schema import ConfigError, RunError

# EX_TEMPFAIL of sysexits.h: nothing failed, all work is committed, and the same command continues it. slurm/common.sh
# requeues the job on this status.
STOPPED = 75
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
GRACE = 2.0  # seconds from a signal in a start-up to the end of a process that has reached no stop point by then
NOTHING_LOST = "stopped on request before training began; nothing was left to commit"

_received: list[str] = []
_arrived: list[float] = []  # when signals arrived, whether or not the handler has run since
_depth = {"start_up": 0, "stop_points": 0}  # how many blocks of each kind this process is in
_actions: list[Callable[[], None]] = []
_ending = threading.RLock()  # held by the thread that ends the process, so that no block is left meanwhile
_wakeup: list[int] = []  # the descriptor that the interpreter writes the number of a signal to, at once


class StopRequested(Exception):
    """Raised at a point where the work can stop; the message says what is committed."""


def install() -> None:
    """Record the signals instead of dying from them. Call it early: importing torch takes seconds."""
    for number in SIGNALS:
        signal.signal(number, handler)
    if not _wakeup:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        _wakeup.append(writing)
        threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
        os.register_at_fork(before=_unhook, after_in_parent=_hook, after_in_child=_unhook)
    _hook()


@contextmanager
def start_up() -> Iterator[None]:
    """For work that commits nothing: a signal ends the process within GRACE seconds, with status STOPPED.

    Raises StopRequested when a signal came before the block, and instead of an error that comes after one, such as the
    loss of a rank that has stopped already.
    """
    if _received or _arrived:
        raise StopRequested(NOTHING_LOST)
    _depth["start_up"] += 1
    try:
        yield
    except (StopRequested, ConfigError, RunError):
        raise
    except Exception:
        if _received or _arrived:
            raise StopRequested(NOTHING_LOST) from None
        raise
    finally:
        with _ending:
            _depth["start_up"] -= 1


@contextmanager
def at_stop_points() -> Iterator[None]:
    """Within `start_up`, for work that commits what it has done, and looks for signals by itself."""
    with _ending:
        _depth["stop_points"] += 1
    try:
        yield
    finally:
        _depth["stop_points"] -= 1


@contextmanager
def before_end(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` if a signal ends the process in this block, at an unknown point and in another thread."""
    _actions.append(action)
    try:
        yield
    finally:
        with _ending:
            _actions.remove(action)


def _watch(reading: int) -> None:
    """Runs in a thread: the main one may be inside a library, where no Python handler runs until it returns."""
    while True:
        if not set(os.read(reading, 512)) & set(SIGNALS):
            continue
        arrived = time.monotonic()
        _arrived.append(arrived)
        while _arrived:
            time.sleep(max(0.1, arrived + GRACE - time.monotonic()))
            with _ending:
                if _arrived and _depth["start_up"] and not _depth["stop_points"]:
                    _end()


def _end() -> None:
    for action in reversed(_actions):
        with suppress(Exception):
            action()
    if rank() == 0:
        with suppress(OSError):
            os.write(1, f"mirage: {NOTHING_LOST}\n".encode())
    os._exit(STOPPED)


def _hook() -> None:
    with suppress(ValueError):  # not the main thread
        signal.set_wakeup_fd(_wakeup[0], warn_on_full_buffer=False)


def _unhook() -> None:
    """Around a fork: a signal to the new process, which has the same descriptors, is none of this one's."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


def wait(seconds: float) -> bool:
    """Wait for a signal; whether one has come, now or earlier."""
    end = time.monotonic() + seconds
    while not _received and time.monotonic() < end:
        time.sleep(0.05)
    return bool(_received)


def received() -> str | None:
    """The name of the first signal received, None before one arrives."""
    return _received[0] if _received else None


def clear() -> None:
    """Forget the signals received so far: a process that goes on after a stop, such as a test, starts anew."""
    _received.clear()
    _arrived.clear()


def handler(number: int, _frame: FrameType | None) -> None:
    """Record a signal. `print` may be the very thing that was interrupted; a plain write to the descriptor is safe."""
    if not _received and rank() == 0:  # a launcher signals all ranks
        with suppress(OSError):  # whoever reads this may have ended, and the signal come for that; the stop is in order
            os.write(2, f"mirage: {signal.Signals(number).name} received: stopping in order\n".encode())
    _received.append(signal.Signals(number).name)
