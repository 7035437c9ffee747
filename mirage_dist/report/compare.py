"""Paired tests between every two runs of a report, on the questions that both were evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from mirage_dist import stats
from mirage_dist.evals.results import CLEAN, Condition
from mirage_dist.report.load import COUNTED, Run


class Comparison(stats.Paired):
    """Two runs on one measure under one condition: `before` counts the first run, `after` the second.

    runs: their names. condition: its key in metrics.json. p_holm: `p` corrected for all comparisons of the report.
    """

    runs: list[str]
    measure: str
    condition: str
    p_holm: float


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
