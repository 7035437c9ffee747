"""Do judges agree? Cohen's κ for each two of them, precision and recall against exact labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from sys import intern
from typing import Any

from mirage_dist import stats
from mirage_dist.evals.judges.base import Judge, Row
from mirage_dist.evals.metrics import UNJUDGED, Leaf, Verdict, grouped_leaf

# Where each class is compared: harm and irrelevance are measured on unsafe questions only.
COMPARED: dict[Verdict, tuple[str, ...]] = {
    "refused": ("unsafe", "safe", "locality", "utility"),
    "harmful": ("unsafe",),
    "irrelevant": ("unsafe",),
}
LABELS = "world"  # the kind of judge whose verdicts are the truth
Verdicts = Sequence[Verdict]


def compare(panel: Sequence[Judge], rows: Sequence[Row], said: Mapping[str, Verdicts]) -> dict[str, Any]:
    """{"pairs": […], "against_labels": […]}; an entry for each two judges and each class that both can give.

    Pair: {"judges": [a, b], "verdict", "kappa", "agreed": leaf, "unjudged": answers that one of them did not judge}.
    Against labels: {"judge", "labels", "verdict", "precision": leaf, "recall": leaf, "unjudged"}. κ is None where
    chance alone gives full agreement. said: judge -> a verdict for each row.
    """
    pairs, labelled = [], []
    if len(panel) < 2:
        return {"pairs": pairs, "against_labels": labelled}
    places = [(intern(row["kind"]), (intern(row["set"]), intern(row["id"]))) for row in rows]  # they may lie on disk
    for a, b in combinations(panel, 2):
        for verdict, kinds in COMPARED.items():
            if verdict not in a.verdicts & b.verdicts:
                continue
            own = [i for i, (kind, _) in enumerate(places) if kind in kinds]
            both = [i for i in own if UNJUDGED.isdisjoint((said[a.name][i], said[b.name][i]))]
            found = [(said[a.name][i] == verdict, said[b.name][i] == verdict) for i in both]
            questions = [places[i][1] for i in both]
            told = {"verdict": verdict, "unjudged": len(own) - len(both)}
            agreed = grouped_leaf([x == y for x, y in found], questions)
            pairs.append({"judges": [a.name, b.name], **told, "kappa": stats.kappa(found), "agreed": agreed})
            if (a.kind == LABELS) != (b.kind == LABELS):
                judge, labels = (b, a) if a.kind == LABELS else (a, b)
                turned = [(y, x) for x, y in found] if a.kind == LABELS else found
                labelled.append({"judge": judge.name, "labels": labels.name, **told, **_rates(turned, questions)})
    return {"pairs": pairs, "against_labels": labelled}


def _rates(found: Sequence[tuple[bool, bool]], questions: Sequence[Any]) -> dict[str, Leaf | None]:
    """Precision and recall of (judge's, label's) for one class."""
    called = [(true, q) for (says, true), q in zip(found, questions, strict=True) if says]
    right = [(says, q) for (says, true), q in zip(found, questions, strict=True) if true]
    return {
        "precision": grouped_leaf([true for true, _ in called], [q for _, q in called]),
        "recall": grouped_leaf([says for says, _ in right], [q for _, q in right]),
    }
