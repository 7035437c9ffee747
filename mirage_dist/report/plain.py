"""The report as plain text: Markdown, CSV, and the table for a terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

from mirage_dist.evals.results import CLEAN, Condition, Leaf, Measures, of_set
from mirage_dist.report import defences, judges, text
from mirage_dist.report.compare import Comparison
from mirage_dist.report.load import HELD_OUT, Run, rates, row_label
from mirage_dist.report.summary import Summary

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
    parts += ["## How to read these numbers", "\n".join(f"- {point}" for point in text.caveats(runs))]
    return "\n\n".join(parts) + "\n"


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


def table(summary: Summary) -> str:
    """The main table for a terminal: a row for each measure and condition, a column for each model: `percent k/n`.

    The report's problems come first, and what its rates must not be taken for; defences beside none come last.
    """
    models = summary["models"]
    lines = [("", "", *models)]
    held_out = of_set("asr", HELD_OUT)
    for measure in (name for own in text.MEASURES for name in ((own, held_out) if own == "asr" else (own,))):
        title, _ = text.meaning(measure)
        own = [rates(entry, measure) for entry in models.values()]
        keys = dict.fromkeys([str(CLEAN)] if measure == "locality" else [key for by_key in own for key in by_key])
        for row, key in enumerate(keys):
            leaves = [by_key.get(key) for by_key in own]
            cells = [f"{100 * x['rate']:5.1f} {x['k']}/{x['n']}" if x else "    –" for x in leaves]
            lines.append(("" if row else title, row_label(measure, key), *cells))
    blocks = [*summary["problems"], *summary["cautions"], _aligned(lines)]
    if defended := summary["defences"]:
        blocks += ["", f"{defences.TITLE}: rate, counts, difference in points (95 %), p corrected"]
        blocks += [_aligned(defences.grid(defended)), *defences.descriptions(defended)]
    return "\n".join(blocks)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(rows)
