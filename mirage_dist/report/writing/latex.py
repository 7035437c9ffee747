r"""The main table as LaTeX: a `table` with `booktabs` rules, to be put into a paper with \input.

Needs \usepackage{booktabs}. Every text of the report is escaped: names and labels are never interpreted. It is as wide
as the text: columns that do not fit beside each other stand below each other, and in tables of their own where one page
has no room for all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from mirage_dist.evals.results import CLEAN
from mirage_dist.report import tables
from mirage_dist.report.load import Run
from mirage_dist.report.methods import Method, folded
from mirage_dist.report.summary import Summary

FILE = "table.tex"
# Rates side by side, and lines below each other: LaTeX's article has 345 pt for rates and names, and 550 pt of height.
BESIDE, BELOW, HEAD = 5, 44, 4  # of these lines, those of a table's head
ACROSS = 80  # letters of a line of the caption
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
    own = {run.name: run for run in runs}
    shown = {
        name: name if (method := summary["methods"].get(name)) is None else f"{name}, {len(method['seeds'])} seeds"
        for name in folded(list(summary["models"]), summary["methods"])
    }
    room = BELOW - math.ceil(len(_caption(summary)) / ACROSS)
    parts, pages = _beside(list(_columns(runs))), _below(shown, room)
    blocks = [(columns, names) for columns in parts for names in pages]
    together = max(1, room // (HEAD + sum(_height(shown[name]) for name in pages[0]))) if len(pages) == 1 else 1
    tables = [blocks[start : start + together] for start in range(0, len(blocks), together)]
    lines = ["% made by mirage report; needs \\usepackage{booktabs}"]
    for number, own_blocks in enumerate(tables, 1):
        count = f" Table {number} of {len(tables)}." if len(tables) > 1 else ""
        lines += ["\\begin{table}", "\\centering", "\\small", "\\setlength{\\tabcolsep}{2pt}"]
        lines += [f"\\caption{{{escape(_caption(summary) + count)}}}"]
        for place, (columns, names) in enumerate(own_blocks):
            widths = f"p{{0.2\\linewidth}}@{{\\extracolsep{{\\fill}}}}{'r' * len(columns)}"
            lines += ["", "\\medskip"] if place else []
            lines += [f"\\begin{{tabular*}}{{\\linewidth}}{{{widths}}}", "\\toprule", *_head(columns), "\\midrule"]
            for name in names:
                lines += _lines(shown[name], columns, own.get(name), summary["methods"].get(name))
            lines += ["\\bottomrule", "\\end{tabular*}"]
        lines.append("\\end{table}")
    return "\n".join(lines) + "\n"


def _height(name: str) -> int:
    """Lines that a model needs, whose name has 0.2 of the width."""
    return max(2, 1 + math.ceil(len(name) / 12))


def _below(shown: Mapping[str, str], room: int) -> list[list[str]]:
    """Names in order, as many together as have room on a page. shown: name -> the text that is set."""
    pages: list[list[str]] = [[]]
    for name in shown:
        if pages[-1] and HEAD + sum(_height(shown[own]) for own in [*pages[-1], name]) > room:
            pages.append([])
        pages[-1].append(name)
    return pages


def _lines(shown: str, columns: Sequence[_Column], run: Run | None, method: Method | None) -> Iterator[str]:
    """The two lines of a model or, with several seeds, of a method."""
    cells = [_of(method, column) if method is not None else _leaf(run, column) for column in columns]
    yield _row([f"\\raggedright {_breakable(shown)}", *(rate for rate, _ in cells)])
    yield _row(["", *(span for _, span in cells)])


def _beside(columns: Sequence[_Column]) -> list[list[_Column]]:
    """Columns in order, at most BESIDE together, each title's together where they fit."""
    parts: list[list[_Column]] = []
    for _, group in groupby(columns, key=lambda column: column.title):
        own = list(group)
        if not parts or len(parts[-1]) + len(own) > BESIDE:
            parts.append([])
        for column in own:
            if len(parts[-1]) == BESIDE:
                parts.append([])
            parts[-1].append(column)
    return parts


def _breakable(name: str) -> str:
    """A name that LaTeX may break behind its hyphens, dots and underscores."""
    return re.sub(r"(\\_|-\{\}-|[-.])(?=\w)", r"\1\\allowbreak{}", escape(name))


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
    yield _row(["Model", *(f"\\footnotesize {escape(column.label)}" for column in columns)])


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


def _leaf(run: Run | None, column: _Column) -> tuple[str, str]:
    leaf = None if run is None else run.rates(column.measure).get(column.condition)
    return ("--", "") if leaf is None else (f"{100 * leaf['rate']:.1f}", _interval(*leaf["ci95"]))


def _of(method: Method, column: _Column) -> tuple[str, str]:
    own = method["rates"].get(column.measure, {}).get(column.condition)
    return ("--", "") if own is None else (f"{100 * own['mean']:.1f}", _interval(own["lowest"], own["highest"]))


def _interval(low: float, high: float) -> str:
    return f"{{\\scriptsize ({100 * low:.1f}--{100 * high:.1f})}}"
