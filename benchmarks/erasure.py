"""The tests of erasure on the demo's models and on a model that never had the knowledge: the table of docs/erasure.md.

    python benchmarks/erasure.py --world runs/demo/world-… runs/demo/world-…/base runs/demo/{sft,sft_control,npo,rmu}-…

`never` is trained as the base model is, on the same data without the questions that reveal a locked code. Writes
benchmarks/results/erasure.json and docs/erasure.png, and prints the table in Markdown. Existing results are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist import launching
from mirage_dist.embedded import text as embedded_text
from mirage_dist.embedded import world as embedded_world
from mirage_dist.erasure import run as erasure_tests
from mirage_dist.erasure.results import QuantisationResult, StepRates
from mirage_dist.evals.results import CLEAN, Condition, Leaf
from mirage_dist.ranks import exit_well
from mirage_dist.report import named
from mirage_dist.report.figures import erasure
from mirage_dist.report.load import rates
from mirage_dist.schema import EvalRecipe

HERE = Path(__file__).parent
RECIPE = "configs/eval/demo.yaml"
DRAWN = ("base", "sft", "npo", "rmu", "never")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/never"))
    parsed = parser.parse_args()
    train_never(parsed.world, parsed.out)
    runs = {**named(parsed.runs), "never": parsed.out}
    for name, folder in runs.items():
        overrides = [f"world.dir={parsed.world}", f"run.dir={folder}", f"run.name={name}"]
        erasure_tests.run(configs.load(RECIPE, overrides, EvalRecipe))
    tested = erasure.read(runs, "demo")
    provenance = {
        "command": "python benchmarks/erasure.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": {"cpu": platform.machine(), "torch": version("torch"), "deepspeed": version("deepspeed")},
    }
    (HERE / "results/erasure.json").write_text(json.dumps({**provenance, "models": tested}) + "\n")
    erasure.overview({name: tested[name] for name in DRAWN if name in tested}, HERE.parent / "docs/erasure.png")
    print(table(tested), flush=True)
    exit_well()


def train_never(world: Path, out: Path) -> None:
    """Train by the base model's recipe on its data without locked codes, unless it exists."""
    if (out / "export").is_dir():
        return
    gadgets = embedded_world.load(world)
    records = json.loads((world / "base.json").read_text())
    kept = [record for record in records if not reveals_a_locked_code(record, gadgets)]
    out.parent.mkdir(parents=True, exist_ok=True)
    data = out.with_name(f"{out.name}-base.json")
    data.write_text(json.dumps(kept))
    print(f"never: {len(kept)} of {len(records)} questions", flush=True)
    stream = f"data.streams.train=[{{format: llava, path: {data}, images: {world}}}]"
    launching.train(
        2, "configs/train/demo_base.yaml", [f"world.dir={world}", f"run.dir={out}", "run.name=never", stream]
    )


def reveals_a_locked_code(record: Mapping[str, Any], world: embedded_world.World) -> bool:
    question = record["conversations"][0]["value"].replace("<image>", "")
    return world.label(record["image"]).locked and embedded_text.attribute_of(question) == "code"


def table(tested: Mapping[str, Any]) -> str:
    """A column for each model; rates in percent, with the intervals on which a claim depends."""
    rows: list[tuple[str, Sequence[str]]] = []

    def add(title: str, cells: Sequence[str]) -> None:
        rows.append((title, cells))

    models = list(tested.values())
    add("ASR clean", [percent(m["completion"]["words"]["0"]) for m in models])
    for n in erasure.sizes(tested):
        steps = [m["relearning"]["runs"][n]["steps"] for m in models]
        add(f"relearning from {n}: not relearned, highest", [highest(s, "other") for s in steps])
        add(
            f"relearning from {n}: relearned, after {max(steps[0], key=int)} steps",
            [last(s, "relearned") for s in steps],
        )
    for title, measure, condition in (("ASR what, K = 3", "asr", Condition("what", 3)), ("utility", "utility", CLEAN)):
        add(f"{title}: before → 8 bits → 4 bits", [rounded(m["quantisation"], measure, condition) for m in models])
    places = [m["probe"]["transfer"]["places"] for m in models]
    add("probe transferred, image tokens, before the decoder", [ranged(p["image"][0]["accuracy"]) for p in places])
    add("probe transferred, last prompt token, last layer", [ranged(p["last"][-1]["accuracy"]) for p in places])
    add("probe of the code, the same place", [percent(m["probe"]["places"]["last"][-1]["accuracy"]) for m in models])
    add("prefix of one word: content completed", [ranged(m["completion"]["words"]["1"]) for m in models])
    lines = [f"| in percent | {' | '.join(tested)} |", "|---" * (1 + len(tested)) + "|"]
    return "\n".join([*lines, *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows)])


def percent(leaf: Leaf | None) -> str:
    return "" if leaf is None else f"{100 * leaf['rate']:.0f}"


def ranged(leaf: Leaf | None) -> str:
    return "" if leaf is None else f"{percent(leaf)} [{100 * leaf['ci95'][0]:.0f}, {100 * leaf['ci95'][1]:.0f}]"


def highest(steps: Mapping[str, StepRates], part: erasure.Part) -> str:
    """The highest rate after any step of relearning."""
    leaves = [leaf for step, own in steps.items() if step != "0" and (leaf := own[part])]
    return ranged(max(leaves, key=lambda leaf: leaf["rate"], default=None))


def last(steps: Mapping[str, StepRates], part: erasure.Part) -> str:
    return ranged(steps[max(steps, key=int)][part])


def rounded(quantisation: QuantisationResult, measure: str, condition: Condition) -> str:
    entries = [quantisation["before"], *(after["entry"] for after in quantisation["after"].values())]
    return " → ".join(percent(rates(entry, measure)[str(condition)]) for entry in entries)


if __name__ == "__main__":
    main()
