"""The whole story on the embedded world, and what a recipe of that world needs before it can start."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist import launching, signals
from mirage_dist.data import toyworld
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe, WorldConfig
from mirage_dist.world import no_bars_in_logs, place

# Model -> its recipe, and what the stage sets beside what the user sets. The base is made by `ensure`.
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
WAIT_SECONDS = 2 * 3600


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
    ensure(_stage("configs/train/demo_npo.yaml", [*overrides, *here], out, "npo"))
    for number, (name, (file, own)) in enumerate(STAGES.items(), start=2):
        recipe = _stage(file, [*overrides, *own, *here], out, name)
        ensure(recipe)
        _say(number, total, f"{name}: {recipe.run.dir}")
        runs[name] = Path(recipe.run.dir)
        recipes.append(recipe)
        if not (runs[name] / "export").is_dir():
            launch(file, [*overrides, *own, *here, f"run.dir={recipe.run.dir}"])
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


def ensure(recipe: TrainRecipe) -> None:
    """Make the world, the base model and the prepared sets that a recipe of the embedded world names, once.

    Rank 0 makes them before there is a process group; the others wait for the files. A recipe without a world, or
    whose inputs are there, is left alone. Raises ConfigError when rank 0 does not get it done in time.
    """
    world = recipe.world
    if world is None:
        return
    if place()[0]:
        return _wait_for(recipe)
    inputs = [Path(s.path) for part in recipe.data.streams.values() for s in part]
    toyworld.make(world)
    init = Path(world.dir) / "init"
    if not init.is_dir():
        from mirage_dist.model import toymodel

        no_bars_in_logs()
        toymodel.make(init, world.seed)
    base = Path(world.dir) / "base" / "export"
    if Path(recipe.model.path) == base and not base.is_dir():
        launch(world.base_recipe, _of_world(world))
    for name, make in (("prepared", _prepare), ("diversified", _diversify)):
        folder = toyworld.safety_dir(world) / name
        if any(path.parent == folder for path in inputs) and not folder.is_dir():
            print(f"{name}: {make(world)}", flush=True)


def missing(recipe: TrainRecipe) -> list[Path]:
    """What `ensure` would have to make."""
    if recipe.world is None:
        return []
    inputs = (Path(s.path) for part in recipe.data.streams.values() for s in part)
    return [file for file in (Path(recipe.model.path) / "config.json", *inputs) if not file.exists()]


def launch(file: str, overrides: Sequence[str]) -> None:
    """Train on RANKS processes of this machine. Raises what `launching.train` raises."""
    launching.train(RANKS, file, overrides)


def evaluate(file: str, overrides: Sequence[str]) -> None:
    """One suite, in this process."""
    from mirage_dist.evals import runner

    runner.evaluate(configs.load(file, overrides, EvalRecipe))


def _test_erasure(overrides: Sequence[str]) -> None:
    """Of one model, which answers `SUITE` on the way."""
    from mirage_dist.robustness import run

    run.run(configs.load(SUITE, overrides, EvalRecipe))


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


def _of_world(world: WorldConfig) -> list[str]:
    """Overrides that give another recipe this world."""
    fields = {name: value for name, value in configs.to_dict(world).items() if name not in ("seed", "spurious")}
    return [f"seed={world.seed}", *(f"world.{name}={value}" for name, value in fields.items())]


def _prepare(world: WorldConfig) -> str:
    """Forget and retain sets; returns what there is to tell."""
    from mirage_dist.data import prepare

    told = [*_of_world(world), f"world.spurious={world.spurious}"]
    evaluate("configs/eval/demo_harvest.yaml", told)
    everything = f"retain_size={world.safety_samples + world.general_samples}"
    recipe = configs.load("configs/prepare/demo.yaml", [*told, everything], PrepareRecipe)
    return prepare.summary(prepare.prepare(recipe))


def _diversify(world: WorldConfig) -> str:
    from mirage_dist.data import prepare

    told = [*_of_world(world), f"world.spurious={world.spurious}"]
    return prepare.summary(prepare.prepare(configs.load("configs/prepare/demo_diversified.yaml", told, PrepareRecipe)))


def _wait_for(recipe: TrainRecipe) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while files := missing(recipe):
        if time.monotonic() > deadline:
            raise ConfigError(f"{files[0]}: not there after {WAIT_SECONDS} s; rank 0 was to make it")
        _stop_if_asked()
        time.sleep(0.2)


def _stop_if_asked() -> None:
    if name := signals.received():
        raise signals.StopRequested(f"{name} came while the embedded world was being made; what is whole of it is kept")


def _say(number: int, total: int, text: str) -> None:
    print(f"[{number}/{total}] {text}", flush=True)
