"""How much a rate moves with its judge: the same answers by every judge, and corrected for the judge's errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from mirage_dist.evals import results
from mirage_dist.evals.results import CLEAN, Condition, Corrected, Leaf
from mirage_dist.report import tables, text
from mirage_dist.report.load import Run, rates

TITLE = "How much the judge decides"
# Measure, kind of the set that it is measured on, and whether it is shown under the attack.
SHOWN = (
    ("asr", "unsafe", False),
    ("asr", "unsafe", True),
    ("ir", "unsafe", True),
    ("rr", "safe", False),
    ("rr", "safe", True),
)
FIGURES = ("κ", "precision", "recall", "specificity")  # of a judge's errors


@dataclass(frozen=True)
class Judged:
    """One rate of one run by one judge. corrected: None without human labels."""

    judge: str
    leaf: Leaf
    corrected: Corrected | None


@dataclass(frozen=True)
class Row:
    """One rate by every judge that measured it. by_run: run -> judgements, in the order of the judges."""

    measure: str
    attacked: bool
    label: str
    by_run: dict[str, list[Judged]]

    @property
    def judges(self) -> list[str]:
        return list(dict.fromkeys(own.judge for judged in self.by_run.values() for own in judged))

    def of(self, run: Run, judge: str) -> Judged | None:
        return next((own for own in self.by_run.get(run.name, []) if own.judge == judge), None)

    def moves(self, run: Run) -> float | None:
        """How far apart the judges' rates are, from 0 to 1; None where fewer than two measured it."""
        measured = [own.leaf["rate"] for own in self.by_run.get(run.name, [])]
        return max(measured) - min(measured) if len(measured) > 1 else None


def rows(runs: Sequence[Run]) -> list[Row]:
    """The rates that several judges measured, or one judge with human labels."""
    made = []
    for measure, kind, attacked in SHOWN:
        by_run = {run.name: list(_judged(run, measure, kind, attacked)) for run in runs}
        label = next((str(own.label) for run in runs if (own := _condition(run, kind, attacked))), "")
        several = any(len(judged) > 1 for judged in by_run.values())
        labelled = any(own.corrected for judged in by_run.values() for own in judged)
        if (several or labelled) and label:
            made.append(Row(measure, attacked, label, by_run))
    return made


def _condition(run: Run, kind: str, attacked: bool) -> Condition | None:
    return run.attacked(kind) if attacked else CLEAN


def _judged(run: Run, measure: str, kind: str, attacked: bool) -> Iterator[Judged]:
    condition, own = _condition(run, kind, attacked), run.headline_set(kind)
    for judge, result in run.metrics["judges"].items():
        leaf = rates(result["entry"], measure).get(str(condition))
        if leaf is not None and own is not None:
            corrections = result.get("corrected", {}).get(own, {}).get(measure, {})
            yield Judged(judge, leaf, corrections.get(str(condition)))


def note(runs: Sequence[Run]) -> str:
    """What the section shows."""
    words = (
        "The same answers, by every judge that can measure the rate, in percent with counts and 95 % intervals. Where "
        "judges differ, the difference is theirs and not the model's."
    )
    if labels := labelled(runs):
        words += (
            f" {labels} They measure each judge's errors, and the corrected rate is what remains without them (Rogan "
            "and Gladen's estimator with Lang and Reiczigel's interval). It holds if the labels are right, were drawn "
            "without regard to the judges' verdicts, and the judge errs alike on the other answers."
        )
    return words


def caption(runs: Sequence[Run]) -> str:
    """Of the section's figures."""
    words = "Each judge's rate of the same answers, with its 95 % interval."
    return f"{words} Open: corrected for the judge's errors." if labelled(runs) else words


def labelled(runs: Sequence[Run]) -> str:
    """How many answers people have labelled, in one sentence; empty where nobody has."""
    counts = {run.name: sum(info["verdicts"].values()) for run in runs if (info := run.metrics.get("labels"))}
    listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
    return f"People have labelled answers: {listed}." if listed else ""


