"""Runs that differ in nothing but their seed, as one method: the mean of each rate over seeds and its spread.

Seeds of one method answer the same questions, so their counts are never added up as if they were questions of their
own: a method's rate is the mean of its runs' rates, shown with the lowest and the highest of them and with Student's
interval of the mean over seeds. That interval says how much another seed may change the rate on these questions; each
run's own interval says how much other questions may change it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TypedDict

from mirage_dist import config as configs
from mirage_dist import runs as directories
from mirage_dist import stats
from mirage_dist.evals import manifest, results
from mirage_dist.report.load import Run

NOT_THE_METHOD = ("run", "monitor", "seed")


class Spread(TypedDict):
    """One rate over seeds: the mean, the lowest and the highest, Student's 95 % interval of the mean within 0 to 1.

    rates: in the order of the method's runs.
    """

    mean: float
    lowest: float
    highest: float
    ci95: list[float]
    rates: list[float]


class Method(TypedDict):
    """Runs of one recipe with different seeds, of which there are at least two.

    rates: measure -> condition -> spread, of the rates that all of them have.
    """

    runs: list[str]
    seeds: list[int]
    rates: dict[str, dict[str, Spread]]


def methods(runs: Sequence[Run]) -> dict[str, Method]:
    """Name -> method, of runs whose recipes are equal but for `run`, `monitor` and different seeds.

    Their evaluations have one recipe and one headline judge with one set of rules, and measured the same state of each
    run, such as its export. A run that no other is a seed of is in no method.
    """
    groups: dict[tuple[str, ...], list[tuple[int, Run]]] = {}
    for run in runs:
        if not (run.dir / "config.yaml").is_file():
            continue
        recipe = directories.recipe(run.dir)
        key = configs.config_hash(recipe, NOT_THE_METHOD), *_measured(run)
        groups.setdefault(key, []).append((recipe.seed, run))
    named: dict[str, Method] = {}
    for members in groups.values():
        seeds = [seed for seed, _ in members]
        if len(members) < 2 or len(set(seeds)) < len(seeds):  # the same training twice is no second seed
            continue
        own = [run for _, run in members]
        named[_name(own, [*named, *(run.name for run in runs)])] = {
            "runs": [run.name for run in own],
            "seeds": seeds,
            "rates": _rates(own),
        }
    return named


def _measured(run: Run) -> tuple[str, ...]:
    """What rates over seeds must have in common: questions, draws, judge and its rules, and which state of the run."""
    drawn = any(
        results.applied(name, info).draws
        for own in run.metrics["sets"].values()
        for name, info in own["attacks"].items()
    )
    seed = str(run.metrics["seed"]) if drawn else ""
    return run.metrics["recipe_hash"], run.judge, *sorted(run.rules(run.judge)), seed, _state(run)


def _state(run: Run) -> str:
    """The checkpoint or model that was measured, in the same words for every seed."""
    if not (run.folder / "manifest.json").is_file():
        return ""
    model = manifest.read(run.folder).get("model", {})
    if model.get("url"):  # nothing shows that two such runs are seeds of one recipe
        return f"{model['url']} {model['model']} {run.name}"
    if model.get("run"):
        return f"step {model['step']}" if model.get("step") is not None else "the newest checkpoint"
    path = os.path.realpath(str(model.get("path")))
    return "its export" if path == os.path.realpath(run.dir / "export") else path


def _name(members: Sequence[Run], taken: Sequence[str]) -> str:
    """What the runs' names have in common, without a seed's beginning; else the first run's, marked."""
    letters = takewhile(lambda own: len(set(own)) == 1, zip(*(run.name for run in members), strict=False))
    common = "".join(own[0] for own in letters)
    name = re.sub(r"(?:[-_.]+(?:seed|s)?[-_.=]*\d*|\d+)$", "", common) or f"{members[0].name}, seeds"
    return name if name not in taken else f"{name}, {len(members)} seeds from {members[0].name}"


def _rates(members: Sequence[Run]) -> dict[str, dict[str, Spread]]:
    made: dict[str, dict[str, Spread]] = {}
    for measure in members[0].entry:
        for condition in members[0].rates(measure):
            leaves = [run.rates(measure).get(condition) for run in members]
            rates = [leaf["rate"] for leaf in leaves if leaf is not None]
            if len(rates) == len(members):  # otherwise it would be the mean over some of the seeds
                made.setdefault(measure, {})[condition] = spread(rates)
    return made


def spread(rates: Sequence[float]) -> Spread:
    """Of at least two rates."""
    middle, low, high = stats.mean(rates)
    return {
        "mean": middle,
        "lowest": min(rates),
        "highest": max(rates),
        "ci95": [max(0.0, low), min(1.0, high)],
        "rates": list(rates),
    }


def folded(models: Sequence[str], methods: Mapping[str, Method]) -> list[str]:
    """Columns of a table: each method in the place of its first run, and the runs that are in none."""
    of = {run: name for name, method in methods.items() for run in method["runs"]}
    return list(dict.fromkeys(of.get(model, model) for model in models))
