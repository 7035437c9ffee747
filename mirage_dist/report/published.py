"""A published table beside ours: every figure with its interval, and whether the published one lies within it.

`results.json` is this table as data, in a form that another lab's can be put beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from mirage_dist.evals import results
from mirage_dist.evals.results import Leaf
from mirage_dist.report import tables
from mirage_dist.report.load import rates
from mirage_dist.schema import ConfigError, documents

TABLES = Path(__file__).with_name("published.json")
FORMAT = 1  # of results.json
FILE = "results.json"
SCORE = "benchmark"  # the judge of utility suites: a score, and nobody's opinion


class Column(TypedDict):
    """title: of the column. suite, measure, condition: where its figure is in metrics.json.

    differs: why the published figure is of something else than ours; then no verdict is given.
    """

    title: str
    suite: str
    measure: str
    condition: str
    differs: NotRequired[str]


class Published(TypedDict):
    """A published table. values: model -> column -> percent."""

    source: str
    judge: str
    columns: dict[str, Column]
    values: dict[str, dict[str, float]]


class Figure(TypedDict):
    """One figure of one judge. published: percent. rate, ci95: shares from 0 to 1; k of n.

    verdict: whether the published figure lies within the interval of ours; None without one of the two.
    """

    model: str
    column: str
    judge: str
    published: float | None
    rate: float | None
    ci95: list[float] | None
    k: float | None
    n: int | None
    verdict: Literal["within", "outside"] | None


class Results(TypedDict):
    """results.json. columns: key -> title. notes: what a reader must know. config_hash: of the chain's recipes."""

    format: int
    source: str
    judge: str
    columns: dict[str, str]
    notes: list[str]
    models: list[str]
    config_hash: str
    figures: list[Figure]


@cache
def known() -> dict[str, Published]:
    """The published tables by name."""
    return documents.read_json(TABLES)


def table(name: str) -> Published:
    """A published table. Raises ConfigError for an unknown name."""
    if name not in known():
        raise ConfigError(f"published={name}: no published table of this name; there are {', '.join(known())}")
    return known()[name]


def compute(name: str, runs: Mapping[str, Path], config_hash: str, differs: str | None = None) -> Results:
    """Put our figures beside a published table's. runs: model -> run directory, in the table's order.

    differs: why none of the figures can be compared; then no verdict is given, and the notes begin with it.
    A suite that a run was not asked leaves its figures without a rate. Raises RunError for damaged rates.
    """
    published = table(name)
    return {
        "format": FORMAT,
        "source": published["source"],
        "judge": published["judge"],
        "columns": {key: column["title"] for key, column in published["columns"].items()},
        "notes": [
            *([differs] if differs else []),
            *(f"{c['title']}: {c['differs']}" for c in published["columns"].values() if "differs" in c),
        ],
        "models": list(runs),
        "config_hash": config_hash,
        "figures": [
            figure
            for model, run in runs.items()
            for key, column in published["columns"].items()
            for figure in _figures(model, key, column, run, published["values"].get(model, {}).get(key), differs)
        ],
    }


def _figures(
    model: str, key: str, column: Column, run: Path, published: float | None, differs: str | None
) -> Iterator[Figure]:
    folder = run / "evals" / column["suite"]
    measured = results.read(folder) if (folder / "metrics.json").is_file() else None
    leaves: dict[str, Leaf] = {}
    if measured is not None:
        judges = sorted(measured["judges"], key=lambda judge: judge != measured["headline"])
        # A benchmark's own score is no judge's opinion: every judge's entry repeats it.
        for judge in judges[:1] if column["measure"] == "accuracy" else judges:
            leaf = rates(measured["judges"][judge]["entry"], column["measure"]).get(column["condition"])
            if leaf is not None:
                leaves[judge] = leaf
    if not leaves:
        yield figure(model, key, "", published, None)
    for judge, leaf in leaves.items():
        yield figure(model, key, judge, published, leaf, differs is None and "differs" not in column)


def figure(
    model: str, key: str, judge: str, published: float | None, leaf: Leaf | None, comparable: bool = True
) -> Figure:
    """One judge's figure. comparable: whether the published one is of the same kind."""
    verdict: Literal["within", "outside"] | None = None
    if leaf is not None and published is not None and comparable:
        low, high = leaf["ci95"]
        verdict = "within" if low <= published / 100 <= high else "outside"
    return {
        "model": model,
        "column": key,
        "judge": judge,
        "published": published,
        "rate": None if leaf is None else leaf["rate"],
        "ci95": None if leaf is None else list(leaf["ci95"]),
        "k": None if leaf is None else leaf["k"],
        "n": None if leaf is None else leaf["n"],
        "verdict": verdict,
    }


def dumped(own: Results) -> str:
    """The content of results.json."""
    return json.dumps(own, indent=1) + "\n"


def read(file: Path) -> Results:
    """A results.json. Raises ConfigError for another file, and for one of another format version."""
    value = documents.read_json(file)
    if not isinstance(value, dict) or not isinstance(value.get("figures"), list):
        raise ConfigError(f"{file}: no {FILE} of `mirage paper`: expected an object with a list of figures")
    if value.get("format") != FORMAT:
        raise ConfigError(
            f"{file}: format {value.get('format')!r}, this version reads format {FORMAT}; make it again with "
            "`mirage paper --report`, or compare with the version that wrote it"
        )
    if not _well_formed(value):
        raise ConfigError(f"{file}: is not as `mirage paper` writes it; make it again with `mirage paper --report`")
    return cast(Results, value)


