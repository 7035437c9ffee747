"""`mirage eval CONFIG --workers N`: N workers on this machine, each a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from mirage_dist import signals
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.signals import StopRequested

POLL_SECONDS = 0.1


def run(config: str, overrides: Sequence[str], workers: int) -> None:
    """Start them and wait for all. A signal is passed on; a worker that fails is named, and the others do its work.

    Raises StopRequested after a signal, RunError naming the first worker that failed; bad input ends all of them.
    """
    command = [sys.executable, "-m", "mirage_dist.cli", "eval", config, *overrides]
    started = [
        subprocess.Popen([*command, "--worker", f"{i}/{workers}"], env=environment(i, workers)) for i in range(workers)
    ]
    first: tuple[int, int] | None = None
    passed_on = False
    while any(process.poll() is None for process in started):
        failed = [i for i, process in enumerate(started) if process.returncode not in (None, 0, signals.STOPPED)]
        if failed and first is None:
            first = failed[0], started[failed[0]].returncode
            print(f"worker {first[0]} of {workers} {_ended(first[1])}; the others go on", file=sys.stderr, flush=True)
        if not passed_on and (signals.received() or (first and first[1] == ConfigError.status)):
            passed_on = True
            for process in started:
                process.terminate()
        time.sleep(POLL_SECONDS)
    statuses = [process.returncode for process in started]
    if first is None:
        first = next(((i, status) for i, status in enumerate(statuses) if status not in (0, signals.STOPPED)), None)
    if first is not None:
        raise RunError(
            f"worker {first[0]} of {workers} {_ended(first[1])} (see above), the first to fail; every answer so far is "
            "on disk, and the next start does what is missing"
        )
    if name := signals.received():
        raise StopRequested(f"stopped by {name}; every answer so far is on disk")


def _ended(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def environment(worker: int, workers: int) -> dict[str, str]:
    """A worker's variables: its GPU of those there are, and its share of the cores."""
    told = dict(os.environ)
    told.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    gpus = _gpus()
    if gpus:
        told["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]
    return told


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; torch, which would tell, takes seconds to import."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i in range(len(listed.stdout.splitlines()))]
