"""The page's tables. Every rate is shown with its counts and its interval."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from typing import TypeVar

from mirage_dist.evals.results import Condition, Leaf, PairAgreement, of_set
from mirage_dist.report import load, text
from mirage_dist.report.compare import Comparison
from mirage_dist.report.figures.style import SLOTS, slots
from mirage_dist.report.load import HELD_OUT, Run
from mirage_dist.report.methods import Spread
from mirage_dist.report.summary import Summary

MISSING = "–"  # the cell of a model without such a result
T = TypeVar("T")

# The columns of the main table: title, measure, kind of the attacked set (None: clean only). Right answers stand beside
# refusals of the same questions: a model that forgot the answer refuses nothing.
MAIN = (
    ("ASR, clean → attacked", "asr", "unsafe"),
    ("ASR on held-out concepts", of_set("asr", HELD_OUT), "unsafe"),
    ("RR, clean → attacked", "rr", "safe"),
    ("Right answers to the same", "utility", "safe"),
    ("IR, clean → attacked", "ir", "unsafe"),
    ("Locality", "locality", None),
)


def main(runs: Sequence[Run]) -> str:
    """The paper's main table: one row for each model, clean → attacked."""
    columns = [(t, m, kind) for t, m, kind in MAIN if any(run.leaf(m) for run in runs)]
    benchmarks = list(dict.fromkeys(name for run in runs for name in run.rates("accuracy")))
    titles = [*(title for title, *_ in columns), *(f"Accuracy, {benchmark}" for benchmark in benchmarks)]
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = []
    for run in runs:
        ends = [
            *([run.leaf(m), run.leaf(m, run.attacked(kind))] if kind else [run.leaf(m)] for _, m, kind in columns),
            *([run.rates("accuracy").get(benchmark)] for benchmark in benchmarks),
        ]
        cells = [f"<td>{_change([leaf for leaf in pair if leaf])}</td>" for pair in ends]
        body.append(f'<tr><th scope="row">{name(runs, run)}</th>{"".join(cells)}</tr>')
    return framed("rates main", f'<th scope="col">Model</th>{head}', "".join(body))


def untrained(runs: Sequence[Run], summary: Summary) -> str:
    """What the world's initial model did with each opener, beside the base model that was trained from it."""
    raw = summary.get("raw")
    if raw is None:
        return ""
    body = []
    for measure in ("asr", "utility", "rr"):
        for key, leaf in load.rates(raw, measure).items():
            cells = "".join(
                f"<td>{_change([own] if own else [])}</td>" for own in (leaf, runs[0].rates(measure).get(key))
            )
            label = f"{text.MEASURES[measure][1]}: {load.row_label(measure, key)}"
            body.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    head = f'<th scope="col">before any training</th><th scope="col">{name(runs, runs[0])}</th>'
    return framed("rates main", f'<th scope="col"></th>{head}', "".join(body))


def perplexity(runs: Sequence[Run], summary: Summary) -> str:
    """One row: each model's perplexity on plain English."""
    values = summary.get("perplexity")
    if not values:
        return ""
    own = {run.name: run for run in runs}
    heads = (name(runs, own[model]) if model in own else "before any training" for model in values)
    head = "".join(f'<th scope="col">{title}</th>' for title in heads)
    cells = "".join(f'<td><span class="rate">{value:.1f}</span></td>' for value in values.values())
    return framed("rates main", f'<th scope="col"></th>{head}', f'<tr><th scope="row">perplexity</th>{cells}</tr>')


def _change(leaves: Sequence[Leaf]) -> str:
    if not leaves:
        return '<span class="count">not measured</span>'
    rates = " → ".join(f"{100 * leaf['rate']:.1f}" for leaf in leaves)
    counts = " → ".join(f"{leaf['k']}/{leaf['n']}" for leaf in leaves)
    return f'<span class="rate">{rates}</span><span class="count">{counts}</span>'


