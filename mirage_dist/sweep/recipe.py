"""The recipe of `mirage sweep`: which settings are trained, with which seeds, and what the models are asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mirage_dist.schema.errors import ConfigError
from mirage_dist.schema.limits import MAGNITUDE, POINTS
from mirage_dist.schema.names import Name, Place
from mirage_dist.schema.numbers import Count, Seed, Share, real, whole

BASE = "base"  # the point that is evaluated without training: the model that all others start from
OWN_KEYS = ("run.dir", "run.name", "seed", "monitor.group")  # of a training's recipe, set by the sweep for each point
LONGEST_METHOD = 40  # characters; setting and seed follow it in a point's name, which names the run
Number = Annotated[float, real(-MAGNITUDE.value, MAGNITUDE.value)]


@dataclass(frozen=True)
class DrawConfig:
    """What a random search draws for a key: one of `values`, or a number from `low` to `high`."""

    values: list[Any] | None = None  # to choose from, each as likely as the others; in place of low and high
    low: Number | None = None  # the least number
    high: Number | None = None  # the greatest number
    scale: Literal["linear", "log"] = "linear"  # of the numbers' distribution, which is uniform on it
    whole: bool = False  # whole numbers only

    def __post_init__(self) -> None:
        bounds = (self.low, self.high)
        if self.values is not None:
            if bounds != (None, None):
                raise ConfigError("values: stand in place of low and high; leave one of the two out")
            if self.scale != "linear" or self.whole:
                raise ConfigError("scale and whole: say how numbers from low to high are drawn; leave them out")
            if not self.values:
                raise ConfigError("values: empty; expected one at least")
            return
        if self.low is None or self.high is None:
            raise ConfigError("low and high: expected both, or values")
        if not self.low < self.high:
            raise ConfigError(f"low={self.low:g}, high={self.high:g}; expected low below high")
        if self.scale == "log" and self.low <= 0:
            raise ConfigError(f"low={self.low:g}; expected a number above 0 for scale: log")
        if self.whole and math.ceil(self.low) > math.floor(self.high):
            raise ConfigError(f"low={self.low:g}, high={self.high:g}: no whole number is between them")


@dataclass(frozen=True)
class RandomConfig:
    """Settings drawn at random. Each is a function of (seed, its number): raising `settings` keeps the earlier ones."""

    settings: Annotated[int, whole(1, POINTS.value)]  # how many are drawn
    keys: dict[str, DrawConfig]
    seed: Seed = 0  # of the draws, not of the trainings

    def __post_init__(self) -> None:
        if not self.keys:
            raise ConfigError("keys: empty; expected a key of the recipe at least")


@dataclass(frozen=True)
class MethodConfig:
    """One method (a label in figures and tables): a recipe of training, and the settings of it that are tried.

    grid: every combination of the values. Without grid and random: the recipe as it is.
    """

    recipe: Place  # a file of `mirage train`
    overrides: list[str] = field(default_factory=list)  # words `key=value`, the same for all of its settings
    grid: dict[str, list[Any]] | None = None
    random: RandomConfig | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and self.random is not None:
            raise ConfigError("random: stands in place of grid; leave one of the two out")
        if self.grid is not None and not self.grid:
            raise ConfigError("grid: empty; expected a key of the recipe with its values, or leave grid out")
        for key, values in (self.grid or {}).items():
            if not values:
                raise ConfigError(f"grid.{key}: no value; the grid is empty")
        fixed = {word.partition("=")[0].strip() for word in self.overrides}
        for key in self.keys:
            if key in OWN_KEYS:
                way = "list seeds under `seeds` of the sweep" if key == "seed" else "leave it out"
                raise ConfigError(f"{self.place}.{key}: the sweep itself sets {key} for each point; {way}")
            if key in fixed:
                raise ConfigError(f"overrides: {key} is set here, and {self.place} sets it too; leave one of them out")
        if own := fixed & set(OWN_KEYS):
            raise ConfigError(f"overrides: the sweep itself sets {sorted(own)[0]} for each point; leave it out")

    @property
    def place(self) -> str:
        """Where the swept keys stand in the recipe of the sweep."""
        return "grid" if self.random is None else "random.keys"

    @property
    def keys(self) -> list[str]:
        """The swept keys."""
        return list(self.grid or (self.random.keys if self.random else {}))


@dataclass(frozen=True)
class EvaluationConfig:
    """A suite that every point is asked after its training; the recipe's model has to be `run.dir`'s own."""

    recipe: Place  # a file of `mirage eval`
    overrides: list[str] = field(default_factory=list)  # words `key=value`


@dataclass(frozen=True)
class _Axis:
    """What one axis of the frontier shows of a suite. condition: a key of metrics.json, such as clean or what_k3."""

    suite: Name | None = None  # default: the only suite
    set: Name | None = None  # default: the first set of the measure's kind
    condition: str = "clean"


@dataclass(frozen=True)
class ForgetConfig(_Axis):
    """What must be forgotten: asr, the unsafe questions that are answered harmfully; refusal, those refused."""

    measure: Literal["asr", "refusal"] = "asr"  # see the table in docs/sweeps.md


@dataclass(frozen=True)
class RetainConfig(_Axis):
    """What must stay: right answers to safe questions (utility), near the forgotten knowledge (locality) or of a
    benchmark (accuracy), or few refusals of safe questions (rr).
    """

    measure: Literal["utility", "rr", "locality", "accuracy"] = "utility"  # see the table in docs/sweeps.md


@dataclass(frozen=True)
class FrontierConfig:
    """The forget–retain frontier, and the level of the retain measure at which methods are compared.

    Choose the level before you look: `margin` below the base model's value (above it for rr), or `level` itself.
    """

    forget: ForgetConfig = field(default_factory=ForgetConfig)
    retain: RetainConfig = field(default_factory=RetainConfig)
    margin: Share = 0.05  # how far below the base model's value the retain measure may be
    level: Share | None = None  # the least value of the retain measure, in place of margin


@dataclass(frozen=True)
class SweepRecipe:
    """`mirage sweep`: everything that decides a sweep (see docs/sweeps.md).

    name: of the sweep, its directory belongs to it; also the W&B group of its runs. every: overrides of all recipes,
    before the methods' and evaluations' own. base: the model that training starts from, evaluated as `base`; default:
    `model.path` of the methods' recipes, when it is one.
    """

    name: Name
    out: Place  # the directory of the sweep: its points, logs and report
    methods: dict[Name, MethodConfig]
    seeds: list[Seed] = field(default_factory=lambda: [0])  # every setting is trained with each of them
    every: list[str] = field(default_factory=list)
    evaluate: list[EvaluationConfig] = field(default_factory=list)
    frontier: FrontierConfig | None = None
    base: Place | None = None
    ranks: Count = 1  # processes of a training

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("methods: empty; expected one at least")
        for name in self.methods:
            if name == BASE:
                raise ConfigError(f"methods.{BASE}: is the name of the model that training starts from; choose another")
            if len(name) > LONGEST_METHOD:
                raise ConfigError(f"methods.{name}: the name has {len(name)} characters; at most {LONGEST_METHOD}")
        if not self.seeds:
            raise ConfigError("seeds: empty; expected one at least")
        if repeated := [seed for seed in dict.fromkeys(self.seeds) if self.seeds.count(seed) > 1]:
            raise ConfigError(f"seeds: {repeated[0]} stands there twice")
        if own := {word.partition("=")[0].strip() for word in self.every} & set(OWN_KEYS):
            raise ConfigError(f"every: the sweep itself sets {sorted(own)[0]} for each point; leave it out")
        if self.frontier is not None and not self.evaluate:
            raise ConfigError("frontier: there is nothing to measure without `evaluate`, a recipe of evaluation")
