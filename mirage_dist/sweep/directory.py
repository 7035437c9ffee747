"""The directory of a sweep: to which sweep it belongs, and what of each point is there.

sweep.json         the sweep's name, points, suites and frontier, as the last start had them; sealed (see `state`)
points/NAME/       the run directory of each point, with its evaluations
logs/NAME.log      what training and evaluation of a point wrote (`mirage sweep --jobs`); NAME.failed: how they ended
slurm/             the commands of a job array (`mirage sweep --slurm`)
report/            the report, with frontier.json and frontier.csv
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from mirage_dist import config as configs
from mirage_dist import disk, liveness, state
from mirage_dist.evals.sharing.files import DEFENCES
from mirage_dist.liveness import Owner
from mirage_dist.report import load
from mirage_dist.schema import ConfigError, EvalRecipe, RunError
from mirage_dist.sweep.points import Plan, Point, evaluation

FILE = "sweep.json"
REMEDY = "Move it away and start `mirage sweep` again: it writes it anew; the points are as they were"


class PointRecord(TypedDict):
    """One point. values: of the swept keys."""

    name: str
    method: str
    setting: str
    values: dict[str, Any]
    seed: int


class SweepRecord(TypedDict):
    """sweep.json. base: the name of the base model's point, if it is evaluated. frontier: `forget` and `retain`
    (see `measures.Place`), `margin` and `level` (see `FrontierConfig`).
    """

    name: str
    seeds: list[int]
    suites: list[str]
    points: list[PointRecord]
    base: str | None
    frontier: dict[str, Any] | None


def record(plan: Plan) -> SweepRecord:
    sweep = plan.sweep
    points: list[PointRecord] = [
        {"name": p.name, "method": p.method, "setting": p.setting, "values": dict(p.values), "seed": cast(int, p.seed)}
        for p in plan.points
    ]
    return {
        "name": sweep.name,
        "seeds": sweep.seeds,
        "suites": plan.suites,
        "points": points,
        "base": plan.base and plan.base.name,
        "frontier": None
        if sweep.frontier is None or plan.places is None
        else {
            **{name: asdict(place) for name, place in zip(("forget", "retain"), plan.places, strict=True)},
            "margin": sweep.frontier.margin,
            "level": sweep.frontier.level,
        },
    }


def read(out: Path) -> SweepRecord:
    """sweep.json. Raises ConfigError where there is none, and RunError for a damaged one."""
    try:
        return cast(SweepRecord, state.read("sweep", out / FILE, REMEDY))
    except FileNotFoundError:
        raise ConfigError(f"{out}: no {FILE}; name the `out` of a sweep that `mirage sweep` has begun") from None


def check(plan: Plan) -> None:
    """Raise ConfigError for a directory of another sweep, or of something else."""
    out = Path(plan.sweep.out)
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ConfigError(f"out={out}: exists and is no folder; choose another `out`")
    if not os.path.lexists(out / FILE):
        if any(out.iterdir()):
            raise ConfigError(f"out={out}: holds files, and no sweep wrote them; choose another `out`")
        return
    if (name := read(out)["name"]) != plan.sweep.name:
        raise ConfigError(
            f"out={out}: holds the sweep {name!r}, and this one is named {plan.sweep.name!r}; choose another `out`, or "
            "give this one that name to go on with it"
        )


def claim(plan: Plan) -> Path:
    """`check` the directory, and write sweep.json with today's points; returns the directory."""
    check(plan)
    out = Path(plan.sweep.out)
    disk.write(out / FILE, state.sealed("sweep", cast(Mapping[str, Any], record(plan)), indent=1))
    return out


# ------------------------------------------------------------------------------------------------ what is there


def trained(point: Point) -> bool:
    """Whether a point's training has come to its end; the base model needs none. An export appears whole or not."""
    return point.recipe is None or (point.run / "export").is_dir()


def evaluated(plan: Plan, number: int, point: Point) -> bool:
    """Whether the rates of evaluation `number` of the sweep are there, computed by today's recipe."""
    own = plan.sweep.evaluate[number]
    suite = point.run / "evals" / plan.suites[number]
    if not (suite / "metrics.json").is_file():
        return False
    recipe = configs.load(own.recipe, evaluation(plan.sweep, own, point), EvalRecipe)
    if not all((suite / DEFENCES / name / "metrics.json").is_file() for name in recipe.defences):
        return False
    try:
        there = configs.load(suite / "config.yaml", [], EvalRecipe)
        if recipe.template.image_aspect == "auto":  # which the evaluation has resolved
            aspect = there.template.image_aspect
            recipe = replace(recipe, template=replace(recipe.template, image_aspect=aspect))
        if configs.config_hash(recipe) != configs.config_hash(there):
            return False
        (run,) = load.read({point.name: point.run}, plan.suites[number])
        return not (run.problems or run.arm_problems)
    except (FileNotFoundError, ConfigError, RunError):
        return False  # the evaluation itself says what is wrong with it, and mends it where it can


def owner(point: Point) -> Owner | None:
    """The process that trains in a point's directory, or did so last; it may have ended."""
    record = liveness.read(point.run / "owner.json")
    return None if record is None else Owner.from_record(record)


def log_file(out: Path, point: Point) -> Path:
    return out / "logs" / f"{point.name}.log"


def failure_file(out: Path, point: Point) -> Path:
    """Holds one sentence from a point's failure to its next start."""
    return out / "logs" / f"{point.name}.failed"
