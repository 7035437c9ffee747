"""Tables, figures and one static page over evaluated runs. Reads files only.

Called, it is `mirage_dist.api.report`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from mirage_dist import Verb, disk
from mirage_dist.progress import ON_STDERR, log
from mirage_dist.report import examples, judges, page, published, text
from mirage_dist.report import summary as summaries
from mirage_dist.report.compare import comparisons, defended
from mirage_dist.report.curves.budgets import budgets
from mirage_dist.report.figures import drawing, paper
from mirage_dist.report.load import named, read
from mirage_dist.report.methods import methods
from mirage_dist.report.summary import SCHEMA_VERSION, Provenance, Summary
from mirage_dist.report.summary import read as read_summary
from mirage_dist.report.writing import forgetting, latex, perturbed, plain
from mirage_dist.report.writing.terminal import table
from mirage_dist.schema import ConfigError, RunError

__all__ = [
    "Provenance",
    "Summary",
    "named",
    "overview",
    "published",
    "read_summary",
    "report",
    "require_whole",
    "table",
]

sys.modules[__name__].__class__ = Verb
METHODS = "methods.csv"
EXAMPLES = 100  # questions of each set that the page shows, with all of their rewrites


def report(
    runs: Mapping[str, Path],
    out: Path,
    provenance: Provenance | None = None,
    suite: str | None = None,
    outputs: bool = False,
    lead: tuple[str, str, str] | None = None,
    files: Mapping[str, str] | None = None,
    pdf: bool = False,
) -> Summary:
    """Write the report of the runs (name -> run directory) into `out` and return its summary.

    Writes index.html, report.md, rates.csv, table.tex and summary.json (see `Summary`), of runs that differ in their
    seeds methods.csv too, all of them or none (see `disk.files`) and private (mode 0600), and logs warnings where a
    comparison may be invalid or results are left out.
    provenance: top-level values of the summary that the runs' files do not hold; those that are missing are None.
    outputs: include model outputs on real data in the page, hidden until clicked. Outputs on embedded worlds are always
    included. lead: title, note and HTML of a section before all others. files: name ->
    content of further files in `out`. pdf: each figure of the page as a PDF too.

    A run with missing or damaged verdicts is reported with what is there, and the summary's `problems` say what is not.
    Raises RunError for missing answers, damaged rates and a disk that accepts no more, before it has changed a file;
    ConfigError when a run was not evaluated, or when `suite` is None and the runs do not share exactly one.
    """
    loaded = read(runs, suite)
    for warning in text.warnings(loaded):
        log.warning(warning, extra=ON_STDERR)
    summary: Summary = {
        "models": {run.name: run.entry for run in loaded},
        "schema_version": SCHEMA_VERSION,
        "methods": methods(loaded),
        "comparisons": comparisons(loaded),
        "budgets": budgets(loaded),
        "defences": defended(loaded),
        "seed": loaded[0].metrics["seed"],
        "world": loaded[0].metrics["world"],
        "wall_seconds": None,
        "config_hash": None,
        "suite": loaded[0].suite,
        "judges": {run.name: run.judge for run in loaded},
        "problems": text.problems(loaded),
        "cautions": judges.cautions(loaded),
        "figures": [],
        **(provenance or {}),
    }
    if fitted := perturbed.results(loaded):
        summary["universal"] = fitted
    if measured := forgetting.results(loaded):
        summary["forgetting"] = measured
    benign = all(run.metrics["world"] for run in loaded)
    shown = examples.gather(loaded, EXAMPLES, outputs or benign)
    with drawing.kept() as drawn:
        html = page.render(loaded, summary, shown, lead)
    figures = {f"{name}.pdf": drawing.pdf(*own) for name, own in drawn.items()} if pdf else {}
    summary["figures"] = list(figures)
    contents: dict[str, str | bytes] = {
        summaries.FILE: json.dumps(summary, indent=1) + "\n",
        "report.md": plain.markdown(loaded, summary),
        "rates.csv": plain.csv_of_rates(loaded),
        latex.FILE: latex.table(loaded, summary),
        "index.html": html,
        **({METHODS: plain.csv_of_methods(summary["methods"])} if summary["methods"] else {}),
        **figures,
        **(files or {}),
    }
    unharmed = "the runs and an earlier report are unharmed; make the report again, or elsewhere with --out"
    mark = (summaries.FILE, '{\n "models": {')
    others = [METHODS, *_figures(out)]  # of an earlier report of other runs
    with disk.refusals(out, unharmed), disk.files(out, mark, others, private=True) as folder:
        for name, content in contents.items():
            disk.write(folder / name, content, private=True, durable=False, workspace=folder)
    return summary


def _figures(out: Path) -> list[str]:
    """The figures that an earlier report wrote into `out` as files."""
    try:
        names = read_summary(out / summaries.FILE).get("figures", [])
    except ConfigError:  # there is none, or it is somebody else's, or a newer version's: its files stay
        return []
    return [name for name in names if re.fullmatch(r"[\w-]+\.pdf", str(name))]


def require_whole(summary: Summary) -> None:
    """Raise RunError when the report lacks verdicts."""
    if summary["problems"]:
        raise RunError(f"the report lacks verdicts of {len(summary['problems'])} judgings, as its head says")


def overview(runs: Mapping[str, Path], file: Path, suite: str | None = None) -> None:
    """Write one PNG of the main figures, for a README."""
    paper.overview(read(runs, suite), file)
