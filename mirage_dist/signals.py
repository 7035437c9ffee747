"""SIGUSR1 and SIGTERM as a request to stop in order: finish the step, commit, exit with a status that says "again".

A scheduler sends them before a time limit, at a preemption and at a cancellation. The handler only records the signal;
the code at work checks for it wherever it can stop safely.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from mirage_dist.progress import rank

# EX_TEMPFAIL of sysexits.h: nothing failed, all work is committed, and the same command continues it. slurm/common.sh
# requeues the job on this status.
STOPPED = 75
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_received: list[str] = []


class StopRequested(Exception):
    """Raised at a point where the work can stop; the message says what is committed."""


def install() -> None:
    """Record the signals instead of dying from them. Call it early: importing torch takes seconds."""
    for number in SIGNALS:
        signal.signal(number, handler)


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


def handler(number: int, _frame: FrameType | None) -> None:
    """Record a signal. `print` may be the very thing that was interrupted; a plain write to the descriptor is safe."""
    if not _received and rank() == 0:  # a launcher signals all ranks
        os.write(2, f"mirage: {signal.Signals(number).name} received: stopping in order\n".encode())
    _received.append(signal.Signals(number).name)