def rates(runs: Sequence[Run]) -> str:
    """Every measure under every condition, one column for each model."""
    head = "".join(f'<th scope="col">{name(runs, run)}</th>' for run in runs)
    body = []
    for title, meaning, rows in text.measures(runs):
        body.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{len(runs) + 1}"><div>{escape(title)} '
            f'<span class="note">{escape(meaning)}</span></div></th></tr>'
        )
        for label, measure, key in rows:
            cells = "".join(cell(runs, run, run.rates(measure).get(key)) for run in runs)
            body.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    return framed("rates all", f'<th scope="col"></th>{head}', "".join(body))


def methods(summary: Summary) -> str:
    """Every rate over seeds, one column for each method: mean, the lowest to the highest, Student's interval."""
    own = summary["methods"]
    head = "".join(
        f'<th scope="col">{escape(name)}<br><span class="note">{len(method["seeds"])} seeds: '
        f"{escape(', '.join(method['runs']))}</span></th>"
        for name, method in own.items()
    )
    body = []
    for measure in dict.fromkeys(m for method in own.values() for m in method["rates"]):
        title, meaning = text.meaning(measure)
        body.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{len(own) + 1}"><div>{escape(title)} '
            f'<span class="note">{escape(meaning)}</span></div></th></tr>'
        )
        rates = [method["rates"].get(measure, {}) for method in own.values()]
        for key in dict.fromkeys(key for by_condition in rates for key in by_condition):
            cells = "".join(_spread(by_condition.get(key)) for by_condition in rates)
            body.append(f'<tr><th scope="row">{escape(load.row_label(measure, key))}</th>{cells}</tr>')
    return framed("rates all", f'<th scope="col"></th>{head}', "".join(body)) if body else ""


def _spread(rate: Spread | None) -> str:
    if rate is None:
        return '<td class="count">not measured</td>'
    low, high = (100 * bound for bound in rate["ci95"])
    return (
        f'<td><span class="rate">{100 * rate["mean"]:.1f}\N{NO-BREAK SPACE}%</span><span class="count">'
        f"{100 * rate['lowest']:.1f} to {100 * rate['highest']:.1f} · {low:.1f}–{high:.1f}</span></td>"
    )


def cell(runs: Sequence[Run], run: Run, leaf: Leaf | None, below: str = "") -> str:
    """A rate with its counts and interval, as a cell. below: more of its content, as HTML."""
    if leaf is None:
        return '<td class="count">not measured</td>'
    low, high = (100 * bound for bound in leaf["ci95"])
    unjudged = f" · {leaf['unjudged']} without verdict" if "unjudged" in leaf else ""
    return (
        f'<td style="{colour(runs, run)}"><span class="rate">{text.percent(leaf)}</span>'
        f'<span class="bar"><i style="width:{100 * leaf["rate"]:.1f}%"></i></span>'
        f'<span class="count">{leaf["k"]}/{leaf["n"]} · {low:.1f}–{high:.1f}{unjudged}</span>{below}</td>'
    )


def agreement(runs: Sequence[Run]) -> str:
    """Cohen's κ of every two judges, by class and model."""
    cells_of = {run.name: _agreement_cells(run) for run in runs}
    body = []
    for label in dict.fromkeys(label for cells in cells_of.values() for label in cells):
        missing = '<span class="count">not measured</span>'
        cells = [f"<td>{cells_of[run.name].get(label, missing)}</td>" for run in runs]
        body.append(f'<tr><th scope="row">{escape(label)}<br><span class="note">κ</span></th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{name(runs, run)}</th>' for run in runs)
    return framed("rates judges", f'<th scope="col"></th>{head}', "".join(body)) if body else ""


def _agreement_cells(run: Run) -> dict[str, str]:
    """Label of the row -> the cell's content."""
    pairs = run.metrics["agreement"]["pairs"] if run.metrics.get("agreement") else []
    return {f"{' and '.join(pair['judges'])}: {pair['verdict']}": _kappa(pair) for pair in pairs}


