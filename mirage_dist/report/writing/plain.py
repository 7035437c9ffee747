"""The report as plain text: Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence

from mirage_dist.evals.results import Condition, Leaf, Measures
from mirage_dist.report import defences, judges, text
from mirage_dist.report.compare import Comparison
from mirage_dist.report.load import Run, rates, row_label
from mirage_dist.report.methods import Method, Spread
from mirage_dist.report.summary import Summary
from mirage_dist.report.writing import forgetting, perturbed

FORMULA = "=+-@\t\r"  # a spreadsheet reads a cell that begins so as a formula (OWASP, CSV injection)


def markdown(runs: Sequence[Run], summary: Summary) -> str:
    """The table of all rates, the paired tests, and notes on how to read them."""
    head = [f"# {text.TITLE}", text.lede(runs), text.facts(runs)]
    parts = [*head, *(f"**{line}**" for line in (*judges.cautions(runs), *text.warnings(runs)))]
    rows = [["", "", *(run.name for run in runs)], ["-"] * (2 + len(runs))]
    for title, _, conditions in text.measures(runs):
        for number, (label, measure, key) in enumerate(conditions):
            cells = [_cell(run.rates(measure).get(key)) for run in runs]
            rows.append([title if number == 0 else "", label, *cells])
    parts += ["## All rates", _table(rows), text.TABLE_NOTE]
    if summary["methods"]:
        parts += [f"## {text.METHODS_TITLE}", text.SEEDS_NOTE]
        parts += [_table(_by_method(summary["methods"]))]
    if defended := summary["defences"]:
        first, *others = defences.grid(defended)
        parts += [f"## {defences.TITLE}", defences.NOTE, _table([first, ["-"] * len(first), *others])]
        parts += ["\n".join(f"- {_inert(line)}" for line in defences.descriptions(defended))]
    if by_judge := _by_judge(runs):
        parts += [f"## {judges.TITLE}", judges.note(runs)]
        parts += ["\n".join(f"- {_inert(line)}" for line in judges.descriptions(runs)), by_judge]
    if errors := judges.errors(runs):
        head = ["", "", *judges.FIGURES]
        lines = [[own.run.name, own.label, *map(_figure, own.figures)] for own in errors]
        parts += ["## Each judge's errors", _table([head, ["-"] * len(head), *lines]), text.ERRORS_NOTE]
    if summary["comparisons"]:
        head = ["first → second", "measure", "difference, points", "95 %", "n", "p, corrected"]
        parts += ["## Pairs of models", _table([head, ["-"] * len(head), *map(_pair, summary["comparisons"])])]
        parts += [text.PAIRS_NOTE]
    if fitted := summary.get("universal"):
        parts += [f"## {perturbed.TITLE}", _by_model(list(fitted), perturbed.rows(fitted)), perturbed.NOTE]
    if measured := summary.get("forgetting"):
        parts += [f"## {forgetting.TITLE}", _by_model(list(measured), forgetting.rows(measured))]
        parts += [_inert(forgetting.note(measured))]
    parts += ["## How to read these numbers", "\n".join(f"- {point}" for point in text.caveats(runs))]
    return "\n\n".join(parts) + "\n"


def _by_model(models: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table with a column for each model. rows: title and cells."""
    return _table([["", *models], ["-"] * (1 + len(models)), *([title, *cells] for title, cells in rows)])


def _by_method(methods: Mapping[str, Method]) -> list[list[str]]:
    head = ["", "", *(f"{name} ({len(own['seeds'])} seeds)" for name, own in methods.items())]
    lines = [head, ["-"] * len(head)]
    for measure, condition in spreads(methods):
        own = [method["rates"].get(measure, {}).get(condition) for method in methods.values()]
        lines.append([text.meaning(measure)[0], row_label(measure, condition), *map(_spread, own)])
    return lines


def spreads(methods: Mapping[str, Method]) -> list[tuple[str, str]]:
    """(measure, condition) of every rate that a method has."""
    places = ((m, key) for own in methods.values() for m, by_key in own["rates"].items() for key in by_key)
    return list(dict.fromkeys(places))