def _well_formed(value: dict[str, Any]) -> bool:
    """Whether every key that is read is there, with a value of its type."""
    number, texts = (int, float, type(None)), ("model", "column", "judge")
    columns, figures = value.get("columns"), value["figures"]
    return (
        isinstance(value.get("source"), str)
        and isinstance(columns, dict)
        and all(isinstance(title, str) for title in columns.values())
        and all(isinstance(value.get(name), list) and _all(value[name], str) for name in ("models", "notes"))
        and _all(figures, dict)
        and all(isinstance(f.get(name), str) for f in figures for name in texts)
        and all(f["column"] in columns and f["model"] in value["models"] for f in figures)
        and all(isinstance(f.get(name, ""), number) for f in figures for name in ("published", "rate"))
        and all(f.get("verdict", "") in ("within", "outside", None) for f in figures)
        and all(f.get("ci95", "") is None or _interval(f.get("ci95")) for f in figures)
    )


def _all(values: Sequence[Any], kind: type) -> bool:
    return all(isinstance(one, kind) for one in values)


def _interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(bound, (int, float)) for bound in value)


def missing(own: Results) -> list[str]:
    """`MODEL: SUITE's column` of every figure that was not measured."""
    return [f"{f['model']}: {own['columns'][f['column']]}" for f in own["figures"] if f["rate"] is None]


# -------------------------------------------------------------------------------------------------- as text


def text(own: Results) -> str:
    """A table for the terminal, of less than 100 columns: a line for each model, figure and judge."""
    rows = [["model", "figure", "judge", "published", "ours, with its 95 % interval"]]
    for model, _, figures in _rows(own):
        for figure in figures.values():
            rows.append([model, own["columns"][figure["column"]], figure["judge"] or "-", *_cells(figure)])
    return "\n".join([own["source"], *_aligned(rows), *own["notes"]])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _rows(own: Results) -> Iterator[tuple[str, str, dict[str, Figure]]]:
    """(model, judge, column -> figure), judges in the order in which a model's figures have them.

    The first row of a model also has what no judge decides.
    """
    pairs = dict.fromkeys((f["model"], f["judge"]) for f in own["figures"] if f["judge"] not in ("", SCORE))
    for model in own["models"]:
        for row, judge in enumerate([j for m, j in pairs if m == model] or [""]):
            judges = (judge,) if row else (judge, "", SCORE)
            figures = [f for f in own["figures"] if f["model"] == model and f["judge"] in judges]
            yield model, judge, {key: f for key in own["columns"] for f in figures if f["column"] == key}


def _cells(figure: Figure) -> list[str]:
    published = "-" if figure["published"] is None else f"{figure['published']:.2f}"
    if figure["rate"] is None or figure["ci95"] is None:
        return [published, "not measured"]
    low, high = (100 * bound for bound in figure["ci95"])
    return [published, f"{100 * figure['rate']:.2f} [{low:.1f}, {high:.1f}] {figure['verdict'] or ''}".rstrip()]


def html(own: Results) -> str:
    """The same as a table of the page."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in own["columns"].values())
    body = []
    for model, judge, cells in _rows(own):
        inner = "".join(f"<td>{_html_cell(cells.get(key))}</td>" for key in own["columns"])
        by = f'<br><span class="note">{escape(judge)}</span>' if judge else ""
        body.append(f'<tr><th scope="row">{escape(model)}{by}</th>{inner}</tr>')
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in own["notes"])
    return notes + tables.framed("rates main", f'<th scope="col">Model</th>{head}', "".join(body))


def _html_cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure["rate"] is None or figure["ci95"] is None:
        return '<span class="count">not measured</span>'
    low, high = (100 * bound for bound in figure["ci95"])
    published = "no published figure" if figure["published"] is None else f"published {figure['published']:.2f}"
    verdict = f", {figure['verdict']}" if figure["verdict"] else ""
    return (
        f'<span class="rate">{100 * figure["rate"]:.1f}</span>'
        f'<span class="count">{low:.1f}–{high:.1f}<br>{published}{verdict}</span>'
    )


def compare(files: Sequence[Path]) -> str:
    """Several labs' results as one table: a row for each figure that any of them has, a column for each file.

    Raises ConfigError as `read`, and for results of different tables.
    """
    own = {str(file): read(file) for file in files}
    sources = {one["source"] for one in own.values()}
    if len(sources) > 1:
        raise ConfigError(f"{', '.join(own)}: results of different published tables: {'; '.join(sorted(sources))}")
    cells: dict[tuple[str, str, str], dict[str, Figure]] = {}
    for file, one in own.items():
        for figure in one["figures"]:
            if figure["judge"]:
                title = one["columns"][figure["column"]]
                cells.setdefault((figure["model"], title, figure["judge"]), {})[file] = figure
    rows = [["model", "figure", "judge", "published", *own]]
    for (model, title, judge), by_file in cells.items():
        published = next(iter(by_file.values()))["published"]
        rows.append(
            [
                *(model, title, judge, "-" if published is None else f"{published:.2f}"),
                *(_cells(by_file[file])[1] if file in by_file else "-" for file in own),
            ]
        )
    return "\n".join([sources.pop(), *_aligned(rows)])
