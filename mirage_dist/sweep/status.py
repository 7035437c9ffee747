"""`mirage sweep CONFIG --status`: how far each point is, from its files alone, on any machine that sees them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mirage_dist import state
from mirage_dist.liveness import Owner
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.sweep import directory
from mirage_dist.sweep.points import Plan, Point

TAIL = 1 << 16  # bytes of metrics.jsonl in which its last whole record is looked for


def text(plan: Plan) -> str:
    """A line for each point, and how many are done. Raises ConfigError for a directory of another sweep."""
    directory.check(plan)
    rows = [(point.name, point.description, _state(plan, point)) for point in plan.everything]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {values:<{widths[1]}}  {how}".rstrip() for name, values, how in rows]
    counts = Counter(how.partition(",")[0].partition(":")[0] for *_, how in rows)
    done = counts.pop("done", 0)
    rest = "".join(f", {count} {how}" for how, count in counts.items())
    lines.append(f"{done} of {len(rows)} points are done{rest}")
    return "\n".join([*lines, *_others(plan)])


def _state(plan: Plan, point: Point) -> str:
    """What is there of a point, in words: the first of them says how far it is."""
    missing = [suite for n, suite in enumerate(plan.suites) if not directory.evaluated(plan, n, point)]
    if directory.trained(point) and not missing:
        return "done"
    failure, owner = _failure(plan, point), directory.owner(point)
    if failure and not (owner and owner.alive()):  # it may be tried again, by a job that does not know of the failure
        return f"failed: {failure}"
    if not point.run.exists():
        return "not begun"
    if not directory.trained(point):
        step = _last_step(point.run)
        return f"training{'' if step is None else f', step {step}'}{_named(owner)}"
    return f"{'evaluating' if point.recipe is None else 'trained'}, without {', '.join(missing)}"


def _failure(plan: Plan, point: Point) -> str | None:
    try:
        return directory.failure_file(Path(plan.sweep.out), point).read_text(errors="replace").strip()
    except OSError:
        return None


def _named(owner: Owner | None) -> str:
    return ", stopped" if owner is None or owner.alive() is False else f", by {owner}"


def _last_step(run: Path) -> int | None:
    """The step of the last whole record of metrics.jsonl."""
    file = run / "metrics.jsonl"
    try:
        start = max(0, file.stat().st_size - TAIL)
        records = [line for _, line in state.lines(file, start)]
    except (OSError, RunError):
        return None
    for line in reversed(records):
        try:
            return int(state.parse("metrics", line, file)["step"])
        except (ConfigError, RunError, KeyError, ValueError):
            continue
    return None


def _others(plan: Plan) -> list[str]:
    """A line on points in the directory that the sweep, as its recipe is now, does not have."""
    own = {point.name for point in plan.everything}
    folder = Path(plan.sweep.out) / "points"
    others = sorted(f.name for f in folder.iterdir() if f.name not in own) if folder.is_dir() else []
    if not others:
        return []
    return [f"{len(others)} more in {folder}, of an earlier version of this sweep: {', '.join(others[:3])}"]
