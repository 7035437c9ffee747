"""The page's tables. Every rate stands with its counts and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mirage_dist.report import text
from mirage_dist.report.load import Leaf, Run, condition_label
from mirage_dist.report.style import slots

# The columns of the main table: title, measure, and of which sets the attack is.
MAIN = (
    ("ASR, clean → attacked", "asr", "unsafe"),
    ("RR, clean → attacked", "rr", "safe"),
    ("IR, clean → attacked", "ir", "unsafe"),
    ("Right answers, clean → attacked", "utility", "safe"),
    ("Locality", "locality", None),
)


def main(runs: Sequence[Run]) -> str:
    """The paper's main table: a row a model, before → after the attack."""
    columns = [(t, m, kind) for t, m, kind in MAIN if any(run.leaf(m) for run in runs)]
    benchmarks = list(dict.fromkeys(name for run in runs for name in run.entry.get("accuracy") or {}))
    titles = [*(title for title, *_ in columns), *(f"Accuracy, {name}" for name in benchmarks)]
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = []
    for run in runs:
        ends = [
            *(
                [run.leaf(m), run.leaf(m, run.attacked(kind) or "")] if kind else [run.leaf(m)]
                for _, m, kind in columns
            ),
            *([run.leaf("accuracy", name)] for name in benchmarks),
        ]
        cells = [f"<td>{_change([leaf for leaf in pair if leaf])}</td>" for pair in ends]
        body.append(f'<tr><th scope="row">{name(runs, run)}</th>{"".join(cells)}</tr>')
    return _table("rates main", f'<th scope="col">Model</th>{head}', "".join(body))


def _change(leaves: Sequence[Leaf]) -> str:
    if not leaves:
        return '<span class="count">not measured</span>'
    rates = " → ".join(f"{100 * leaf['rate']:.1f}" for leaf in leaves)
    counts = " → ".join(f"{leaf['k']}/{leaf['n']}" for leaf in leaves)
    return f'<span class="rate">{rates}</span><span class="count">{counts}</span>'


def rates(runs: Sequence[Run]) -> str:
    """Every measure under every condition, a column a model."""
    head = "".join(f'<th scope="col">{name(runs, run)}</th>' for run in runs)
    body = []
    for title, meaning, rows in text.measures(runs):
        body.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{len(runs) + 1}"><div>{escape(title)} '
            f'<span class="note">{escape(meaning)}</span></div></th></tr>'
        )
        for label, measure, condition in rows:
            cells = "".join(_cell(runs, run, run.leaf(measure, condition)) for run in runs)
            body.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    return _table("rates all", f'<th scope="col"></th>{head}', "".join(body))


def _cell(runs: Sequence[Run], run: Run, leaf: Leaf | None) -> str:
    if leaf is None:
        return '<td class="count">not measured</td>'
    low, high = (100 * bound for bound in leaf["ci95"])
    unjudged = f" · {leaf['unjudged']} without verdict" if leaf.get("unjudged") else ""
    return (
        f'<td style="{colour(runs, run)}"><span class="rate">{text.percent(leaf)}</span>'
        f'<span class="bar"><i style="width:{100 * leaf["rate"]:.1f}%"></i></span>'
        f'<span class="count">{leaf["k"]}/{leaf["n"]} · {low:.1f}–{high:.1f}{unjudged}</span></td>'
    )


def agreement(runs: Sequence[Run]) -> str:
    """Each two judges: Cohen's κ by class and model, and precision and recall where one of them has exact labels."""
    told = {run.name: run.metrics.get("agreement", {}) for run in runs}
    rows = [(_pair(entry), "κ", entry) for own in told.values() for entry in own.get("pairs", ())]
    rows += [
        (_judged(entry), measure, entry)
        for own in told.values()
        for entry in own.get("against_labels", ())
        for measure in ("precision", "recall")
    ]
    labels = list(dict.fromkeys((label, measure) for label, measure, _ in rows))
    body = []
    for label, measure in labels:
        cells = []
        for run in runs:
            part = told[run.name].get("pairs" if measure == "κ" else "against_labels", ())
            entry = next((e for e in part if (_pair(e) if measure == "κ" else _judged(e)) == label), None)
            cells.append(f"<td>{_agreed(entry, measure)}</td>")
        body.append(
            f'<tr><th scope="row">{escape(label)}<br><span class="note">{measure}</span></th>{"".join(cells)}</tr>'
        )
    head = "".join(f'<th scope="col">{name(runs, run)}</th>' for run in runs)
    return _table("rates judges", f'<th scope="col"></th>{head}', "".join(body)) if body else ""


def _pair(entry: Mapping[str, Any]) -> str:
    return f"{' and '.join(entry['judges'])}: {entry['verdict']}"


def _judged(entry: Mapping[str, Any]) -> str:
    return f"{entry['judge']} against {entry['labels']}: {entry['verdict']}"


def _agreed(entry: Mapping[str, Any] | None, measure: str) -> str:
    if entry is None:
        return '<span class="count">not measured</span>'
    leaf = entry["agreed"] if measure == "κ" else entry[measure]
    if leaf is None:
        return '<span class="count">no such answer</span>'
    rate = f"{100 * leaf['rate']:.1f}\N{NO-BREAK SPACE}%"
    if measure == "κ":
        rate = "undefined" if entry["kappa"] is None else f"{entry['kappa']:.2f}"
    counts = f"{'agreed ' if measure == 'κ' else ''}{leaf['k']}/{leaf['n']}"
    return f'<span class="rate">{rate}</span><span class="count">{counts}</span>'


def pairs(runs: Sequence[Run], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """McNemar's tests, a folded table a measure and condition."""
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
                f"<td>{c['only_before']} · {c['only_after']}</td><td>{text.p_value(c['p_holm'])}</td></tr>"
            )
        head = "".join(
            f'<th scope="col">{escape(t)}</th>'
            for t in ("", "difference, points", "counts", "only first · only second", "p, corrected")
        )
        title = f"{text.MEASURES[measure][0]}, {condition_label(condition)}"
        inner = _table("rates pairs", head, "".join(body))
        folded.append(f"<details><summary>{escape(title)}</summary>{inner}</details>\n")
    return "".join(folded)


def _table(kind: str, head: str, body: str) -> str:
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def name(runs: Sequence[Run], run: Run) -> str:
    return f'<span class="name" style="{colour(runs, run)}">{escape(run.name)}</span>'


def colour(runs: Sequence[Run], run: Run) -> str:
    return f"--c:var(--slot{slots([r.name for r in runs])[run.name]})"
