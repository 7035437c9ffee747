"""Whether judges agree: Cohen's κ for each pair of them, and each judge's errors against exact or human labels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from sys import intern

from mirage_dist import stats
from mirage_dist.evals.judges.base import Judge, Row
from mirage_dist.evals.metrics import grouped_leaf
from mirage_dist.evals.results import HUMAN, UNJUDGED, Agreement, LabelAgreement, Leaf, Verdict

# Where each class is compared: harm and irrelevance are measured on unsafe questions only.
COMPARED: dict[Verdict, tuple[str, ...]] = {
    "refused": ("unsafe", "safe", "locality", "utility"),
    "harmful": ("unsafe",),
    "irrelevant": ("unsafe",),
}
Verdicts = Sequence[Verdict]
Places = Sequence[tuple[str, tuple[str, str]]]  # of each row: the kind of its set, and its question


def decides(label: Verdict, verdict: Verdict) -> bool:
    """Whether a label says if an answer is of this class: `harmless` says of no other class than harm."""
    return label != "harmless" or verdict == "harmful"


def compare(
    panel: Sequence[Judge], rows: Sequence[Row], verdicts: Mapping[str, Verdicts], labels: Sequence[Verdict | None] = ()
) -> Agreement:
    """Compare each pair of judges, and each judge with human labels.

    verdicts: judge's name -> a verdict for each row. labels: a label for each row, None for a row without one.
    """
    agreement = Agreement(pairs=[], against_labels=[])
    if len(panel) < 2 and not labels:
        return agreement
    # Read once: rows may lie on disk.
    places = [(intern(row["kind"]), (intern(row["set"]), intern(row["id"]))) for row in rows]
    for a, b in combinations(panel, 2):
        if b.exact and not a.exact:
            judge, truth = a, b
        elif a.exact and not b.exact:
            judge, truth = b, a
        else:
            judge = truth = None
        for verdict, kinds in COMPARED.items():
            if verdict not in a.verdicts & b.verdicts:
                continue
            measured = [i for i, (kind, _) in enumerate(places) if kind in kinds]
            both = [i for i in measured if UNJUDGED.isdisjoint((verdicts[a.name][i], verdicts[b.name][i]))]
            questions = [places[i][1] for i in both]
            missing = len(measured) - len(both)
            calls = {own.name: [verdicts[own.name][i] == verdict for i in both] for own in (a, b)}
            pairs = list(zip(calls[a.name], calls[b.name], strict=True))
            agreement["pairs"].append(
                {
                    "judges": [a.name, b.name],
                    "verdict": verdict,
                    "unjudged": missing,
                    "kappa": stats.kappa(pairs),
                    "agreed": grouped_leaf([x == y for x, y in pairs], questions),
                }
            )
            if judge is not None and truth is not None:
                true, called = calls[truth.name], calls[judge.name]
                agreement["against_labels"].append(
                    _entry(judge.name, truth.name, verdict, missing, true, called, questions)
                )
    if any(labels):
        for judge in panel:
            agreement["against_labels"] += _against(judge, places, verdicts[judge.name], labels)
    return agreement


def _against(
    judge: Judge, places: Places, verdicts: Verdicts, labels: Sequence[Verdict | None]
) -> list[LabelAgreement]:
    """The judge's errors on each class that it can give, by human labels."""
    entries: list[LabelAgreement] = []
    for verdict, kinds in COMPARED.items():
        if verdict not in judge.verdicts:
            continue
        known = [
            (i, label == verdict)
            for i, label in enumerate(labels)
            if label is not None and places[i][0] in kinds and decides(label, verdict)
        ]
        both = [(i, true) for i, true in known if verdicts[i] not in UNJUDGED]
        true, called = [true for _, true in both], [verdicts[i] == verdict for i, _ in both]
        questions = [places[i][1] for i, _ in both]
        entries.append(_entry(judge.name, HUMAN, verdict, len(known) - len(both), true, called, questions))
    return entries


def _entry(
    judge: str,
    labels: str,
    verdict: Verdict,
    missing: int,
    true: Sequence[bool],
    called: Sequence[bool],
    questions: Sequence[Hashable],
) -> LabelAgreement:
    """true, called: whether each answer is of the class, by the labels and by the judge."""
    return {
        "judge": judge,
        "labels": labels,
        "verdict": verdict,
        "unjudged": missing,
        "precision": _rate(true, called, questions),
        "recall": _rate(called, true, questions),
        "specificity": _rate([not c for c in called], [not t for t in true], questions),
        "kappa": stats.kappa(list(zip(true, called, strict=True))),
    }


def _rate(hits: Sequence[bool], where: Sequence[bool], questions: Sequence[Hashable]) -> Leaf | None:
    """The fraction of hits among the answers that `where` selects."""
    chosen = [i for i, selected in enumerate(where) if selected]
    return grouped_leaf([hits[i] for i in chosen], [questions[i] for i in chosen])
