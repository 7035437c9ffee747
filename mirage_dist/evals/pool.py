"""`mirage eval CONFIG --workers N`: N workers on this machine, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from mirage_dist import liveness, signals
from mirage_dist.config import REPOSITORY
from mirage_dist.launching import Relay
from mirage_dist.progress import ON_STDERR, log
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.signals import StopRequested

POLL_SECONDS = 0.1


def run(
    config: str, overrides: Sequence[str], workers: int, each: int = 1, log: Callable[[str], None] | None = None
) -> None:
    """Start N workers and wait until all have ended. Passes a signal on; when a worker fails, the others go on.

    each: GPUs of a worker. log: takes each line that a worker prints; None: they print where this process does.
    Raises StopRequested after a signal to this process or to a worker. Raises ConfigError when the GPUs are too few, or
    a worker reports bad input, which ends all of them, and RunError when a worker failed otherwise; both name the first
    worker that failed, or with `log` its fault.
    """
    command = [sys.executable, "-m", "mirage_dist.cli", "eval", config, *overrides]
    places = [environment(i, workers, each) for i in range(workers)]
    relays = [Relay([*command, "--worker", f"{i}/{workers}"], place, log) for i, place in enumerate(places)]
    started = [relay.process for relay in relays]
    try:
        first = _wait(relays)
    finally:
        for process in started:
            process.kill()  # does nothing to one that has ended
        for relay in relays:
            relay.take()
    if first is not None:
        failed = ConfigError if started[first].returncode == ConfigError.status else RunError
        raise failed(
            relays[first].fault(
                f"worker {first} of {workers} {_ending(started[first].returncode)} (see above), the first to fail; "
                "every answer so far is on disk, and the next start does what is missing"
            )
        )
    if name := signals.received():
        raise StopRequested(f"stopped by {name}; every answer so far is on disk")
    if stopped := [i for i, process in enumerate(started) if process.returncode == signals.STOPPED]:
        raise StopRequested(
            f"{len(stopped)} of {workers} workers stopped on request, the first of them worker {stopped[0]}; every "
            "answer so far is on disk, and the next start does what is missing"
        )


def _wait(relays: Sequence[Relay]) -> int | None:
    """Wait until all have ended; returns the number of the worker that failed first."""
    started, well, first, terminated = [relay.process for relay in relays], {0, signals.STOPPED}, None, False
    while True:
        for relay in relays:
            relay.take()
        running = any(process.poll() is None for process in started)
        failed = [i for i, process in enumerate(started) if process.returncode not in (None, *well)]
        if failed and first is None:
            first = failed[0]
            if running:
                ending = _ending(started[first].returncode)
                log.error(f"worker {first} of {len(started)} {ending}; the others go on", extra=ON_STDERR)
        if not running:
            return first
        bad_input = first is not None and started[first].returncode == ConfigError.status
        if not terminated and (signals.received() or bad_input):
            terminated = True
            well.add(-signal.SIGTERM)  # of a worker that had not yet installed its signal handlers
            for process in started:
                process.terminate()
        time.sleep(POLL_SECONDS)


def _ending(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def environment(worker: int, workers: int, each: int = 1) -> dict[str, str]:
    """A worker's environment variables, with its share of the machine's GPUs and cores.

    each: GPUs of a worker. Raises ConfigError as `check_gpus`.
    """
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The code of this process, also from inside another checkout, which `python -m` would prefer.
    variables = {**os.environ, **liveness.child_environment()}
    variables.update(PYTHONSAFEPATH="1", PYTHONPATH=os.pathsep.join(paths))
    variables.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    if own := gpus():
        check_gpus(each, len(own), workers)
        first = worker * each % len(own)
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(own[first : first + each])
    return variables


def check_gpus(each: int, visible: int, workers: int = 1) -> None:
    """Raise ConfigError when `visible` GPUs cannot be shared out among workers of `each` GPUs: too few, or some left.

    Workers of one GPU may share it; an engine on several takes their memory for itself.
    """
    if each == 1:
        return
    key = f"generation.tensor_parallel={each}"
    if visible < each:
        raise ConfigError(
            f"{key}: a worker needs {each} GPUs of one machine, and this process sees {visible}; lower it, or give "
            f"each worker that many: on Slurm, --gres=gpu:{each} --ntasks-per-node=1, or a multiple of both"
        )
    if visible % each:
        raise ConfigError(
            f"{key}: this process sees {visible} GPUs, of which {visible % each} would be left over; choose a divisor, "
            f"or show it {visible // each * each} of them by CUDA_VISIBLE_DEVICES"
        )
    if workers * each > visible:
        raise ConfigError(
            f"{key}: {workers} workers need {workers * each} GPUs, and this machine shows {visible}; at most "
            f"--workers {visible // each}"
        )


def gpus() -> list[str]:
    """Names as in CUDA_VISIBLE_DEVICES. Without torch, whose import takes seconds."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i in range(len(listed.stdout.splitlines()))]