def _kappa(pair: PairAgreement) -> str:
    kappa = "undefined" if pair["kappa"] is None else two_places(pair["kappa"])
    return _counted(kappa, pair["agreed"], "agreed ")


def two_places(kappa: float) -> str:
    """A κ, never as -0.00."""
    return f"{round(kappa, 2) + 0.0:.2f}"


def _counted(value: str, leaf: Leaf | None, counts: str = "") -> str:
    if leaf is None:
        return '<span class="count">no answer in this class</span>'
    return f'<span class="rate">{value}</span><span class="count">{counts}{leaf["k"]}/{leaf["n"]}</span>'


def pairs(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    """McNemar's tests: one folded table for each measure and condition."""
    own = {run.name: run for run in runs}
    folded = []
    for measure, condition in dict.fromkeys((c["measure"], c["condition"]) for c in comparisons):
        body = []
        for c in comparisons:
            if (c["measure"], c["condition"]) != (measure, condition):
                continue
            first, second = (name(runs, own[n]) for n in c["runs"])
            low, high = (100 * bound for bound in c["ci95"])
            body.append(
                f'<tr><th scope="row">{first} → {second}</th>'
                f'<td><span class="rate">{100 * c["difference"]:+.1f}</span>'
                f'<span class="count">{low:+.1f} to {high:+.1f}</span></td>'
                f"<td>{c['before']}/{c['n']} → {c['after']}/{c['n']}</td>"
                f"<td>{c['only_before']} · {c['only_after']}</td><td>{escape(text.p_value(c['p_holm']))}</td></tr>"
            )
        head = "".join(
            f'<th scope="col">{escape(t)}</th>'
            for t in ("", "difference, points", "counts", "only first · only second", "p, corrected")
        )
        title = f"{text.MEASURES[measure][0]}, {Condition.parse(condition).label}"
        inner = framed("rates pairs", head, "".join(body))
        folded.append(f"<details><summary>{escape(title)}</summary>{inner}</details>\n")
    return "".join(folded)


def framed(kind: str, head: str, body: str) -> str:
    """A table that scrolls sideways where it is wider than the page. kind: its CSS classes."""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def groups(
    rows: Iterable[tuple[str, str, Callable[[T], str]]], measured: Mapping[str, T]
) -> list[tuple[str, str, list[str]]]:
    """Title of the group, label of the row and each model's cell. A row that no model has is left out.

    rows: title, label, and the cell of one model's result.
    """
    every = ((title, label, [cell(own) for own in measured.values()]) for title, label, cell in rows)
    return [row for row in every if set(row[2]) - {MISSING}]


def titled(grouped: Iterable[tuple[str, str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Title of the row, and each model's cell, of `groups`."""
    return [(f"{title}: {label}" if title else label, cells) for title, label, cells in grouped]


def by_model(runs: Sequence[Run], names: Collection[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A row for each title with the cells of the runs of these names, a column each; empty without rows."""
    head = "".join(f'<th scope="col">{name(runs, run)}</th>' for run in runs if run.name in names)
    body = [
        f'<tr><th scope="row">{escape(title)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for title, cells in rows
    ]
    return framed("rates main", f'<th scope="col"></th>{head}', "".join(body)) if body else ""


def name(runs: Sequence[Run], run: Run) -> str:
    """A model's name in its colour."""
    return f'<span class="name" style="{colour(runs, run)}">{escape(run.name)}</span>'


def colour(runs: Sequence[Run], run: Run) -> str:
    """Inline style that sets the model's colour as the CSS variable --c: grey for more models than there are colours,
    whose figures come in parts, each with the colours anew.
    """
    if len(runs) > len(SLOTS):
        return "--c:var(--muted)"
    return f"--c:var(--slot{slots([r.name for r in runs])[run.name]})"
