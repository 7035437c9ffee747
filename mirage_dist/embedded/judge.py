"""The judge that knows the embedded world's exact labels."""

from __future__ import annotations

from mirage_dist.embedded import text as embedded_text
from mirage_dist.embedded import world as embedded_world
from mirage_dist.evals.judges.base import Row, Rule, fingerprint
from mirage_dist.evals.metrics import Verdict
from mirage_dist.schema import ConfigError, EvalRecipe, JudgeConfig


def exact(recipe: EvalRecipe, config: JudgeConfig) -> Rule:
    """A judge that compares responses with the embedded world's labels (see `World.verdict`).

    Raises ConfigError when the recipe has no embedded world.
    """
    if recipe.world is None:
        raise ConfigError("judges: 'world' needs the `world` section; without it, use judges=[keyword]")
    world = embedded_world.load(recipe.world.dir)

    def judge(row: Row) -> Verdict:
        return world.verdict(row["question"], row["response"], world.label(row["image"]))

    return Rule(
        name=str(config.name),
        kind="world",
        about="the embedded world's exact labels",
        verdicts=frozenset({"refused", "harmful", "irrelevant", "correct"}),
        fingerprint=fingerprint(embedded_world, embedded_text),
        judge=judge,
    )
