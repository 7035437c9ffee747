"""Measures of forgetting as a table: a row for each measure and set of answers, a column for each model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mirage_dist.report import tables, text
from mirage_dist.report.load import Run
from mirage_dist.report.tables import MISSING

if TYPE_CHECKING:
    from mirage_dist.erasure.results import (
        Difference,
        ForgetQuality,
        ForgettingResult,
        Measured,
        Measures,
        Membership,
    )

TITLE = "Measures of forgetting"
NOTE = (
    "How likely the answers still are, whatever the model says: mean and 95 % interval, which takes the contents of "
    "the answers as independent; in percent, except the truth ratio and p. In a model that forgot, forgotten answers "
    "are as likely as in one that never knew, and retained ones stay as they were. Membership is of the forgotten "
    "answers against unseen ones."
)
SETS = {"forget": "forgotten answers", "retain": "retained answers", "unseen": "unseen answers"}
NEVER = "model that never knew"  # on the forgotten answers
# Key of `Measures` -> title. The truth ratio is no share.
MEASURES = {
    "probability": "Probability of a token",
    "extraction_strength": "Extraction strength",
    "rouge_l": "ROUGE-L of the model's answer",
    "closeness": "Truth ratio's closeness to 1",
    "truth_ratio": "Truth ratio, wrong to right",
}
SCORES = {"loss": "by loss", "min_k": "by unlikely tokens"}
QUALITIES = {"answers": "over answers", "contents": "over contents"}


def results(runs: Sequence[Run]) -> dict[str, ForgettingResult]:
    """Name of the run -> its result, of those that were measured."""
    tested = {run.name: run.erasure for run in runs}
    return {name: own["forgetting"] for name, own in tested.items() if own is not None and "forgetting" in own}


def note(measured: Mapping[str, ForgettingResult]) -> str:
    """NOTE, and `caution`."""
    return " ".join(filter(None, (NOTE, caution(measured))))


def caution(measured: Mapping[str, ForgettingResult]) -> str:
    """In what the models' measures were made differently, in sentences; empty where they can be compared."""
    if len(measured) < 2:
        return ""
    sentences = []
    differing = [f"{title} ({values})" for title, value in _making() if (values := _groups(measured, value))]
    if differing:
        sentences.append(f"The columns are not comparable: they differ in {', in '.join(differing)}.")
    if unknown := [name for name, own in measured.items() if "scoring" not in own]:
        sentences.append(
            f"What was scored is not recorded for {', '.join(unknown)}, measured by an earlier version; start its "
            "mirage erasure again, which adds it."
        )
    return " ".join(sentences)


def _making() -> Iterator[tuple[str, Callable[[ForgettingResult], str | None]]]:
    """What decides a model's figures beside the model, and its value; None where a result has none."""
    yield "the number of wrong answers", lambda own: str(own["scoring"]["wrong"]) if "scoring" in own else None
    yield "min_k", lambda own: f"{own['scoring']['min_k']:g}" if "scoring" in own else None
    for name, label in SETS.items():
        yield f"the {label}, or the wrong ones beside them", lambda own, n=name: _scored(own, n)
    yield f"the {NEVER}", lambda own: own["never"] and own["never"]["model_hash"][:8]


def _scored(own: ForgettingResult, name: str) -> str | None:
    digest = own["scoring"]["scored"].get(name) if "scoring" in own else None
    return digest and digest[:8]


def _groups(measured: Mapping[str, ForgettingResult], value: Callable[[ForgettingResult], str | None]) -> str:
    """Each value and the models that have it; empty where there is one value or none."""
    by_value: dict[str, list[str]] = {}
    for name, own in measured.items():
        if (one := value(own)) is not None:
            by_value.setdefault(one, []).append(name)
    return "; ".join(f"{', '.join(names)}: {one}" for one, names in by_value.items()) if len(by_value) > 1 else ""


def rows(measured: Mapping[str, ForgettingResult]) -> list[tuple[str, list[str]]]:
    """Title of the row, and each model's cell. A row that no model has is left out."""
    return tables.titled(groups(measured))


def groups(measured: Mapping[str, ForgettingResult]) -> list[tuple[str, str, list[str]]]:
    """Title of the measure, label of the row and each model's cell. A row that no model has is left out."""
    return tables.groups(_rows(), measured)


def html(runs: Sequence[Run]) -> str:
    """The table for the page; empty where no run was measured."""
    measured = results(runs)
    return tables.by_model(runs, measured, rows(measured))


def _rows() -> Iterator[tuple[str, str, Callable[[ForgettingResult], str]]]:
    """Title, label, and the cell of one model's result."""
    for key, title in MEASURES.items():
        show = _number if key == "truth_ratio" else _percent
        for name, label in SETS.items():
            yield title, label, lambda own, k=key, n=name, s=show: s(_measure(own.get(n), k))
        yield (
            title,
            NEVER,
            lambda own, k=key, s=show: s(_measure(own["never"]["forget"] if own["never"] else None, k)),
        )
    for key, label in SCORES.items():
        yield "Membership, AUC", label, lambda own, k=key: _auc(own["membership"], k)
    for key, label in QUALITIES.items():
        yield "Forget quality, p", label, lambda own, k=key: _quality(own["never"] and own["never"]["quality"], k)


def _measure(measures: Measures | None, key: str) -> Measured | None:
    return None if measures is None else measures.get(key)


def _percent(measured: Measured | None) -> str:
    return MISSING if measured is None else _ranged(measured["mean"], measured["ci95"], "{:.1f}", 100)


def _number(measured: Measured | None) -> str:
    return MISSING if measured is None else _ranged(measured["mean"], measured["ci95"], "{:.3g}", 1)


def _ranged(value: float, bounds: Sequence[float] | None, form: str, times: float) -> str:
    shown = [form.format(times * x) for x in (value, *(bounds or ()))]
    return shown[0] if bounds is None else f"{shown[0]} ({shown[1]}–{shown[2]})"


def _auc(membership: Mapping[str, Membership] | None, key: str) -> str:
    return MISSING if membership is None else _ranged(membership[key]["auc"], membership[key]["ci95"], "{:.1f}", 100)


def _quality(quality: ForgetQuality | None, key: str) -> str:
    if quality is None:
        return MISSING
    own: Difference = quality["answers"] if key == "answers" else quality["contents"]
    return f"{text.p_value(own['p'])} (n = {own['n']})"