def _spread(own: Spread | None) -> str:
    if own is None:
        return "–"
    values = (100 * value for value in (own["mean"], own["lowest"], own["highest"], *own["ci95"]))
    return "{:.1f} ({:.1f} to {:.1f}; {:.1f}–{:.1f})".format(*values)


def csv_of_methods(methods: Mapping[str, Method]) -> str:
    """One line for each rate of each method. No cell is a formula."""
    buffer = io.StringIO()
    sheet = csv.writer(buffer, lineterminator="\n")
    sheet.writerow(("method", "seeds", "measure", "condition", "mean", "lowest", "highest", "low", "high", "rates"))
    for name, own in methods.items():
        seeds = " ".join(map(str, own["seeds"]))
        for measure, by_condition in own["rates"].items():
            for condition, rate in by_condition.items():
                values = (
                    rate["mean"],
                    rate["lowest"],
                    rate["highest"],
                    *rate["ci95"],
                    " ".join(map(str, rate["rates"])),
                )
                sheet.writerow((*map(_no_formula, (name, seeds, measure, condition)), *values))
    return buffer.getvalue()


def _by_judge(runs: Sequence[Run]) -> str:
    """The rates by every judge and, with human labels, corrected; empty where one judge judged and nobody labelled."""
    lines = [["", "judge", *(run.name for run in runs)], ["-"] * (2 + len(runs))]
    for row in judges.rows(runs):
        for number, judge in enumerate(row.judges):
            own = [row.of(run, judge) for run in runs]
            cells = [" ".join(filter(None, (_cell(o.leaf), judges.correction(o.corrected)))) if o else "–" for o in own]
            lines.append([f"{text.MEASURES[row.measure][0]}, {row.label}" if number == 0 else "", judge, *cells])
    return _table(lines) if len(lines) > 2 else ""


def _cell(leaf: Leaf | None) -> str:
    if leaf is None:
        return "–"
    low, high = (100 * bound for bound in leaf["ci95"])
    return f"{100 * leaf['rate']:.1f} ({leaf['k']}/{leaf['n']}; {low:.1f}–{high:.1f})"


def _figure(figure: tuple[str, str]) -> str:
    value, counts = figure
    return f"{value} ({counts})" if value and counts else value or counts


def _pair(pair: Comparison) -> list[str]:
    low, high = (100 * bound for bound in pair["ci95"])
    measure = f"{text.MEASURES[pair['measure']][0]}, {Condition.parse(pair['condition']).label}"
    change = f"{100 * pair['difference']:+.1f}"
    return [" → ".join(pair["runs"]), measure, change, f"{low:+.1f} to {high:+.1f}", str(pair["n"]),
            text.p_value(pair["p_holm"])]  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(map(_inert, row)) + " |" for row in rows)


def _inert(cell: str) -> str:
    """Escape what Markdown would interpret."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", cell.replace("\n", " "))


def csv_of_rates(runs: Sequence[Run]) -> str:
    """One line for each rate of each set under each judge. No cell is a formula."""
    buffer = io.StringIO()
    sheet = csv.writer(buffer, lineterminator="\n")
    columns = ("model", "suite", "judge", "set", "measure", "condition", "rate", "k", "n", "low", "high")
    sheet.writerow((*columns, "corrected", "corrected_low", "corrected_high"))
    for run in runs:
        for judge, judged in run.metrics["judges"].items():
            for own, measures in judged["sets"].items():
                corrections = judged.get("corrected", {}).get(own, {})
                for measure, condition, leaf in _leaves(measures):
                    made = corrections.get(measure, {}).get(condition)
                    corrected = (made["rate"], *(made["ci95"] or ("", ""))) if made else ("", "", "")
                    values = (leaf["rate"], leaf["k"], leaf["n"], *leaf["ci95"], *corrected)
                    place = map(_no_formula, (run.name, run.suite, judge, own, measure, condition))
                    sheet.writerow((*place, *values))
    return buffer.getvalue()


def _leaves(measures: Measures) -> Iterator[tuple[str, str, Leaf]]:
    """(measure, condition, rate) of every rate of a set."""
    for measure in measures:
        yield from ((measure, key, leaf) for key, leaf in rates(measures, measure).items() if leaf)


def _no_formula(cell: str) -> str:
    return f"'{cell}" if cell.startswith(tuple(FORMULA)) else cell
