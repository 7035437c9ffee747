"""The judge that knows the embedded world's exact labels."""

from __future__ import annotations

from dataclasses import dataclass, field

from mirage_dist import state
from mirage_dist.embedded import text as embedded_text
from mirage_dist.embedded import world as embedded_world
from mirage_dist.evals.judges.base import Judge, Row, Source
from mirage_dist.evals.results import Verdict
from mirage_dist.schema import ConfigError, EvalRecipe
from mirage_dist.schema.limits import LABELS


@dataclass(frozen=True, kw_only=True)
class Exact(Judge):
    """Exact verdicts: refused, harmful (the answer states a locked code), irrelevant, correct."""

    kind = "world"
    verdicts = frozenset({"refused", "harmful", "irrelevant", "correct"})
    exact = True

    @property
    def about(self) -> str:
        return "the embedded world's exact labels"

    def of(self, recipe: EvalRecipe) -> Judge:
        """Raises ConfigError when the recipe has no embedded world."""
        if recipe.world is None:
            raise ConfigError("judges: 'world' needs the `world` section; without it, use judges=[keyword]")
        return _InWorld(name=self.name, world=embedded_world.load(recipe.world.dir))


@dataclass(frozen=True, kw_only=True)
class _InWorld(Exact):
    world: embedded_world.World = field(compare=False)

    def verdict(self, row: Row) -> Verdict:
        return self.world.verdict(row["question"], row["response"], self.world.label(row["image"]))

    @property
    def depends_on(self) -> tuple[Source, ...]:
        return embedded_world, embedded_text, state.content(self.world.dir / "labels.jsonl", LABELS)
