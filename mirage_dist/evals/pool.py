"""`mirage eval CONFIG --workers N`: N workers on this machine, each a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from mirage_dist import signals
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.signals import StopRequested

POLL_SECONDS = 0.1


def run(config: str, overrides: Sequence[str], workers: int) -> None:
    """Start them and wait for all. A signal is passed on; when a worker fails, the others do its work.

    Raises StopRequested after a signal, ConfigError when a worker found its input bad, which ends them all, and else
    RunError; both name the first worker that failed.
    """
    command = [sys.executable, "-m", "mirage_dist.cli", "eval", config, *overrides]
    started = [
        subprocess.Popen([*command, "--worker", f"{i}/{workers}"], env=environment(i, workers)) for i in range(workers)
    ]
    try:
        first = _wait(started)
    finally:
        for process in started:
            process.kill()  # does nothing to one that has ended
    if first is not None:
        failed = ConfigError if started[first].returncode == ConfigError.status else RunError
        raise failed(
            f"worker {first} of {workers} {_ended(started[first].returncode)} (see above), the first to fail; every "
            "answer so far is on disk, and the next start does what is missing"
        )
    if name := signals.received():
        raise StopRequested(f"stopped by {name}; every answer so far is on disk")


def _wait(started: Sequence[subprocess.Popen]) -> int | None:
    """The number of the worker that failed first, when all have ended."""
    well, first, asked = {0, signals.STOPPED}, None, False
    while True:
        running = any(process.poll() is None for process in started)
        failed = [i for i, process in enumerate(started) if process.returncode not in (None, *well)]
        if failed and first is None:
            first = failed[0]
            if running:
                told = _ended(started[first].returncode)
                print(f"worker {first} of {len(started)} {told}; the others go on", file=sys.stderr, flush=True)
        if not running:
            return first
        bad_input = first is not None and started[first].returncode == ConfigError.status
        if not asked and (signals.received() or bad_input):
            asked = True
            well.add(-signal.SIGTERM)  # one that had not even got so far as to take signals
            for process in started:
                process.terminate()
        time.sleep(POLL_SECONDS)


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
