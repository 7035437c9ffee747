"""One perturbation as a test of erasure, as a table: a row for each rate, a column for each model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from mirage_dist.report import tables
from mirage_dist.report.load import Run
from mirage_dist.report.tables import MISSING

if TYPE_CHECKING:
    from mirage_dist.erasure.results import UniversalResult
    from mirage_dist.evals.results import Leaf

TITLE = "One perturbation for all pictures"
NOTE = (
    "Attack success on forget questions, in percent, with counts and a 95 % interval that takes their contents as "
    "independent: as the questions are, with random noise of the perturbation's size, and with the perturbation, which "
    "was fitted on other forget samples. What returns of contents that are not in the fit had been hidden, not erased, "
    "as far as it exceeds random noise and a model that never knew; contents of the fit may come from the perturbation "
    "itself."
)
FIGURE = (
    TITLE,
    "Attack success, in percent, on contents that the perturbation was not fitted on: without it, with random noise of "
    "its size, and with it. What returns here, beyond noise and beyond a model that never knew, had been hidden.",
)
PARTS: dict[Literal["held_out", "fitted"], str] = {
    "held_out": "Contents not in the fit",
    "fitted": "Contents of the fit",
}
CONDITIONS: dict[Literal["clean", "noise", "perturbed"], str] = {
    "clean": "as asked",
    "noise": "random noise",
    "perturbed": "perturbation",
}


def results(runs: Sequence[Run]) -> dict[str, UniversalResult]:
    """Name of the run -> its result, of those for which the test was made."""
    tested = {run.name: run.erasure for run in runs}
    return {name: own["universal"] for name, own in tested.items() if own is not None and "universal" in own}


def rows(measured: Mapping[str, UniversalResult]) -> list[tuple[str, list[str]]]:
    """Title of the row, and each model's cell."""
    return tables.titled(groups(measured))


def groups(measured: Mapping[str, UniversalResult]) -> list[tuple[str, str, list[str]]]:
    """Title of the group, label of the row and each model's cell. A row of samples left out is there if any were."""
    return tables.groups(_rows(), measured)


def html(runs: Sequence[Run]) -> str:
    """The table for the page; empty where the test was made of no run."""
    measured = results(runs)
    return tables.by_model(runs, measured, rows(measured))


def _rows() -> Iterator[tuple[str, str, Callable[[UniversalResult], str]]]:
    """Title, label, and the cell of one model's result."""
    for part, title in PARTS.items():
        for condition, label in CONDITIONS.items():
            yield title, label, lambda own, p=part, c=condition: _rate(own[p][c])
        yield title, "contents", lambda own, p=part: str(own[p]["contents"])
    yield "Fit", "samples", lambda own: f"{own['fit']['samples']} of {own['fit']['contents']} contents"
    yield "Fit", "size", lambda own: f"± {own['epsilon']} of 255, {own['steps']} steps"
    yield "Fit", "target's loss", lambda own: f"{own['fit']['clean']:.3g} → {own['fit']['loss']:.3g}"
    yield "Left out", "without a picture", lambda own: str(own["without_picture"] or MISSING)
    yield "Left out", "not perturbed", lambda own: str(own["unperturbed"] or MISSING)


def _rate(leaf: Leaf | None) -> str:
    if leaf is None:
        return MISSING
    low, high = (100 * bound for bound in leaf["ci95"])
    unjudged = f"; {own} unjudged" if (own := leaf.get("unjudged")) else ""
    return f"{100 * leaf['rate']:.1f} ({leaf['k']}/{leaf['n']}; {low:.1f}–{high:.1f}{unjudged})"
