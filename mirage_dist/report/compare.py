"""Two models, the same questions: paired tests between every two runs of a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from mirage_dist import stats
from mirage_dist.report.load import COUNTED, Run

Comparison = dict[str, Any]


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """McNemar's test and the difference of the rates (see `stats.paired`) for every two runs.

    {"runs": [a, b], "measure", "condition", "n", "before" (a's count), "after" (b's), "only_before", "only_after",
    "unpaired", "difference" (b − a), "ci95", "p", "p_holm"}. p_holm is Holm's correction over all of the report's
    comparisons. Runs with different headline judges are not compared, nor what one of them did not measure.
    """
    found: list[Comparison] = []
    for measure in COUNTED:
        for condition in _conditions(runs, measure):
            able = [run for run in runs if run.leaf(measure, condition)]
            told = {run.name: run.headline_outcomes(measure, condition) for run in able}
            for a, b in combinations(able, 2):
                pair = stats.paired(told[a.name], told[b.name]) if a.judge == b.judge else None
                if pair:
                    found.append({"runs": [a.name, b.name], "measure": measure, "condition": condition, **pair})
    corrected = stats.holm([pair["p"] for pair in found])
    return [{**pair, "p_holm": p} for pair, p in zip(found, corrected, strict=True)]


def _conditions(runs: Sequence[Run], measure: str) -> list[str]:
    """As asked, and under the first attack with all of its shots."""
    kind = COUNTED[measure][0]
    return list(dict.fromkeys(c for run in runs for c in ("clean", run.attacked(kind)) if c))
