"""`mirage demo`: the whole story on the embedded world."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist import inputs, launching
from mirage_dist.schema import EvalRecipe, TrainRecipe

# Model -> its recipe, and what the stage sets beside what the user sets. The base is made by `inputs.make`.
STAGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("configs/train/demo_sft.yaml", ()),
    "sft_control": ("configs/train/demo_sft.yaml", ("world.spurious=0.5", "run.name=sft_control")),
    "sft_diversified": ("configs/train/demo_sft_diversified.yaml", ()),
    "sft_filtered": ("configs/train/demo_sft_filtered.yaml", ()),
    "npo": ("configs/train/demo_npo.yaml", ()),
    "rmu": ("configs/train/demo_rmu.yaml", ()),
}
SUITE, EVERY_ATTACK = "configs/eval/demo.yaml", "configs/eval/demo_attacks.yaml"  # named as their suites are
RANKS = 2


def demo(out: Path, overrides: Sequence[str], full: bool = False) -> dict[str, Any]:
    """Run every stage that is not there yet, evaluate all models, write the report; returns its summary.

    full: under every attack, and with every test of erasure (DeepSpeed then runs in this process: see `exit_well`).
    A stage lives in a folder named by the hash of its resolved recipe, which names the stages before it: a changed
    setting runs again what depends on it, and nothing else.
    """
    start = time.monotonic()
    base = _base(out, shared(overrides))
    assert base.world is not None
    here = [f"world.dir={base.world.dir}"]
    runs, recipes = {"base": Path(base.run.dir)}, [base]
    total = len(STAGES) + 2
    _say(1, total, "base: world, model, and what it answers")
    inputs.make(_stage("configs/train/demo_npo.yaml", [*overrides, *here], out, "npo"))
    for number, (name, (file, own)) in enumerate(STAGES.items(), start=2):
        recipe = _stage(file, [*overrides, *own, *here], out, name)
        inputs.make(recipe)
        _say(number, total, f"{name}: {recipe.run.dir}")
        runs[name] = Path(recipe.run.dir)
        recipes.append(recipe)
        if not (runs[name] / "export").is_dir():
            launching.train(RANKS, file, [*overrides, *own, *here, f"run.dir={recipe.run.dir}"])
    _say(total, total, "evaluation: every model, as asked and attacked" + (", and whether it forgot" if full else ""))
    for name, folder in runs.items():
        own = [*shared(overrides), *here, f"run.dir={folder}", f"run.name={name}"]
        if full:
            evaluate(EVERY_ATTACK, own)
            _test_erasure(own)
        else:
            evaluate(SUITE, own)
    from mirage_dist import report

    told = {
        "seed": base.seed,
        "world": {**configs.to_dict(base.world), "spurious": recipes[1].world and recipes[1].world.spurious},
        "wall_seconds": round(time.monotonic() - start, 1),
        "config_hash": configs.config_hash([configs.config_hash(recipe, ("run", "monitor")) for recipe in recipes]),
    }
    summary = report.report(runs, out / "report", told, suite=Path(EVERY_ATTACK if full else SUITE).stem)
    report.print_table(summary)
    print(f"{told['wall_seconds']} s; report: {out / 'report' / 'index.html'}", flush=True)
    return summary


def evaluate(file: str, overrides: Sequence[str]) -> None:
    """One suite, in this process."""
    from mirage_dist.evals import runner

    recipe = configs.load(file, overrides, EvalRecipe)
    inputs.make(recipe)
    runner.evaluate(recipe)


def _test_erasure(overrides: Sequence[str]) -> None:
    """Of one model, which answers `SUITE` on the way."""
    from mirage_dist.erasure import run

    recipe = configs.load(SUITE, overrides, EvalRecipe)
    inputs.make(recipe)
    run.run(recipe)


def shared(overrides: Sequence[str]) -> list[str]:
    """The overrides that every kind of recipe knows; the others are about training."""
    return [o for o in overrides if o.startswith(("seed=", "world."))]


def _base(out: Path, overrides: Sequence[str]) -> TrainRecipe:
    """The base's recipe with the world's folder named by its hash."""
    file = "configs/train/demo_base.yaml"
    unplaced = configs.load(file, overrides, TrainRecipe)
    told = configs.config_hash(unplaced, ("run", "monitor", "model.path", "data", "world.dir", "world.spurious"))
    return configs.load(file, [*overrides, f"world.dir={out}/world-{told[:8]}"], TrainRecipe)


def _stage(file: str, overrides: Sequence[str], out: Path, name: str) -> TrainRecipe:
    recipe = configs.load(file, overrides, TrainRecipe)
    told = configs.config_hash(recipe, ("run", "monitor"))
    return configs.load(file, [*overrides, f"run.dir={out}/{name}-{told[:8]}"], TrainRecipe)


def _say(number: int, total: int, text: str) -> None:
    print(f"[{number}/{total}] {text}", flush=True)
