"""Tables, figures and one static page over evaluated runs. Reads files only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirage_dist.report import page, text
from mirage_dist.report.figures import overview as _overview
from mirage_dist.report.load import named, read

__all__ = ["named", "overview", "print_table", "report"]


def report(
    runs: Mapping[str, Path], out: Path, extra: Mapping[str, Any] | None = None, suite: str | None = None
) -> dict[str, Any]:
    """Write `out/index.html` and `out/summary.json` for runs (name -> run directory), and return the summary.

    The summary is {"models": {name: {"asr", "rr", "ir", "utility", "locality"}}, "seed", "world",
    "wall_seconds", "config_hash", "suite", "judges"}; each leaf is {"rate", "k", "n", "ci95": [low, high]}, or
    None where the judge cannot tell. `extra` sets or adds top-level values; what nobody sets is None.

    Raises ConfigError when a run was not evaluated, or the runs share no suite or several and none is named.
    """
    loaded = read(runs, suite)
    summary = {
        "models": {run.name: dict(run.entry) for run in loaded},
        "seed": loaded[0].metrics["seed"],
        "world": loaded[0].metrics["world"],
        "wall_seconds": None,
        "config_hash": None,
        "suite": loaded[0].suite,
        "judges": {run.name: run.judge for run in loaded},
        **(extra or {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (out / "index.html").write_text(page.render(loaded, summary), encoding="utf-8")
    return summary


def overview(runs: Mapping[str, Path], file: Path, suite: str | None = None) -> None:
    """Write one PNG of the main figures, for a README."""
    _overview(read(runs, suite), file)


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
            lines.append(("" if row else title, text.label(condition), *cells))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    print(table, flush=True)
    return table
