"""SIGUSR1 and SIGTERM as a request to stop in order: finish the step, commit, exit with a status that says "again".

A scheduler sends them before a time limit, at a preemption, at a cancellation. The handler only takes a note; whoever
does the work asks for it where stopping is safe.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

# EX_TEMPFAIL of sysexits.h: nothing failed, all is committed, the same command goes on. slurm/common.sh requeues on it.
STOPPED = 75
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_received: list[str] = []


class StopRequested(Exception):
    """Raised where work can be left; the message says what is committed."""


def install() -> None:
    """Note the signals instead of dying by them; as early as can be, since importing torch takes seconds."""
    for number in SIGNALS:
        signal.signal(number, handler)


def received() -> str | None:
    """The name of the first signal that came, None so far."""
    return _received[0] if _received else None


def clear() -> None:
    """Forget the signals received so far: a process that goes on after a stop, such as a test, starts anew."""
    _received.clear()


def handler(number: int, _frame: FrameType | None) -> None:
    """Record a signal. `print` may be the very thing that was interrupted; a plain write to the descriptor is safe."""
    if not _received:
        os.write(2, f"mirage: {signal.Signals(number).name} received: stopping in order\n".encode())
    _received.append(signal.Signals(number).name)
