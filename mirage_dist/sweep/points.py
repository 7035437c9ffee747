"""The points of a sweep: each a setting of a method with one seed, named by what it is, and all of them checked.

A point's name is its method, the first digits of the hash of the setting's resolved recipe, and the seed. The hash
leaves out the seed and the keys that a continued run may change, so whatever is added to a sweep later, what is done
keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist.evals import manifest, worklist
from mirage_dist.schema import ConfigError, EvalRecipe, TrainRecipe
from mirage_dist.schema.limits import POINTS
from mirage_dist.sweep import draws, measures
from mirage_dist.sweep.measures import Place
from mirage_dist.sweep.recipe import BASE, EvaluationConfig, MethodConfig, SweepRecipe
from mirage_dist.train import rundir
from mirage_dist.train.planning import check

HASH_DIGITS = 8  # hexadecimal, of a setting's hash in the names of its points
EVALUATED = {field.name for field in fields(EvalRecipe)} - {"model"}  # sections of `every` that evaluations have


@dataclass(frozen=True)
class Point:
    """One training and its evaluations. values: of the swept keys. overrides: all of the training's recipe.

    Of the base model recipe is None: it is evaluated only.
    """

    name: str
    method: str
    setting: str
    values: draws.Values
    seed: int | None
    recipe: str | None
    overrides: tuple[str, ...]
    run: Path

    @property
    def description(self) -> str:
        """The values, as on a command line."""
        words = [configs.override(key, value) for key, value in self.values.items()]
        return " ".join(words if self.seed is None else [*words, f"seed={self.seed}"])


@dataclass(frozen=True)
class Plan:
    """What a sweep runs. points: in the order of their start. base: the point of the base model, if it is evaluated.

    suites: the name of each evaluation's suite, in the order of the recipe. places: of the frontier's two measures.
    gpus: the most that a worker of an evaluation needs.
    """

    sweep: SweepRecipe
    points: list[Point]
    base: Point | None
    suites: list[str]
    places: tuple[Place, Place] | None
    gpus: int = 1

    @property
    def everything(self) -> list[Point]:
        return [*([self.base] if self.base else []), *self.points]


def plan(sweep: SweepRecipe) -> Plan:
    """All points, the first seed of every setting before the second.

    Reads neither data nor models. Raises ConfigError, which names the point, for a recipe that `mirage train` or
    `mirage eval` would refuse; for points that are the same run; and for recipes that belong to different worlds.
    """
    planned: dict[str, dict[str, draws.Values]] = {}
    for name, method in sweep.methods.items():
        planned[name] = _settings(sweep, name, method, planned)
    count = sum(len(own) for own in planned.values()) * len(sweep.seeds)
    if count > POINTS.value:
        raise ConfigError(f"{sweep.name}: {count:,} points; a sweep has at most {POINTS}")
    points = [
        _point(sweep, name, setting, values, seed)
        for seed in sweep.seeds
        for name, own in planned.items()
        for setting, values in own.items()
    ]
    trained = {point.name: _checked(sweep, point) for point in points}
    base = _base(sweep, {trained[point.name].model.path: point.name for point in reversed(points)})
    evaluated = _evaluations(sweep, points, base)
    _check_worlds({**trained, **evaluated})
    of_first = [recipe for name, recipe in evaluated.items() if name.endswith(f" {points[0].name}")]
    suites = [recipe.suite for recipe in of_first]
    if twice := [suite for suite in suites if suites.count(suite) > 1]:
        raise ConfigError(f"evaluate: two recipes have the suite {twice[0]!r}; give one of them another `suite`")
    own = sweep.frontier
    places = None if own is None else measures.places(own, dict(zip(suites, of_first, strict=True)))
    gpus = max((recipe.generation.tensor_parallel for recipe in evaluated.values()), default=1)
    return Plan(sweep, points, base, suites, places, gpus)


def _settings(
    sweep: SweepRecipe, name: str, method: MethodConfig, before: Mapping[str, Mapping[str, draws.Values]]
) -> dict[str, draws.Values]:
    """Hash -> values of each setting of a method."""
    named: dict[str, draws.Values] = {}
    for values in draws.settings(method, f"methods.{name}"):
        recipe = _training(sweep, name, values, 0)
        with _naming(name, values, None):
            objective = check.check_recipe(recipe, sweep.ranks).objective
        ignored = ("seed", *rundir.not_the_run(recipe, objective.needs))
        digest = configs.config_hash(recipe, ignored)[:HASH_DIGITS]
        for other, own in {**before, name: named}.items():
            if digest in own:
                here, there = _described(values, None), _described(own[digest], None)
                raise ConfigError(
                    f"methods.{name}: the point {here} is the same run as {there} of {other}; leave one of them out "
                    "(keys that may change between two starts of a run, such as train.save_every, make no other run)"
                )
        named[digest] = values
    return named


def _point(sweep: SweepRecipe, method: str, setting: str, values: draws.Values, seed: int) -> Point:
    name = f"{method}-{setting}-s{seed}"
    run = Path(sweep.out) / "points" / name
    own = sweep.methods[method]
    words = [*_words(sweep, method, values, seed), configs.override("run.dir", str(run)), f"run.name={name}"]
    words.append(configs.override("monitor.group", sweep.name))
    return Point(name, method, setting, values, seed, own.recipe, tuple(words), run)


def _words(sweep: SweepRecipe, method: str, values: draws.Values, seed: int) -> list[str]:
    swept = [configs.override(key, value) for key, value in values.items()]
    return [*sweep.every, *sweep.methods[method].overrides, f"seed={seed}", *swept]


def _training(sweep: SweepRecipe, method: str, values: draws.Values, seed: int) -> TrainRecipe:
    with _naming(method, values, seed):
        return configs.load(sweep.methods[method].recipe, _words(sweep, method, values, seed), TrainRecipe)


@contextmanager
def _naming(method: str, values: draws.Values, seed: int | None) -> Iterator[None]:
    """Let a ConfigError in the block begin with the point."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"methods.{method}, point {_described(values, seed)}: {error}") from error


