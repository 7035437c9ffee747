"""Tables, figures and one static page over evaluated runs. Reads files only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirage_dist.evals.sharing import files
from mirage_dist.report import examples, page, plain
from mirage_dist.report.compare import comparisons
from mirage_dist.report.figures import overview as _overview
from mirage_dist.report.load import named, read
from mirage_dist.report.plain import print_table

__all__ = ["named", "overview", "print_table", "report"]

EXAMPLES = 100  # questions a set, with all of their rewrites


def report(
    runs: Mapping[str, Path],
    out: Path,
    extra: Mapping[str, Any] | None = None,
    suite: str | None = None,
    outputs: bool = False,
) -> dict[str, Any]:
    """Write the report of runs (name -> run directory) into `out`, and return its summary.

    index.html, report.md, rates.csv, and summary.json: {"models": {name: {"asr", "rr", "ir", "utility", "locality"}},
    "comparisons": see `compare.comparisons`, "seed", "world", "wall_seconds", "config_hash", "suite", "judges"}; each
    leaf of a model is {"rate", "k", "n", "ci95": [low, high]}, or None where the judge cannot tell. `extra` sets or
    adds top-level values; what nobody sets is None.
    outputs: put what models said of real data into the page, hidden until clicked; of embedded worlds it always is.
    All files are private (mode 0600).

    Raises ConfigError when a run was not evaluated, or the runs share no suite or several and none is named.
    """
    loaded = read(runs, suite)
    summary = {
        "models": {run.name: dict(run.entry) for run in loaded},
        "comparisons": comparisons(loaded),
        "seed": loaded[0].metrics["seed"],
        "world": loaded[0].metrics["world"],
        "wall_seconds": None,
        "config_hash": None,
        "suite": loaded[0].suite,
        "judges": {run.name: run.judge for run in loaded},
        **(extra or {}),
    }
    benign = all(run.metrics["world"] for run in loaded)
    shown = examples.gather(loaded, EXAMPLES, outputs or benign)
    for name, text in (
        ("summary.json", json.dumps(summary, indent=1) + "\n"),
        ("report.md", plain.markdown(loaded, summary)),
        ("rates.csv", plain.csv_of_rates(loaded)),
        ("index.html", page.render(loaded, summary, shown)),
    ):
        files.write(out / name, text)
    return summary


def overview(runs: Mapping[str, Path], file: Path, suite: str | None = None) -> None:
    """Write one PNG of the main figures, for a README."""
    _overview(read(runs, suite), file)
