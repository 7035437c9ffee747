"""Success against compute: the best of 1, 2, 4 … answers drawn at random, or after 1, 2, 4 … steps of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from mirage_dist.evals import results
from mirage_dist.evals.results import AppliedAttack, Leaf
from mirage_dist.report.load import Run

KINDS = {"asr": "unsafe", "rr": "safe"}  # measure -> the kind of its headline set


class Point(TypedDict):
    """The probability that any of `answers` answers to a question counts: `draws` to each of its rewrites.

    steps: of a search whose stages were asked, how many it may have taken for the last of these answers.
    """

    answers: int
    draws: int
    steps: NotRequired[int]
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
    """Of every attack on the headline sets that draws answers, or of whose searches several stages were asked, in the
    order of the runs and of the suite.
    """
    made: list[Budget] = []
    for run in runs:
        for measure, kind in KINDS.items():
            own = run.headline_set(kind)
            for name, info in run.metrics["sets"][own]["attacks"].items() if own else ():
                attack = results.applied(name, info)
                leaves = [(c, leaf) for c in attack.conditions if (leaf := run.leaf(measure, c))]
                if not (attack.draws or len(attack.spent) > 1) or not leaves:
                    continue
                points = [_point(attack, condition.shots, leaf) for condition, leaf in leaves]
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


def _point(attack: AppliedAttack, shots: int, leaf: Leaf) -> Point:
    rate: Point = {"answers": shots, "draws": 1, "rate": leaf["rate"], "ci95": leaf["ci95"]}
    if attack.draws:
        return {**rate, "draws": shots // attack.rewrites}
    return {**rate, "steps": attack.spent[shots - 1]}


def budget_of(point: Point) -> int:
    """What a point had cost, as its figure counts it: steps of a search, or answers."""
    return point.get("steps", point["answers"])
