"""Running the points of a sweep on this machine, several at once, each in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mirage_dist import config as configs
from mirage_dist import disk, launching, signals
from mirage_dist.evals import pool as workers
from mirage_dist.liveness import Owner
from mirage_dist.progress import ON_STDERR, log
from mirage_dist.schema import ConfigError, EvalRecipe, RunError
from mirage_dist.signals import STOPPED, StopRequested
from mirage_dist.sweep import directory
from mirage_dist.sweep.points import Plan, Point, evaluation

POLL_SECONDS = 0.1
LOOK_AGAIN = 2.0  # seconds between two looks at a point at which another process is still at work
LOG_LINES = 5  # of a failed point's log, in this one


@dataclass(frozen=True)
class Step:
    """One command of a point. verb: of `mirage`; words: the rest of its command line. title: in the log."""

    verb: str
    words: tuple[str, ...]
    title: str


@dataclass
class _Active:
    """A point under way in one of the places for points."""

    point: Point
    steps: deque[Step]
    log: BinaryIO
    step: Step | None = None
    process: subprocess.Popen | None = None


@dataclass
class _Pool:
    plan: Plan
    jobs: int
    out: Path
    gpus: list[str]
    left: deque[Point] = field(default_factory=deque)
    places: dict[int, _Active] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    done: int = 0
    noted: set[str] = field(default_factory=set)  # points at which another process is at work
    look_at: float = 0.0


def steps(plan: Plan, point: Point) -> Iterator[Step]:
    """What is missing of a point, in order."""
    if point.recipe is not None and not directory.trained(point):
        yield Step("train", (point.recipe, *point.overrides), "train")
    for number, own in enumerate(plan.sweep.evaluate):
        if not directory.evaluated(plan, number, point):
            yield Step("eval", (own.recipe, *evaluation(plan.sweep, own, point)), f"eval {plan.suites[number]}")


def run(plan: Plan, jobs: int) -> None:
    """Train and evaluate what is missing, `jobs` points at once. A point that fails does not stop the others.

    Raises RunError in the end, naming the points that failed; at once when another `mirage sweep` is at work in the
    directory; ConfigError when the machine's GPUs are too few for so many points; and StopRequested after a signal,
    which is passed on, when every process has stopped in order.
    """
    gpus, ranks = workers.gpus(), plan.sweep.ranks
    if ranks <= len(gpus) < jobs * ranks:
        raise ConfigError(
            f"--jobs {jobs}: {jobs} points of {ranks} ranks need {jobs * ranks} GPUs, and this machine has "
            f"{len(gpus)}; at most --jobs {len(gpus) // ranks}"
        )
    directory.check(plan)
    out = Path(plan.sweep.out)
    out.mkdir(parents=True, exist_ok=True)
    with disk.alone(out, wait=False) as free:
        if not free:
            raise RunError(f"{out}: another `mirage sweep` runs points there; wait for its end, or stop it")
        directory.claim(plan)
        (out / "logs").mkdir(exist_ok=True)
        own = _Pool(plan, jobs, out, gpus if ranks <= len(gpus) else [])
        own.left.extend(plan.everything)
        try:
            _work(own)
        finally:
            _stop(own)
    if name := signals.received():
        kept = "what is done is kept, and the same command does the rest"
        raise StopRequested(f"sweep {plan.sweep.name}: stopped by {name}; {kept}")
    if own.failed:
        listed = "\n".join(f"  {name}: {why}" for name, why in own.failed.items())
        rest = "" if plan.places is None else f"\nmirage report --sweep {out} reports the settings that are complete"
        raise RunError(
            f"{len(own.failed)} of {len(plan.everything)} points failed, the others are done:\n{listed}{rest}"
        )


def _work(own: _Pool) -> None:
    while (own.left or own.places) and not signals.received():
        for place in range(own.jobs):
            if place not in own.places and own.left and time.monotonic() >= own.look_at:
                _begin(own, place, own.left.popleft())
        for place, active in list(own.places.items()):
            assert active.process is not None
            if active.process.poll() is not None:
                _next(own, place, active)
        time.sleep(POLL_SECONDS)


def _begin(own: _Pool, place: int, point: Point) -> None:
    """Start a point in a free place; count it where nothing is missing, and put it back while others are at work."""
    if (owner := _at_work(point)) is not None:
        if point.name not in own.noted:
            log.info(f"{point.name}: {owner} is still at work on it; waiting for it")
            own.noted.add(point.name)
        own.left.append(point)
        if all(name in own.noted for name in (p.name for p in own.left)):
            own.look_at = time.monotonic() + LOOK_AGAIN
        return
    missing = deque(steps(own.plan, point))
    if not missing:
        own.done += 1
        log.info(f"{_count(own)} {point.name}: done before")
        return
    directory.failure_file(own.out, point).unlink(missing_ok=True)
    handle = directory.log_file(own.out, point).open("ab")
    own.places[place] = active = _Active(point, missing, handle)
    _start(own, place, active)


def _start(own: _Pool, place: int, active: _Active) -> None:
    active.step = step = active.steps.popleft()
    described = f" ({active.point.description})" if active.point.description else ""
    log.info(f"{active.point.name}{described}: {step.title}")
    words, variables = command(step, own.plan.sweep.ranks, (place, own.jobs), own.gpus, _gpus_each(step))
    active.log.write(f"--- {step.title}\n".encode())
    active.log.flush()
    active.process = subprocess.Popen(words, env=variables, stdout=active.log, stderr=subprocess.STDOUT)


def _gpus_each(step: Step) -> int:
    """GPUs of a worker of an evaluation."""
    if step.verb != "eval":
        return 1
    return configs.load(step.words[0], step.words[1:], EvalRecipe).generation.tensor_parallel


def command(
    step: Step, ranks: int, place: tuple[int, int], gpus: Sequence[str], each: int = 1
) -> tuple[list[str], dict[str, str]]:
    """The command line of a step, and the variables that it starts with.

    place: (i, n): of the i-th of n points at once. gpus: the machine's, of which each place has `ranks`; none where
    they are too few for one training. each: of these, how many a worker of an evaluation has.
    """
    number, jobs = place
    own = gpus[number * ranks : (number + 1) * ranks]
    if step.verb == "train":
        variables = launching.environment(ranks)
        variables.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (ranks * jobs))))
        words = launching.command(ranks, step.words[0], step.words[1:])
    else:
        # Workers divide `own`, where there is one; a GPU of the machine that is left over is none of theirs.
        variables = workers.environment(number, jobs, 1 if own else each)
        words = [sys.executable, "-m", "mirage_dist.cli", "eval", *step.words]
        words += ["--workers", str(ranks // each)] if len(own) > 1 else []
    return words, variables | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {})


def _next(own: _Pool, place: int, active: _Active) -> None:
    """After a step: the next one, or the end of the point."""
    assert active.process is not None
    assert active.step is not None
    status = active.process.returncode
    if status == 0 and active.steps:
        _start(own, place, active)
        return
    active.log.close()
    del own.places[place]
    own.done += 1
    if status == 0 and (left := next(iter(steps(own.plan, active.point)), None)) is not None:
        missing = f"{active.step.title} ended with status 0, and {left.title} is still to be done"
        _fail(own, active.point, f"{missing}; see {directory.log_file(own.out, active.point)}")
    elif status == 0:
        log.info(f"{_count(own)} {active.point.name}: done")
    elif not signals.received():
        _fail(
            own, active.point, f"{active.step.title} {_ending(status)}; see {directory.log_file(own.out, active.point)}"
        )


def _fail(own: _Pool, point: Point, why: str) -> None:
    own.failed[point.name] = why
    disk.write(directory.failure_file(own.out, point), f"{why}\n")
    lines = directory.log_file(own.out, point).read_text(errors="replace").splitlines()[-LOG_LINES:]
    text = "\n".join(f"    {line}" for line in lines)
    log.error(f"{_count(own)} {point.name}: {why}\n{text}", extra=ON_STDERR)


def _stop(own: _Pool) -> None:
    """Ask what still runs to stop, and wait until all have ended: a checkpoint may have to be written."""
    for active in own.places.values():
        if active.process is not None:
            with suppress(OSError):
                active.process.terminate()
    for active in own.places.values():
        if active.process is not None:
            active.process.wait()
        active.log.close()


def _at_work(point: Point) -> Owner | None:
    """The process that trains in a point's directory, such as one that a killed sweep has left to stop by itself.

    None for one that this machine does not show: the training itself looks at its heartbeat.
    """
    owner = directory.owner(point)
    return owner if owner is not None and owner.alive() else None


def _ending(status: int) -> str:
    if status == STOPPED:
        return "was stopped from outside"
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _count(own: _Pool) -> str:
    return f"[{own.done}/{len(own.plan.everything)}]"
