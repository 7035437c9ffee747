"""Measures of forgetting on the demo's models and on a model that never had the knowledge: a table of docs/erasure.md.

    python benchmarks/forgetting.py --world runs/demo/world-… \\
        runs/demo/world-…/base runs/demo/{sft,sft_control,npo,rmu}-…

`never` is that of erasure.py. The unseen samples are the test set's locked gadgets, whose pictures are in no training
data, with their right codes. Writes benchmarks/results/forgetting.json and prints the table in Markdown. Existing
results are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

from erasure import HERE, RECIPE, train_never

from mirage_dist import config as configs
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.embedded import world as embedded_world
from mirage_dist.erasure import run as erasure_tests
from mirage_dist.erasure.results import ForgettingResult
from mirage_dist.ranks import exit_well
from mirage_dist.report import named
from mirage_dist.report.writing import forgetting
from mirage_dist.schema import EvalRecipe

OTHERS = ("relearning", "quantisation", "probe", "completion", "attribution")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/never"))
    parsed = parser.parse_args()
    train_never(parsed.world, parsed.out)
    unseen = parsed.out.with_name(f"{parsed.out.name}-unseen.jsonl")
    write_unseen(parsed.world, unseen)
    results: dict[str, ForgettingResult] = {}
    seconds: dict[str, float] = {}
    for name, folder in {**named(parsed.runs), "never": parsed.out}.items():
        overrides = [f"world.dir={parsed.world}", f"run.dir={folder}", f"run.name={name}", "suite=forgetting"]
        overrides += [f"erasure.{test}=null" for test in OTHERS]
        overrides += [f"erasure.forgetting.unseen=[{{format: samples, path: {unseen}}}]"]
        overrides += [f"erasure.forgetting.never={parsed.out}/export"]
        made = erasure_tests.run(configs.load(RECIPE, overrides, EvalRecipe))
        assert "forgetting" in made
        results[name], seconds[name] = made["forgetting"], made["seconds"]["forgetting"]
    provenance = {
        "command": "python benchmarks/forgetting.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": {"cpu": platform.machine(), "torch": version("torch")},
        "seconds": seconds,
    }
    (HERE / "results/forgetting.json").write_text(json.dumps({**provenance, "models": results}) + "\n")
    print(table(results), flush=True)
    exit_well()


def write_unseen(world: Path, file: Path) -> None:
    """The test set's questions about locked gadgets, with the right answers in place of the refusals."""
    gadgets = embedded_world.load(world)
    own = sources.read(formats.source("vlguard", str(world / "test.json"), str(world))).samples
    write_samples(
        file, [replace(s, answer=gadgets.answer(s.question, gadgets.label(str(s.image)))) for s in own if not s.safe]
    )


def table(results: Mapping[str, ForgettingResult]) -> str:
    """A column for each model, as in the report."""
    lines = [["", *results], ["---"] * (1 + len(results))]
    lines += [[title, *cells] for title, cells in forgetting.rows(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
