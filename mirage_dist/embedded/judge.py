"""The judge that knows the embedded world's exact labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from mirage_dist.embedded import text as embedded_text
from mirage_dist.embedded import world as embedded_world
from mirage_dist.evals.judges.base import Row, Source, judged_picture
from mirage_dist.evals.judges.world import World
from mirage_dist.evals.results import Verdict
from mirage_dist.schema import ConfigError, EvalRecipe
from mirage_dist.worlds import files


@dataclass(frozen=True, kw_only=True)
class InWorld(World):
    """Exact verdicts: refused, harmful (the answer states a locked code), irrelevant, correct."""

    verdicts = frozenset({"refused", "harmful", "irrelevant", "correct"})

    of_world = "the embedded world"

    world: embedded_world.World = field(compare=False)

    @classmethod
    def opened(cls, name: str, recipe: EvalRecipe) -> Self:
        """Raises ConfigError when a set is of kind utility, of which this world has no questions."""
        if scored := [title for title, options in recipe.sets.items() if options.kind == "utility"]:
            raise ConfigError(
                f"sets.{scored[0]}: the embedded world has no questions of kind utility; evaluate this set in a recipe "
                "without judges=[world], by `benchmark`"
            )
        assert recipe.world is not None
        return cls(name=name, world=embedded_world.load(recipe.world.dir))

    def verdict(self, row: Row) -> Verdict:
        return self.world.verdict(row["question"], row["response"], self.world.label(judged_picture(row) or ""))

    @property
    def depends_on(self) -> tuple[Source, ...]:
        return embedded_world, embedded_text, files.labels_of(self.world.dir)
