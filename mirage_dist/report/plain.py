"""The report in plain text: Markdown, CSV, and the table that a terminal shows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mirage_dist.report import text
from mirage_dist.report.load import Leaf, Run, condition_label

FORMULA = "=+-@\t\r"  # what a spreadsheet takes for a formula at the beginning of a cell (OWASP, CSV injection)


def markdown(runs: Sequence[Run], summary: Mapping[str, Any]) -> str:
    """The table of all rates, the paired tests, and how to read them."""
    parts = [f"# {text.TITLE}", text.lede(runs), text.facts(runs), *(f"**{w}**" for w in text.warnings(runs))]
    rows = [["", "", *(run.name for run in runs)], ["-"] * (2 + len(runs))]
    for title, _, conditions in text.measures(runs):
        for number, (label, measure, condition) in enumerate(conditions):
            cells = [_cell(run.leaf(measure, condition)) for run in runs]
            rows.append([title if number == 0 else "", label, *cells])
    parts += ["## All rates", _table(rows), text.TABLE_NOTE]
    if summary["comparisons"]:
        head = ["first → second", "measure", "difference, points", "95 %", "n", "p, corrected"]
        parts += ["## Pairs of models", _table([head, ["-"] * len(head), *map(_pair, summary["comparisons"])])]
        parts += [text.PAIRS_NOTE]
    parts += ["## How to read these numbers", "\n".join(f"- {point}" for point in text.caveats(runs))]
    return "\n\n".join(parts) + "\n"


def _cell(leaf: Leaf | None) -> str:
    if leaf is None:
        return "–"
    low, high = (100 * bound for bound in leaf["ci95"])
    return f"{100 * leaf['rate']:.1f} ({leaf['k']}/{leaf['n']}; {low:.1f}–{high:.1f})"


def _pair(found: Mapping[str, Any]) -> list[str]:
    low, high = (100 * bound for bound in found["ci95"])
    measure = f"{text.MEASURES[found['measure']][0]}, {condition_label(found['condition'])}"
    change = f"{100 * found['difference']:+.1f}"
    return [" → ".join(found["runs"]), measure, change, f"{low:+.1f} to {high:+.1f}", str(found["n"]),
            text.p_value(found["p_holm"])]  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(map(_inert, row)) + " |" for row in rows)


def _inert(said: str) -> str:
    """Names stand for themselves in Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", said.replace("\n", " "))


def csv_of_rates(runs: Sequence[Run]) -> str:
    """A line a rate, under every judge and of every set; no cell is a formula."""
    buffer = io.StringIO()
    sheet = csv.writer(buffer, lineterminator="\n")
    sheet.writerow(("model", "suite", "judge", "set", "measure", "condition", "rate", "k", "n", "low", "high"))
    for run in runs:
        for judge, judged in run.metrics["judges"].items():
            for own, measures in judged["sets"].items():
                for measure, condition, leaf in _leaves(measures):
                    values = (leaf["rate"], leaf["k"], leaf["n"], *leaf["ci95"])
                    place = map(_no_formula, (run.name, run.suite, judge, own, measure, condition))
                    sheet.writerow((*place, *values))
    return buffer.getvalue()


def _leaves(measures: Mapping[str, Any]) -> Iterator[tuple[str, str, Leaf]]:
    for measure, found in measures.items():
        if found is not None and "rate" in found:
            yield measure, "clean", found
        else:
            yield from ((measure, name, leaf) for name, leaf in (found or {}).items() if leaf)


def _no_formula(cell: str) -> str:
    return f"'{cell}" if cell.startswith(tuple(FORMULA)) else cell


def print_table(summary: Mapping[str, Any]) -> str:
    """Print the main table, measures down and models across, as `percent k/n`; returns the text."""
    models: Mapping[str, Any] = summary["models"]
    lines = [("", "", *models)]
    for measure, (title, _) in text.MEASURES.items():
        if measure == "locality":
            rows = [("clean", [entry.get(measure) for entry in models.values()])]
        else:
            names = dict.fromkeys(c for entry in models.values() for c in entry.get(measure) or {})
            rows = [(c, [(entry.get(measure) or {}).get(c) for entry in models.values()]) for c in names]
        for row, (condition, leaves) in enumerate(rows):
            cells = [f"{100 * x['rate']:5.1f} {x['k']}/{x['n']}" if x else "    –" for x in leaves]
            lines.append(("" if row else title, condition_label(condition), *cells))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    print(table, flush=True)
    return table
