"""Paired tests on the same questions: between every two runs of a report, and of every defence beside none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TypedDict

from mirage_dist import stats
from mirage_dist.evals import results
from mirage_dist.evals.results import CLEAN, Condition, DefenceInfo, Leaf
from mirage_dist.report.load import COUNTED, Run

BOTH = ("asr", "rr")  # what a defence is to lower, and what it may raise


class Comparison(stats.Paired):
    """Two runs on one measure under one condition: `before` counts the first run, `after` the second.

    runs: their names. condition: its key in metrics.json. p_holm: `p` corrected for all comparisons of the report.
    """

    runs: list[str]
    measure: str
    condition: str
    p_holm: float


def recipes_differ(runs: Sequence[Run]) -> list[str]:
    """What the hashes of the evaluation recipes say against a comparison, in sentences.

    Models on this machine and endpoints have different hashes of one recipe, in which the former's way with pictures
    stands.
    """
    remote = [run.name for run in runs if "endpoint" in run.metrics]
    hashes = {(run.metrics["recipe_hash"], run.name in remote) for run in runs}
    if len(hashes) > len({is_remote for _, is_remote in hashes}):
        return ["The evaluation recipes differ between these runs: their rates may not be comparable."]
    if len(hashes) > 1:
        return [
            f"{', '.join(remote)}: an endpoint applies its own chat template and prepares pictures itself, and its "
            "recipe is not compared with those of the other runs here."
        ]
    return []


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """McNemar's test and the difference of the rates (see `stats.paired`) for every two runs.

    Covers each measure of `COUNTED`, clean and under the first attack with all of its rewrites. Leaves out runs with
    different headline judges and conditions that one of the two did not measure.
    """
    pairs: list[tuple[list[str], str, Condition, stats.Paired]] = []
    for measure in COUNTED:
        for condition in _conditions(runs, measure):
            # Of locality, metrics.json has the clean rate only; the rows have every condition.
            rated = CLEAN if measure == "locality" else condition
            able = [run for run in runs if run.leaf(measure, rated)]
            outcomes = {run.name: run.headline_outcomes(measure, condition) for run in able}
            for a, b in combinations(able, 2):
                paired = stats.paired(outcomes[a.name], outcomes[b.name]) if a.judge == b.judge else None
                if paired:
                    pairs.append(([a.name, b.name], measure, condition, paired))
    corrected = stats.holm([paired["p"] for *_, paired in pairs])
    return [
        {"runs": names, "measure": measure, "condition": str(condition), **paired, "p_holm": p}
        for (names, measure, condition, paired), p in zip(pairs, corrected, strict=True)
    ]


def _conditions(runs: Sequence[Run], measure: str) -> list[Condition]:
    """Clean, and under the first attack with all of its rewrites."""
    kind = COUNTED[measure][0]
    return list(dict.fromkeys(c for run in runs for c in (CLEAN, run.attacked(kind)) if c))


class Effect(TypedDict):
    """A rate under a defence beside the same rate without one. condition: its key in metrics.json.

    rate, undefended: the two rates. paired: of the questions that have both, `before` without the defence and `after`
    with it. p_holm: the test's p, corrected for all tests of all defences.
    """

    measure: str
    condition: str
    undefended: Leaf
    rate: Leaf
    paired: stats.Paired
    p_holm: float


class Defended(TypedDict):
    """What one defence does to one model. model: its name in the report."""

    model: str
    defence: DefenceInfo
    effects: list[Effect]


def defended(runs: Sequence[Run]) -> list[Defended]:
    """The effect of each defence on each run, under the headline judge (see `Run.arms`)."""
    made: list[Defended] = [
        {"model": run.name, "defence": info, "effects": _effects(run, arm)}
        for run in runs
        for arm in run.arms
        if (info := arm.metrics.get("defence"))
    ]
    corrected = iter(stats.holm([effect["paired"]["p"] for own in made for effect in own["effects"]]))
    for own in made:
        for effect in own["effects"]:
            effect["p_holm"] = next(corrected)
    return made


def _effects(run: Run, arm: Run) -> list[Effect]:
    effects: list[Effect] = []
    for measure in BOTH:
        for condition in _every_condition(run, measure):
            undefended, rate = run.leaf(measure, condition), arm.leaf(measure, condition)
            before, after = (own.headline_outcomes(measure, condition) for own in (run, arm))
            if undefended and rate and (paired := stats.paired(before, after)):
                own: Effect = {
                    "measure": measure,
                    "condition": str(condition),
                    "undefended": undefended,
                    "rate": rate,
                    "paired": paired,
                    "p_holm": paired["p"],
                }
                effects.append(own)
    return effects


def _every_condition(run: Run, measure: str) -> list[Condition]:
    """Clean, and under every attack but controls with all of its rewrites."""
    own = run.headline_set(COUNTED[measure][0])
    applied = run.metrics["sets"][own]["attacks"] if own else {}
    attacks = (results.applied(name, info) for name, info in applied.items())
    return [CLEAN, *(attack.full for attack in attacks if not attack.control)]
