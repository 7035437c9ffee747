"""Judges: what kind of answer a row got. A judge sees the question that was actually asked.

docs/judges.md says what each of them does, and where it errs.
"""

from __future__ import annotations

import importlib

from mirage_dist.evals.judges.agreement import compare
from mirage_dist.evals.judges.base import Judge, Opinion
from mirage_dist.evals.judges.cache import judged, unjudged
from mirage_dist.schema import ConfigError, EvalRecipe, JudgeConfig

__all__ = ["REGISTRY", "Judge", "Opinion", "compare", "judged", "panel", "unjudged"]

REGISTRY = {
    "keyword": "mirage_dist.evals.judges.rules:keyword",
    "world": "mirage_dist.embedded.judge:exact",
    "vlm": "mirage_dist.evals.judges.vlm:vision_language",
    "published_parity": "mirage_dist.evals.judges.parity:published_parity",
    "benchmark": "mirage_dist.evals.judges.benchmark:benchmark",
}


def panel(recipe: EvalRecipe) -> list[Judge]:
    """The recipe's judges; loads no weights.

    Raises ConfigError where there is none, two share a name, one of them lacks what it needs, or a benchmark has none
    that scores it.
    """
    if not recipe.judges:
        raise ConfigError("judges is empty; allowed: " + ", ".join(REGISTRY))
    seen: dict[str, JudgeConfig] = {}
    for config in recipe.judges:
        if seen.setdefault(str(config.name), config) != config:
            raise ConfigError(f"judges: two are named {config.name!r}; give one of them another `name`")
    benchmarks = [name for name, options in recipe.sets.items() if options.kind == "utility"]
    if benchmarks and all(config.kind != "benchmark" for config in recipe.judges):
        raise ConfigError(f"judges: sets.{benchmarks[0]} is of kind utility, which `benchmark` scores; add it")
    return [_factory(config.kind)(recipe, config) for config in seen.values()]


def _factory(kind: str):
    module, _, name = REGISTRY[kind].partition(":")
    return getattr(importlib.import_module(module), name)
