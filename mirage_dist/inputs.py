"""What a recipe of a world needs before it can start: the world, its base model, its prepared sets.

The command calls `make` once for every verb. A recipe without a `world` section names real data and is left alone.
What a kind of world is made with is one entry of `KINDS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mirage_dist import config as configs
from mirage_dist import disk, launching, signals
from mirage_dist.countries import world as countries_world
from mirage_dist.embedded import world as embedded_world
from mirage_dist.progress import log
from mirage_dist.ranks import no_bars_in_logs, place
from mirage_dist.schema import ConfigError, EvalRecipe, PrepareRecipe, TrainRecipe, WorldConfig
from mirage_dist.worlds.files import safety_dir

WAIT_SECONDS = 2 * 3600


@dataclass(frozen=True)
class Kind:
    """What a kind of world is made with.

    files: writes the world's folder, and the safety set that `spurious` names. init: writes the model that the base
    model is trained from. ranks: processes of that training. base, harvest: its recipe, and that of the evaluation
    whose answers are to be forgotten. sets: folder beside the safety set -> the recipe that prepares it.
    """

    files: Callable[[WorldConfig], None]
    init: Callable[[WorldConfig, Path], None]
    ranks: int
    base: str
    harvest: str
    sets: Mapping[str, str]


def _toy_model(world: WorldConfig, init: Path) -> None:
    from mirage_dist.embedded import model as embedded_model

    embedded_model.make(init, world.seed)


def _real_model(world: WorldConfig, init: Path) -> None:
    """A real language model that sees flags. Raises ConfigError when it cannot be had, or is not of use here."""
    from mirage_dist.countries import language_model, vision

    text_model = Path(world.dir) / "language_model"
    if not text_model.is_dir():
        language_model.make(text_model, None if world.language_model is None else Path(world.language_model))
    vision.make(init, text_model, world.seed)


KINDS: Mapping[str, Kind] = {
    "gadgets": Kind(
        files=embedded_world.make,
        init=_toy_model,
        ranks=2,
        base="configs/train/demo_base.yaml",
        harvest="configs/eval/demo_harvest.yaml",
        sets={
            "prepared": "configs/prepare/demo.yaml",
            "prepared_idk": "configs/prepare/demo_idk.yaml",
            "diversified": "configs/prepare/demo_diversified.yaml",
        },
    ),
    "countries": Kind(
        files=countries_world.make,
        init=_real_model,
        ranks=1,
        base="configs/train/real_base.yaml",
        harvest="configs/eval/real_harvest.yaml",
        sets={
            "prepared": "configs/prepare/real.yaml",
            "prepared_idk": "configs/prepare/real_idk.yaml",
            "diversified": "configs/prepare/real_diversified.yaml",
            "prepared_diversified": "configs/prepare/real_prepared_diversified.yaml",
        },
    ),
}


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
    if not isinstance(recipe, TrainRecipe) and not (isinstance(recipe, EvalRecipe) and _model_is_missing(recipe)):
        KINDS[world.kind].files(world)
        return
    if not first or (isinstance(recipe, TrainRecipe) and place()[0]):
        _wait_for(recipe)
        return
    KINDS[world.kind].files(world)
    if missing(recipe):
        with _alone(Path(world.dir)):
            _make_models_and_sets(recipe, world)


def base_model(world: WorldConfig) -> Path:
    """Make a world's files, its initial model and its base model where they are missing; returns the base model."""
    base = _models(world)[1]
    KINDS[world.kind].files(world)
    if not base.is_dir():
        with _alone(Path(world.dir)):
            _make_models(world, True)
    return base


def _make_models(world: WorldConfig, with_base: bool) -> None:
    kind, init, base = KINDS[world.kind], *_models(world)
    if not init.is_dir():
        no_bars_in_logs()
        kind.init(world, init)
    if with_base and not base.is_dir():
        launching.train(kind.ranks, world.base_recipe or kind.base, _overrides(world))


def _make_models_and_sets(recipe: TrainRecipe | EvalRecipe, world: WorldConfig) -> None:
    kind = KINDS[world.kind]
    _make_models(world, _path(recipe) == _models(world)[1])
    if isinstance(recipe, EvalRecipe):
        return
    paths = _stream_files(recipe)
    for name, file in kind.sets.items():
        folder = safety_dir(world) / name
        if any(path.parent == folder for path in paths) and not folder.is_dir():
            log.info(f"{name}: {_prepare(world, file)}")


def _models(world: WorldConfig) -> tuple[Path, Path]:
    """The model that a world starts from, and its base model."""
    return Path(world.dir) / "init", Path(world.dir) / "base" / "export"


def _path(recipe: TrainRecipe | EvalRecipe) -> Path | None:
    return None if recipe.model.path is None else Path(recipe.model.path)


def _model_is_missing(recipe: EvalRecipe) -> bool:
    """Whether the recipe's model is one of the world's, and `make` has to make it."""
    path = _path(recipe)
    return recipe.world is not None and path is not None and path in _models(recipe.world) and not path.is_dir()


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


def _prepare(world: WorldConfig, file: str) -> str:
    """Make the sets of one recipe, and the base model's answers if they are harvested; returns a summary in words."""
    from mirage_dist.data import prepare
    from mirage_dist.evals import runner

    overrides = [*_overrides(world), f"world.spurious={world.spurious}"]
    recipe = configs.load(file, overrides, PrepareRecipe)
    if recipe.harvest is not None:
        runner.evaluate(configs.load(KINDS[world.kind].harvest, overrides, EvalRecipe))
    return prepare.summary(prepare.prepare(recipe))


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
        raise signals.StopRequested(f"{name} arrived while the world was being made; its finished parts are kept")


def _wait_for(recipe: TrainRecipe | EvalRecipe) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while files := missing(recipe):
        if time.monotonic() > deadline:
            raise ConfigError(f"{files[0]}: not there after {WAIT_SECONDS} s; the first process should have made it")
        _check_signal()
        time.sleep(0.2)
