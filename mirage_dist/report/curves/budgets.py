"""Success against compute: the best of 1, 2, 4 … answers drawn at random, of every attack that draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from mirage_dist.evals import results
from mirage_dist.report.load import Run

KINDS = {"asr": "unsafe", "rr": "safe"}  # measure -> the kind of its headline set


class Point(TypedDict):
    """The probability that any of `answers` answers to a question counts: `draws` to each of its rewrites."""

    answers: int
    draws: int
    rate: float
    ci95: list[float]


class Budget(TypedDict):
    """One attack on one model, by its headline judge. n: questions. points: by ascending number of answers."""

    model: str
    measure: str
    attack: str
    control: bool
    n: int
    points: list[Point]


def budgets(runs: Sequence[Run]) -> list[Budget]:
    """Of every attack that draws answers on the headline sets, in the order of the runs and of the suite."""
    made: list[Budget] = []
    for run in runs:
        for measure, kind in KINDS.items():
            own = run.headline_set(kind)
            for name, info in run.metrics["sets"][own]["attacks"].items() if own else ():
                attack = results.applied(name, info)
                leaves = [(c, leaf) for c in attack.conditions if (leaf := run.leaf(measure, c))]
                if not attack.draws or not leaves:
                    continue
                points: list[Point] = [
                    {
                        "answers": condition.shots,
                        "draws": condition.shots // attack.rewrites,
                        "rate": leaf["rate"],
                        "ci95": leaf["ci95"],
                    }
                    for condition, leaf in leaves
                ]
                made.append(
                    {
                        "model": run.name,
                        "measure": measure,
                        "attack": name,
                        "control": attack.control,
                        "n": leaves[-1][1]["n"],
                        "points": points,
                    }
                )
    return made