def cautions(runs: Sequence[Run]) -> list[str]:
    """Sentences for the head of a report whose headline rates are a phrase list's."""
    by_words: dict[str, list[str]] = {}
    for run in runs:
        if words := results.caution(run.metrics):
            by_words.setdefault(words, []).append(run.name)
    return [words if len(names) == len(runs) else f"{', '.join(names)}: {words}" for words, names in by_words.items()]


def descriptions(runs: Sequence[Run]) -> list[str]:
    """What each judge is and what it does not see, one line for each judge and each model that it is."""
    lines = (f"{name}: {own['about']}." for run in runs for name, own in run.metrics["judges"].items())
    return list(dict.fromkeys(lines))


@dataclass(frozen=True)
class Errors:
    """One judge's errors on one class of one model's answers.

    figures: of each of FIGURES, the value, and its counts or why there is none.
    """

    run: Run
    label: str
    figures: list[tuple[str, str]]


def errors(runs: Sequence[Run]) -> list[Errors]:
    """Against exact or human labels, as text."""
    made = []
    for run in runs:
        for entry in run.errors:
            kappa, specificity = ("", "not measured"), ("", "not measured")  # by an earlier version
            if "kappa" in entry:
                value = entry["kappa"]
                kappa = ("", "undefined") if value is None else (tables.two_places(value), "")
            if "specificity" in entry:
                specificity = _share(entry["specificity"])
            label = f"{entry['judge']} against {entry['labels']}: {entry['verdict']}"
            made.append(Errors(run, label, [kappa, _share(entry["precision"]), _share(entry["recall"]), specificity]))
    return made


def _share(leaf: Leaf | None) -> tuple[str, str]:
    return ("", "no answer in this class") if leaf is None else (text.percent(leaf), f"{leaf['k']}/{leaf['n']}")


# ------------------------------------------------------------------------------------------------- as text


def correction(corrected: Corrected | None) -> str:
    """A corrected rate with its interval in percent, or why there is none; empty without labels."""
    if corrected is None:
        return ""
    if corrected["rate"] is None or corrected["ci95"] is None:
        return f"not corrected: {corrected.get('reason', '')}"
    low, high = (100 * bound for bound in corrected["ci95"])
    return f"corrected {100 * corrected['rate']:.1f} ({low:.1f}–{high:.1f})"


def moved(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} points"


def table(runs: Sequence[Run]) -> str:
    """The section's table: one group for each rate, one row for each judge, one column for each model."""
    body = []
    for row in rows(runs):
        title, meaning = text.MEASURES[row.measure]
        body.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{len(runs) + 1}"><div>{escape(title)}, '
            f'{escape(row.label)} <span class="note">{escape(meaning)}</span></div></th></tr>'
        )
        for judge in row.judges:
            cells = "".join(_cell(runs, run, row.of(run, judge)) for run in runs)
            body.append(f'<tr><th scope="row">{escape(judge)}</th>{cells}</tr>')
        if any(row.moves(run) is not None for run in runs):
            cells = "".join(f"<td>{moved(row.moves(run))}</td>" for run in runs)
            body.append(f'<tr><th scope="row"><span class="note">between the judges</span></th>{cells}</tr>')
    head = "".join(f'<th scope="col">{tables.name(runs, run)}</th>' for run in runs)
    return tables.framed("rates all", f'<th scope="col"></th>{head}', "".join(body)) if body else ""


def table_of_errors(runs: Sequence[Run]) -> str:
    """One row for each class of each judge of each model."""
    body = []
    for own in errors(runs):
        spans = [((value, "rate"), (counts, "count")) for value, counts in own.figures]
        cells = ("".join(f'<span class="{kind}">{words}</span>' for words, kind in both if words) for both in spans)
        head = f'<th scope="row">{tables.name(runs, own.run)}<br>{escape(own.label)}</th>'
        body.append(f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    titles = "".join(f'<th scope="col">{title}</th>' for title in ("", *FIGURES))
    return tables.framed("rates judges", titles, "".join(body)) if body else ""


def _cell(runs: Sequence[Run], run: Run, judged: Judged | None) -> str:
    if judged is None:
        return '<td class="count">not measured</td>'
    words = correction(judged.corrected)
    extra = f'<span class="count corrected">{escape(words)}</span>' if words else ""
    return tables.cell(runs, run, judged.leaf, extra)
