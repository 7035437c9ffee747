r"""The main table as LaTeX: a `table` with `booktabs` rules, to be put into a paper with \input.

Needs \usepackage{booktabs}. Every text of the report is escaped: names and labels are never interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from mirage_dist.evals.results import CLEAN
from mirage_dist.report import tables
from mirage_dist.report.load import Run
from mirage_dist.report.methods import Method, folded
from mirage_dist.report.summary import Summary

FILE = "table.tex"
SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",  # behind the end of a row it would begin an option, and a star would be one
    "]": "{]}",
    "*": "{*}",
    "`": r"\textasciigrave{}",
    "–": "--",
    "—": "---",
    "→": r"$\rightarrow$",
    "“": "``",
    "”": "''",
    "…": r"\dots{}",
    "\N{NO-BREAK SPACE}": "~",
}


def escape(text: str) -> str:
    """Text that LaTeX sets as it is. A letter that pdfLaTeX has no command for is left to the document's encoding."""
    letters = "".join(SPECIAL.get(letter, letter) for letter in re.sub(r"\s+", " ", text.replace("--", "-\0-")))
    return letters.replace("\0", "{}")  # two hyphens would become a dash


@dataclass(frozen=True)
class _Column:
    """One rate. title: of the group of columns that it is in. label: its own."""

    title: str
    label: str
    measure: str
    condition: str


def table(runs: Sequence[Run], summary: Summary) -> str:
    """Two lines for each model or method, one column for each measure and condition, clean and attacked.

    The first line has the rate in percent, the second its 95 % interval over questions; of a method they have the mean
    over seeds, and the lowest and the highest.
    """
    columns = list(_columns(runs))
    own = {run.name: run for run in runs}
    lines = [
        "% made by mirage report; needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape(_caption(summary))}}}",
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        "\\toprule",
        *_head(columns),
        "\\midrule",
    ]
    for name in folded(list(summary["models"]), summary["methods"]):
        method = summary["methods"].get(name)
        cells = [_leaf(own[name], column) if method is None else _of(method, column) for column in columns]
        seeds = f", {len(method['seeds'])} seeds" if method else ""
        lines += [_row([escape(name + seeds), *(rate for rate, _ in cells)]), _row(["", *(span for _, span in cells)])]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _head(columns: Sequence[_Column]) -> Iterator[str]:
    """Titles over their columns, a rule below each, and the columns' labels."""
    groups = [(title, len(list(own))) for title, own in groupby(columns, key=lambda column: column.title)]
    yield _row(["", *(f"\\multicolumn{{{width}}}{{c}}{{{escape(title)}}}" for title, width in groups)])
    first = 2  # the models' names are in column 1
    for _, width in groups:
        yield f"\\cmidrule(lr){{{first}-{first + width - 1}}}"
        first += width
    yield _row(["Model", *(escape(column.label) for column in columns)])


def _columns(runs: Sequence[Run]) -> Iterator[_Column]:
    """Those that a run has."""
    for long, measure, kind in tables.MAIN:
        title = long.removesuffix(", clean → attacked").removesuffix(" to the same")
        conditions = [CLEAN, *(c for run in runs if kind and (c := run.attacked(kind)) is not None)]
        for condition in dict.fromkeys(conditions):
            if any(run.rates(measure).get(str(condition)) for run in runs):
                yield _Column(title, condition.label, measure, str(condition))
    for benchmark in dict.fromkeys(name for run in runs for name in run.rates("accuracy")):
        yield _Column("Accuracy", benchmark, "accuracy", benchmark)


def _caption(summary: Summary) -> str:
    words = f"Suite {summary['suite']}: rates in percent with 95 % intervals over questions."
    if summary["methods"]:
        words += " Of several seeds: the mean over seeds, with the lowest and the highest."
    return " ".join([words, *summary["cautions"], *summary["problems"]])


def _leaf(run: Run, column: _Column) -> tuple[str, str]:
    leaf = run.rates(column.measure).get(column.condition)
    return ("--", "") if leaf is None else (f"{100 * leaf['rate']:.1f}", _interval(*leaf["ci95"]))


def _of(method: Method, column: _Column) -> tuple[str, str]:
    own = method["rates"].get(column.measure, {}).get(column.condition)
    return ("--", "") if own is None else (f"{100 * own['mean']:.1f}", _interval(own["lowest"], own["highest"]))


def _interval(low: float, high: float) -> str:
    return f"{{\\footnotesize ({100 * low:.1f}--{100 * high:.1f})}}"
