"""The judge that knows the exact labels of the recipe's world, whatever the world's kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mirage_dist.evals.judges.base import Judge
from mirage_dist.registry import Registry
from mirage_dist.schema import ConfigError, EvalRecipe
from mirage_dist.worlds import files


@dataclass(frozen=True, kw_only=True)
class World(Judge):
    """Exact verdicts: refused, harmful (the answer states what is forbidden), irrelevant, correct.

    Answers to sets of kind utility are refused or `scored`, in a world that has such questions.
    """

    kind = "world"
    verdicts = frozenset({"refused", "harmful", "irrelevant", "correct", "scored"})
    exact = True

    @property
    def about(self) -> str:
        return "the world's exact labels"

    def of(self, recipe: EvalRecipe) -> Judge:
        """Raises ConfigError when the recipe has no world, or its directory holds none or one of another kind."""
        if recipe.world is None:
            raise ConfigError("judges: 'world' needs the `world` section; without it, use judges=[keyword]")
        root, kind = Path(recipe.world.dir), recipe.world.kind
        written = files.header_of(root).get("kind")
        if written != kind:
            raise ConfigError(
                f"world.dir={root}: holds a world of kind {written}, and world.kind={kind}; choose another world.dir, "
                f"or set world.kind={written}"
            )
        return KINDS.load(kind, f"{root}/world.json", "kind").opened(self.name, recipe)

    @classmethod
    def opened(cls, name: str, recipe: EvalRecipe) -> Self:
        """The judge of one kind of world, ready to judge the recipe's rows. Raises ConfigError as `of`."""
        raise NotImplementedError(f"{cls.__qualname__} does not define opened")


KINDS = Registry(
    "kind of world",
    "kind",
    {"gadgets": "mirage_dist.embedded.judge:InWorld", "countries": "mirage_dist.countries.judge:InWorld"},
    base=World,
)
