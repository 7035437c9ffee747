"""`mirage demo`: train, unlearn, attack and report on the embedded world."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mirage_dist import config as configs
from mirage_dist import disk, inputs, launching
from mirage_dist.progress import log
from mirage_dist.schema import EvalRecipe, RunError, TrainRecipe

if TYPE_CHECKING:
    from mirage_dist.report import Provenance, Summary

# Model -> its recipe, and the overrides of its stage. `inputs.make` trains the base model.
STAGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("configs/train/demo_sft.yaml", ()),
    "sft_control": ("configs/train/demo_sft.yaml", ("world.spurious=0.5", "run.name=sft_control")),
    "sft_diversified": ("configs/train/demo_sft_diversified.yaml", ()),
    "sft_filtered": ("configs/train/demo_sft_filtered.yaml", ()),
    "npo": ("configs/train/demo_npo.yaml", ()),
    "rmu": ("configs/train/demo_rmu.yaml", ()),
}
SUITE, EVERY_ATTACK = "configs/eval/demo.yaml", "configs/eval/demo_attacks.yaml"  # the suites have the files' names
RANKS = 2


def demo(out: Path, overrides: Sequence[str], full: bool = False) -> Summary:
    """Make every stage that does not exist yet, evaluate all models, and write the report; returns its summary.

    full: evaluate every attack and every test of erasure (DeepSpeed then runs in this process: see `exit_well`).
    The folder of a stage is named by the hash of its resolved recipe, which names the stages before it. A changed
    setting therefore makes the stages anew that depend on it, and no others.
    Raises RunError while another process makes a demo in `out`.
    """
    base = _base(out, shared(overrides))
    out.mkdir(parents=True, exist_ok=True)
    with disk.alone(out, wait=False) as free:
        if not free:
            raise RunError(f"{out}: another `mirage demo` writes there; wait for its end, or choose another --out")
        return _stages(base, out, overrides, full)


def _stages(base: TrainRecipe, out: Path, overrides: Sequence[str], full: bool) -> Summary:
    start = time.monotonic()
    assert base.world is not None
    here = [configs.override("world.dir", base.world.dir)]
    runs, recipes = {"base": Path(base.run.dir)}, [base]
    total = len(STAGES) + 2
    _log(1, total, "base: world, base model and its answers")
    inputs.make(_stage("configs/train/demo_npo.yaml", [*overrides, *here], out, "npo"))
    for number, (name, (file, own)) in enumerate(STAGES.items(), start=2):
        recipe = _stage(file, [*overrides, *own, *here], out, name)
        inputs.make(recipe)
        _log(number, total, f"{name}: {recipe.run.dir}")
        runs[name] = Path(recipe.run.dir)
        recipes.append(recipe)
        if not (runs[name] / "export").is_dir():
            launching.train(RANKS, file, [*overrides, *own, *here, configs.override("run.dir", recipe.run.dir)])
    _log(total, total, f"evaluation of every model, clean and attacked{', and tests of erasure' if full else ''}")
    for name, folder in runs.items():
        own = [*shared(overrides), *here, configs.override("run.dir", str(folder)), f"run.name={name}"]
        if full:
            evaluate(EVERY_ATTACK, own)
            _test_erasure(own)
        else:
            evaluate(SUITE, own)
    from mirage_dist import report

    provenance: Provenance = {
        "seed": base.seed,
        "world": {**configs.to_dict(base.world), "spurious": recipes[1].world and recipes[1].world.spurious},
        "wall_seconds": round(time.monotonic() - start, 1),
        "config_hash": configs.config_hash([configs.config_hash(recipe, ("run", "monitor")) for recipe in recipes]),
    }
    return report.report(runs, out / "report", provenance, suite=Path(EVERY_ATTACK if full else SUITE).stem)


def evaluate(file: str, overrides: Sequence[str]) -> None:
    """Evaluate one suite in this process."""
    from mirage_dist.evals import runner

    recipe = configs.load(file, overrides, EvalRecipe)
    inputs.make(recipe)
    runner.evaluate(recipe)


def _test_erasure(overrides: Sequence[str]) -> None:
    """Make the tests of erasure of one model, which evaluates `SUITE` first."""
    from mirage_dist.erasure import run

    recipe = configs.load(SUITE, overrides, EvalRecipe)
    inputs.make(recipe)
    run.run(recipe)


def shared(overrides: Sequence[str]) -> list[str]:
    """The overrides that every kind of recipe has; the others concern training only."""
    return [o for o in overrides if o.startswith(("seed=", "world."))]


def _base(out: Path, overrides: Sequence[str]) -> TrainRecipe:
    """The base model's recipe, with the world's folder named by the recipe's hash."""
    file = "configs/train/demo_base.yaml"
    unplaced = configs.load(file, overrides, TrainRecipe)
    digest = configs.config_hash(unplaced, ("run", "monitor", "model.path", "data", "world.dir", "world.spurious"))
    return configs.load(file, [*overrides, configs.override("world.dir", f"{out}/world-{digest[:8]}")], TrainRecipe)


def _stage(file: str, overrides: Sequence[str], out: Path, name: str) -> TrainRecipe:
    """The recipe of a stage, with its run directory named by the recipe's hash."""
    recipe = configs.load(file, overrides, TrainRecipe)
    digest = configs.config_hash(recipe, ("run", "monitor"))
    return configs.load(file, [*overrides, configs.override("run.dir", f"{out}/{name}-{digest[:8]}")], TrainRecipe)


def _log(number: int, total: int, text: str) -> None:
    log.info(f"[{number}/{total}] {text}")
