"""The main table for a terminal: as many models beside each other as fit, and the rest below."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mirage_dist.evals.results import CLEAN, Leaf, of_set
from mirage_dist.report import defences, text
from mirage_dist.report.compare import Defended
from mirage_dist.report.load import HELD_OUT, rates, row_label
from mirage_dist.report.methods import Spread, folded
from mirage_dist.report.summary import Summary
from mirage_dist.report.writing import forgetting, perturbed

WIDTH, GAP = 100, "  "
LONGEST = {"title": 24, "label": 22, "model": 20}  # columns of text; what is longer continues on a line below
OF_DEFENCES = (15, 14, 16, 14, 33)  # columns of text of model, defence, rate's name, rate and difference
SEEDS = "of several seeds: mean (lowest–highest); their interval is in report.md"


@dataclass(frozen=True)
class _Row:
    """One rate of all models. title: of the measure, where its first row is."""

    title: str
    label: str
    cells: list[str]


def table(summary: Summary) -> str:
    """A row for each measure and condition, a column for each model: `percent k/n`; and of seeds of one method one
    column, `mean (lowest–highest)`. No line of it has more than WIDTH columns, however many models there are.

    The report's problems come first, and what its rates must not be taken for; defences beside none, and tests of
    erasure, come last.
    """
    columns = folded(list(summary["models"]), summary["methods"])
    rows = list(_rows(summary, columns))
    heads = [_heading(name, summary) for name in columns]
    lines = [*summary["problems"], *summary["cautions"]]
    for start, end in _blocks(rows, heads):
        lines += [""] if start else []
        lines += _block(rows, heads, start, end)
    lines += [SEEDS] if summary["methods"] else []
    return "\n".join([*lines, *_defences(summary["defences"]), *_erasure(summary)])


def _erasure(summary: Summary) -> Iterator[str]:
    """Tests of erasure whose results are tables, of the models for which they were made."""
    if fitted := summary.get("universal"):
        yield from ("", f"{perturbed.TITLE} (`mirage erasure`; ASR, 95 %)")
        yield from _grouped(perturbed.groups(fitted), list(fitted))
    if measured := summary.get("forgetting"):
        yield from ("", f"{forgetting.TITLE} (`mirage erasure`; 95 %)")
        yield from textwrap.wrap(forgetting.caution(measured), WIDTH)
        yield from _grouped(forgetting.groups(measured), list(measured))


def _grouped(groups: Sequence[tuple[str, str, list[str]]], heads: Sequence[str]) -> Iterator[str]:
    """Rows of a title, a label and a cell for each model; a title stands at its first row."""
    titles, rows = set[str](), []
    for title, label, cells in groups:
        rows.append(_Row("" if title in titles else title, label, cells))
        titles.add(title)
    for start, end in _blocks(rows, heads):
        yield from [""] if start else []
        yield from _block(rows, heads, start, end)


def _defences(defended: Sequence[Defended]) -> Iterator[str]:
    """A row for each model, defence and rate: the rate, and how it differs from that without a defence."""
    if not defended:
        return
    yield from ("", f"{defences.TITLE}: rate, counts, difference in points (95 %), p corrected")
    columns, rows = defences.columns(defended), list[list[str]]()
    if not columns:
        yield "The suite measures neither attack success nor needless refusals, so there is nothing to compare."
        return
    for model, name, cells in defences.lines(defended):
        for column in columns:
            rate, counts, change = defences.cell(cells.get(column))
            rows.append([model, name, defences.head(column), f"{rate} {counts}".rstrip(), change])
    widths = [min(max(len(row[i]) for row in rows), most) for i, most in enumerate(OF_DEFENCES)]
    for row in rows:
        yield from _lines(row, widths)
    for sentence in defences.descriptions(defended):
        yield from textwrap.wrap(sentence, WIDTH)


def _heading(name: str, summary: Summary) -> str:
    method = summary["methods"].get(name)
    return name if method is None else f"{name} ({len(method['seeds'])} seeds)"


def _rows(summary: Summary, columns: Sequence[str]) -> Iterator[_Row]:
    models, held_out = summary["models"], of_set("asr", HELD_OUT)
    for measure in (name for own in text.MEASURES for name in ((own, held_out) if own == "asr" else (own,))):
        title, _ = text.meaning(measure)
        own = [rates(entry, measure) for entry in models.values()]
        keys = dict.fromkeys([str(CLEAN)] if measure == "locality" else [key for by_key in own for key in by_key])
        for row, key in enumerate(keys):
            cells = [_cell(summary, name, measure, key) for name in columns]
            yield _Row("" if row else title, row_label(measure, key), cells)


def _cell(summary: Summary, name: str, measure: str, key: str) -> str:
    method = summary["methods"].get(name)
    if method is not None:
        return _spread(method["rates"].get(measure, {}).get(key))
    return _leaf(rates(summary["models"][name], measure).get(key))


def _leaf(leaf: Leaf | None) -> str:
    return f"{100 * leaf['rate']:5.1f} {leaf['k']}/{leaf['n']}" if leaf else "    –"


def _spread(own: Spread | None) -> str:
    if own is None:
        return "    –"
    return f"{100 * own['mean']:5.1f} ({100 * own['lowest']:.1f}–{100 * own['highest']:.1f})"


def _blocks(rows: Sequence[_Row], heads: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of models that fit beside each other; at least one in each."""
    left = sum(_left(rows)) + len(GAP)
    start, used = 0, left
    for number in range(len(heads)):
        width = len(GAP) + _width(rows, heads, number)
        if number > start and used + width > WIDTH:
            yield start, number
            start, used = number, left
        used += width
    yield start, len(heads)


def _left(rows: Sequence[_Row]) -> tuple[int, int]:
    """Widths of the columns of titles and labels."""
    titles = [min(len(row.title), LONGEST["title"]) for row in rows]
    return max(titles, default=0), max((min(len(row.label), LONGEST["label"]) for row in rows), default=0)


def _width(rows: Sequence[_Row], heads: Sequence[str], number: int) -> int:
    return max(min(len(heads[number]), LONGEST["model"]), *(len(row.cells[number]) for row in rows), 1)


def _block(rows: Sequence[_Row], heads: Sequence[str], start: int, end: int) -> Iterator[str]:
    widths = [*_left(rows), *(_width(rows, heads, number) for number in range(start, end))]
    yield from _lines(["", "", *heads[start:end]], widths)
    for row in rows:
        yield from _lines([row.title, row.label, *row.cells[start:end]], widths)


def _lines(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """The lines of one row: a cell that is longer than its column goes on below."""
    parts = [_folded(cell, width) for cell, width in zip(cells, widths, strict=True)]
    for number in range(max(map(len, parts))):
        line = (own[number] if number < len(own) else "" for own in parts)
        yield GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _folded(cell: str, width: int) -> list[str]:
    """A cell's lines, cut at blanks and hyphens where there are some, and otherwise where the column ends."""
    return [cell] if len(cell) <= width else textwrap.wrap(cell, width)
