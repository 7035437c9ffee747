"""What a recipe of the embedded world needs before it can start: the world, its base model, its prepared sets.

The command calls `make` once for every verb. A recipe without a `world` section names real data and is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mirage_dist import config as configs
from mirage_dist import disk, launching, signals
from mirage_dist.embedded import world as embedded_world
from mirage_dist.progress import log
from mirage_dist.ranks import no_bars_in_logs, place
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe, WorldConfig

RANKS = 2  # processes that train the base model
WAIT_SECONDS = 2 * 3600
BASE_RECIPE = "configs/train/demo_base.yaml"


def make(recipe: TrainRecipe | EvalRecipe | PrepareRecipe, first: bool = True) -> None:
    """Make what the recipe reads and what does not exist yet.

    Preparation reads the world's files only. Training and evaluation may also read the base model, and training the
    forget, retain and diversified sets. Of several ranks rank 0 makes these before the process group exists, of several
    workers of an evaluation the `first`; the others wait for the files.
    Of several runs that need the same world, one makes what is missing while the others wait.
    Raises ConfigError when rank 0 does not finish in time, and StopRequested when a signal arrives first.
    """
    world = recipe.world
    if world is None:
        return
    if not isinstance(recipe, TrainRecipe) and not (isinstance(recipe, EvalRecipe) and _base_is_missing(recipe)):
        embedded_world.make(world)
        return
    if not first or (isinstance(recipe, TrainRecipe) and place()[0]):
        _wait_for(recipe)
        return
    embedded_world.make(world)
    if missing(recipe):
        with _alone(Path(world.dir)):
            _make_models_and_sets(recipe, world)


def _make_models_and_sets(recipe: TrainRecipe | EvalRecipe, world: WorldConfig) -> None:
    init = Path(world.dir) / "init"
    if not init.is_dir():
        from mirage_dist.embedded import model as embedded_model

        no_bars_in_logs()
        embedded_model.make(init, world.seed)
    if _base_is_missing(recipe):
        launching.train(RANKS, world.base_recipe or BASE_RECIPE, _overrides(world))
    if isinstance(recipe, EvalRecipe):
        return
    paths = _stream_files(recipe)
    for name, prepare in (("prepared", _prepare), ("diversified", _diversify)):
        folder = embedded_world.safety_dir(world) / name
        if any(path.parent == folder for path in paths) and not folder.is_dir():
            log.info(f"{name}: {prepare(world)}")


def _base_is_missing(recipe: TrainRecipe | EvalRecipe) -> bool:
    """Whether the recipe's model is the world's base model, and `make` has to train it."""
    base = Path(recipe.world.dir) / "base" / "export" if recipe.world else None
    return base is not None and recipe.model.path is not None and Path(recipe.model.path) == base and not base.is_dir()


def missing(recipe: TrainRecipe | EvalRecipe) -> list[Path]:
    """The files that `make` would have to make, of an evaluation only the model's."""
    if recipe.world is None:
        return []
    files = [Path(str(recipe.model.path)) / "config.json"]
    if isinstance(recipe, TrainRecipe):
        files += _stream_files(recipe)
    return [file for file in files if not file.exists()]


def _stream_files(recipe: TrainRecipe) -> list[Path]:
    return [Path(source.path) for sources in recipe.data.streams.values() for source in sources]


def _overrides(world: WorldConfig) -> list[str]:
    """Overrides that give another recipe this world."""
    fields = {name: value for name, value in configs.to_dict(world).items() if name not in ("seed", "spurious")}
    return [f"seed={world.seed}", *(configs.override(f"world.{name}", value) for name, value in fields.items())]


def _prepare(world: WorldConfig) -> str:
    """Make the forget and retain sets from the base model's own answers; returns a summary in words."""
    from mirage_dist.evals import runner

    overrides = [*_overrides(world), f"world.spurious={world.spurious}"]
    runner.evaluate(configs.load("configs/eval/demo_harvest.yaml", overrides, EvalRecipe))
    everything = f"retain_size={world.safety_samples + world.general_samples}"
    return _summary("configs/prepare/demo.yaml", [*overrides, everything])


def _diversify(world: WorldConfig) -> str:
    """Make the diversified safety set; returns a summary in words."""
    return _summary("configs/prepare/demo_diversified.yaml", [*_overrides(world), f"world.spurious={world.spurious}"])


def _summary(file: str, overrides: Sequence[str]) -> str:
    from mirage_dist.data import prepare

    return prepare.summary(prepare.prepare(configs.load(file, overrides, PrepareRecipe)))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block of this folder."""
    waiting = False
    while True:
        with disk.alone(folder, wait=False) as free:
            if free:
                yield
                return
        if not waiting:
            log.info(f"{folder}: another process makes parts of this world; waiting for it")
            waiting = True
        _check_signal()
        time.sleep(0.2)


def _check_signal() -> None:
    if name := signals.received():
        raise signals.StopRequested(
            f"{name} arrived while the embedded world was being made; its finished parts are kept"
        )


def _wait_for(recipe: TrainRecipe | EvalRecipe) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while files := missing(recipe):
        if time.monotonic() > deadline:
            raise ConfigError(f"{files[0]}: not there after {WAIT_SECONDS} s; the first process should have made it")
        _check_signal()
        time.sleep(0.2)
