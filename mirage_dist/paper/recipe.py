"""The recipe of `mirage paper`: which recipes make one published table, in which order."""

from __future__ import annotations

from dataclasses import dataclass, field

from mirage_dist.schema.data import WorldConfig
from mirage_dist.schema.errors import ConfigError
from mirage_dist.schema.names import Name, Place
from mirage_dist.schema.numbers import Count, Seed


@dataclass(frozen=True)
class LinkConfig:
    """A recipe of the chain and its overrides. needs: what must be there before it, by the names in `sets`.

    model: that a training starts from, in place of the chain's.
    """

    recipe: Place  # a recipe of `prepare`, `train` or `eval`
    overrides: list[str] = field(default_factory=list)  # of this recipe, as key=value
    needs: list[Name] = field(default_factory=list)
    model: Place | None = None


@dataclass(frozen=True)
class EveryConfig:
    """Overrides of every recipe of a verb: how a scale differs from the published one."""

    train: list[str] = field(default_factory=list)  # overrides of every training
    eval: list[str] = field(default_factory=list)  # overrides of every evaluation
    prepare: list[str] = field(default_factory=list)  # overrides of every preparation


@dataclass(frozen=True)
class PaperRecipe:
    """`mirage paper`: from published data to a table that stands beside the published one (see `paper.chain`).

    Paths of all recipes are relative to `folder`. model: that every training starts from, evaluated as `base`. data:
    datasets of the catalogue that the chain reads. published: the table to compare with (`report/published.json`).
    """

    out: Place  # a folder for the runs and the report, within `folder`
    model: Place
    published: Name
    suites: dict[Name, LinkConfig]  # the first has the attacks
    models: dict[Name, LinkConfig]  # name -> the training that makes it; the table has a row for each
    sets: dict[Name, LinkConfig] = field(default_factory=dict)  # name -> the recipe that makes these data
    harvest: LinkConfig | None = None  # the base model's answers, for those of `sets` that take them
    every: EveryConfig = field(default_factory=EveryConfig)
    data: list[Name] = field(default_factory=list)
    folder: Place = "."  # in which all of the chain runs
    ranks: Count = 8  # processes of a training
    seed: Seed = 0  # of every recipe of the chain
    world: WorldConfig | None = None  # whose files stand in for the published ones (see `embedded.lookalike`)

    def __post_init__(self) -> None:
        if "base" in self.models:
            raise ConfigError("models.base: is the name of the model that training starts from; choose another")
        for name, link in self.models.items():
            if unknown := [need for need in link.needs if need not in self.sets]:
                raise ConfigError(
                    f"models.{name}.needs: {unknown[0]!r} is none of sets ({', '.join(self.sets) or 'none'})"
                )
        if not self.suites:
            raise ConfigError("suites: expected one at least")
