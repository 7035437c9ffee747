r"""The main table as LaTeX: a `table` with `booktabs` rules, to be put into a paper with \input.

Needs \usepackage{booktabs}. Every text of the report is escaped: names and labels are never interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mirage_dist.evals.results import CLEAN, Condition, Leaf
from mirage_dist.report import tables
from mirage_dist.report.load import Run
from mirage_dist.report.methods import Method, Spread, folded
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


def table(runs: Sequence[Run], summary: Summary) -> str:
    """One row for each model or method, one column for each measure, clean and attacked.

    A cell is the rate in percent with its 95 % interval over questions; of a method the mean over seeds with the lowest
    and the highest.
    """
    columns = list(_columns(runs))
    names = folded(list(summary["models"]), summary["methods"])
    own = {run.name: run for run in runs}
    lines = [
        "% made by mirage report; needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape(_caption(summary))}}}",
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        "\\toprule",
        " & ".join(["Model", *(escape(title) for title, *_ in columns)]) + r" \\",
        "\\midrule",
    ]
    for name in names:
        method = summary["methods"].get(name)
        cells = (
            _leaf(own[name].rates(measure).get(str(condition))) if method is None else _of(method, measure, condition)
            for _, measure, condition in columns
        )
        seeds = f", {len(method['seeds'])} seeds" if method else ""
        lines.append(" & ".join([escape(name + seeds), *cells]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"


def _columns(runs: Sequence[Run]) -> Iterator[tuple[str, str, Condition | str]]:
    """Title, measure and condition, of those that a run has."""
    for title, measure, kind in tables.MAIN:
        short = title.removesuffix(", clean → attacked")
        conditions = [CLEAN, *(c for run in runs if kind and (c := run.attacked(kind)) is not None)]
        for condition in dict.fromkeys(conditions):
            if any(run.rates(measure).get(str(condition)) for run in runs):
                yield f"{short}, {condition.label}", measure, condition
    for benchmark in dict.fromkeys(name for run in runs for name in run.rates("accuracy")):
        yield f"Accuracy, {benchmark}", "accuracy", benchmark


def _caption(summary: Summary) -> str:
    words = f"Suite {summary['suite']}: rates in percent with 95 % intervals over questions."
    if summary["methods"]:
        words += " Of several seeds: the mean over seeds, with the lowest and the highest."
    return " ".join([words, *summary["cautions"], *summary["problems"]])


def _leaf(leaf: Leaf | None) -> str:
    if leaf is None:
        return "--"
    low, high = (100 * bound for bound in leaf["ci95"])
    return f"{100 * leaf['rate']:.1f} ({low:.1f}--{high:.1f})"


def _of(method: Method, measure: str, condition: Condition | str) -> str:
    own: Spread | None = method["rates"].get(measure, {}).get(str(condition))
    if own is None:
        return "--"
    return f"{100 * own['mean']:.1f} ({100 * own['lowest']:.1f}--{100 * own['highest']:.1f})"
