"""What a run is doing, as its directory shows it, and the moments at which it is killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PHASES = ("set-up", "caching", "between", "in save", "in commit", "in retention", "in export")
# What a kill is aimed at, by the first thing that shows it.
TARGETS = ("save", "shards", "manifest", "renamed", "retention")
POLL = 0.0002  # seconds


@dataclass(frozen=True)
class Now:
    """One look into a run directory. Steps are those in the names; None for none."""

    saving: int | None  # step-*.tmp in the workspace
    shards: int  # files in it
    manifest: bool  # it has one
    newest: int | None  # the newest committed checkpoint
    committed: int  # how many there are
    latest: int | None  # what `latest` names
    gone: bool  # step-*.gone
    export: bool  # export.*.tmp
    cache: bool  # the reference cache's folder
    metrics: int | None  # metrics.jsonl: which file; a start puts a new one in place when set-up is over


def look(run: Path) -> Now:
    """Read the directory; what is renamed meanwhile may be seen at both ends or at none."""
    inside = [name for folder in run.glob("work-*") for name in _names(folder)]
    saving = max((s for name in inside if name.endswith(".tmp") and (s := _step(name))), default=None)
    parts = [n for folder in run.glob(f"work-*/step-{saving:06d}.tmp") for n in _names(folder)] if saving else []
    steps = [s for name in _names(run / "checkpoints") if (s := _step(name))]
    try:
        latest = _step((run / "checkpoints/latest").read_text())
    except OSError:
        latest = None
    try:
        metrics = (run / "metrics.jsonl").stat().st_ino
    except OSError:
        metrics = None
    return Now(
        saving=saving,
        shards=sum(name.startswith("rank-") for name in parts),
        manifest="manifest.json" in parts,
        newest=max(steps, default=None),
        committed=len(steps),
        latest=latest,
        gone=any(name.endswith(".gone") for name in inside),
        export=any(name.startswith("export.") for name in inside),
        cache=(run / "reference").is_dir(),
        metrics=metrics,
    )


def phase(now: Now, before: Now, keep: int, last_step: int) -> str:
    """The name of what a run is doing. before: the directory at this start's begin."""
    if now.manifest or (now.newest is not None and now.newest != now.latest):
        return "in commit"
    if now.gone or now.committed > keep:
        return "in retention"
    if now.saving is not None:
        return "in save"
    if now.export or now.newest == last_step:
        return "in export"
    if now.metrics == before.metrics:
        return "caching" if now.cache and not before.cache else "set-up"
    return "between"


@dataclass(frozen=True)
class Moment:
    """When to kill: `after` seconds into the run, or `after` seconds behind the sight of `target` at `step`."""

    after: float
    target: str | None = None
    step: int = 0

    def __str__(self) -> str:
        return (
            f"{self.target} of step {self.step} + {self.after * 1e3:.1f} ms" if self.target else f"{self.after:.2f} s"
        )

    def wait(self, run: Path, alive: Callable[[], bool], deadline: float) -> None:
        """Return at the moment, at the run's end, or (TimeoutError) at the deadline."""
        begin, seen = time.monotonic(), self.target is None
        while alive():
            now = time.monotonic()
            if now > deadline:
                raise TimeoutError(f"{run}: still running, and no {self} yet")
            if not seen and _sighted(self.target, self.step, look(run)):
                begin, seen = now, True
            if seen and now - begin >= self.after:
                return
            time.sleep(POLL)


def draw(rng: random.Random, aimed: bool, life: float, save_every: int, last_step: int, keep: int) -> Moment:
    """A moment uniform over `life` seconds, or one inside a save, its commit or its retention."""
    if not aimed:
        return Moment(rng.uniform(0, life))
    target = rng.choice(TARGETS)
    # Retention takes the first one away when there is one more than it keeps.
    first = save_every * (keep + 1 if target == "retention" else 1)
    # Half of them at the very sight, half a little later: a commit takes milliseconds.
    return Moment(rng.choice((0.0, rng.uniform(0, 0.005))), target, rng.randrange(first, last_step + 1, save_every))


def _sighted(target: str | None, step: int, now: Now) -> bool:
    """Whether the target shows, at `step` or, where it was too short to be seen, at a later one."""
    saving = (now.saving or 0) >= step
    return {
        "save": saving,
        "shards": saving and now.shards > 0,
        "manifest": saving and now.manifest,
        "renamed": (now.newest or 0) >= step and now.newest != now.latest,
        "retention": (now.newest or 0) >= step and now.gone,
    }[target or ""]


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _step(name: str) -> int | None:
    digits = name.removeprefix("step-").split(".")[0]
    return int(digits) if name.startswith("step-") and digits.isdigit() else None