def _described(values: draws.Values, seed: int | None) -> str:
    words = [configs.override(key, value) for key, value in values.items()]
    if seed is not None:
        words.append(f"seed={seed}")
    return " ".join(words) or "the recipe as it is"


def _checked(sweep: SweepRecipe, point: Point) -> TrainRecipe:
    """The recipe of a point, checked as the training itself would."""
    assert point.recipe is not None
    with _naming(point.method, point.values, point.seed):
        recipe = configs.load(point.recipe, point.overrides, TrainRecipe)
        check.check_recipe(recipe, sweep.ranks)
        if recipe.train.export == "off":
            raise ConfigError("train.export=off: a point is done when its model is exported; expected another form")
        if sweep.evaluate and recipe.train.export not in ("merged", "both"):
            raise ConfigError(
                f"train.export={recipe.train.export}: an evaluation reads the exported model; expected merged or both"
            )
    return recipe


def _base(sweep: SweepRecipe, starts: dict[str, str]) -> Point | None:
    """The point of the base model; None when nothing is evaluated, or nothing names it and nothing needs it.

    starts: the models that points start from -> the first point of each.
    """
    if not sweep.evaluate:
        return None
    model = sweep.base
    if model is None:
        if len(starts) > 1:
            if sweep.frontier is None or sweep.frontier.level is not None:
                return None
            listed = "; ".join(f"{name}: {path}" for path, name in reversed(starts.items()))
            raise ConfigError(
                f"base: the points start from different models ({listed}); name the one whose retain measure sets the "
                "level, or give frontier.level"
            )
        model = next(iter(starts))
    run = Path(sweep.out) / "points" / BASE
    return Point(BASE, BASE, "", {}, None, None, (configs.override("model.path", model),), run)


def evaluation(sweep: SweepRecipe, own: EvaluationConfig, point: Point) -> list[str]:
    """The overrides of an evaluation's recipe for a point. Of `every`, those of the model and of training are not."""
    words = [*(word for word in sweep.every if _key(word) in EVALUATED), *own.overrides]
    if point.seed is not None:
        words.append(f"seed={point.seed}")
    words += [configs.override("run.dir", str(point.run)), f"run.name={point.name}"]
    return [*words, *(point.overrides if point.recipe is None else ())]


def _key(word: str) -> str:
    """The section of a recipe that a word `key=value` is about."""
    return word.partition("=")[0].partition(".")[0].strip()


def _evaluations(sweep: SweepRecipe, points: Sequence[Point], base: Point | None) -> dict[str, EvalRecipe]:
    """Place in messages -> the checked recipe: of every evaluation for the first point of each seed, and for the base.

    The others differ in run.dir and run.name alone.
    """
    firsts = list({point.seed: point for point in reversed(points)}.values())[::-1]
    recipes: dict[str, EvalRecipe] = {}
    for number, own in enumerate(sweep.evaluate):
        for point in [*firsts, *([base] if base else [])]:
            place = f"evaluate[{number}], point {point.name}"
            try:
                recipe = configs.load(own.recipe, evaluation(sweep, own, point), EvalRecipe)
                worklist.check(recipe)
                if recipe.follow is not None:
                    raise ConfigError(f"follow={recipe.follow}: a sweep evaluates what is trained; leave it out")
                if point.recipe is not None and recipe.model.path != str(point.run / "export"):
                    given = f"path={recipe.model.path}" if recipe.model.run is None else f"run={recipe.model.run}"
                    raise ConfigError(
                        f"model.{given}: not the model of each point; expected model.path: ${{run.dir}}/export in the "
                        "recipe"
                    )
                if sweep.ranks % recipe.generation.tensor_parallel:
                    raise ConfigError(
                        f"generation.tensor_parallel={recipe.generation.tensor_parallel}: an evaluation has the GPUs "
                        f"of its point's training, ranks={sweep.ranks}; expected a divisor of that"
                    )
                first = recipes.setdefault(f"evaluate[{number}]", recipe)
                if manifest.recipe_hash(recipe) != manifest.recipe_hash(first):
                    raise ConfigError(
                        f"other questions or settings than of point {firsts[0].name}: the recipe takes something from "
                        "the seed or the run, and points could not be compared; write it as a number"
                    )
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from error
            recipes[place] = recipe
        del recipes[f"evaluate[{number}]"]
    return recipes


def _check_worlds(recipes: Mapping[str, TrainRecipe | EvalRecipe]) -> None:
    """Raise ConfigError where two recipes belong to different worlds, their share of spurious words aside."""
    first: tuple[str, dict[str, Any]] | None = None
    for name, recipe in recipes.items():
        if recipe.world is None:
            continue
        world = {key: value for key, value in configs.to_dict(recipe.world).items() if key != "spurious"}
        if first is None:
            first = name, world
        elif changed := configs.differences(world, first[1], "world"):
            raise ConfigError(
                f"point {name}: another world than that of {first[0]} ({'; '.join(changed)}): a sweep has one world, "
                "so that all points are asked the same questions. Pin it for all recipes, such as every=[world.seed=0]"
            )
