"""Judges: what kind of answer the model gave. A judge sees the question as the model received it.

A new judge is one file with one dataclass, and one line in `REGISTRY`, or `module:Class` from outside the package; its
fields are its options in the recipe. docs/judges.md describes each judge and its known errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mirage_dist.evals.judges.base import Judge, Opinion
from mirage_dist.evals.judges.cache import judged, require_verdicts, unjudged
from mirage_dist.evals.judges.errors.agreement import compare
from mirage_dist.registry import Registry
from mirage_dist.schema import ConfigError, EvalRecipe
from mirage_dist.schema.names import NAME

__all__ = [
    "REGISTRY",
    "Judge",
    "Opinion",
    "compare",
    "judged",
    "make",
    "panel",
    "read",
    "require_verdicts",
    "unjudged",
]

REGISTRY = Registry(
    "judge",
    "kind",
    {
        "keyword": "mirage_dist.evals.judges.rules:Keyword",
        "world": "mirage_dist.evals.judges.world:World",
        "vlm": "mirage_dist.evals.judges.vlm:VisionLanguage",
        "preset": "mirage_dist.evals.judges.presets.preset:Preset",
        "published_parity": "mirage_dist.evals.judges.parity:PublishedParity",
        "benchmark": "mirage_dist.evals.judges.benchmark:Benchmark",
    },
    base=Judge,
)


def make(options: str | Mapping[str, Any], source: str, key: str) -> Judge:
    """The judge that `options` describes: its kind as a bare word, or a mapping of `kind`, `name` and its fields.

    Raises ConfigError for an unknown kind, field or value, and for a name that cannot be a file's.
    """
    if not isinstance(options, str | Mapping):
        raise ConfigError(f"{source}: {key}={options!r}: expected a kind of judge, or a mapping with `kind`")
    judge: Judge = REGISTRY.make({"kind": options} if isinstance(options, str) else options, source, key)
    name = judge.name or judge.default_name
    NAME(name, f"{source}: {key}.name")
    return replace(judge, name=name)


def read(recipe: EvalRecipe) -> list[Judge]:
    """The recipe's judges as it describes them; opens no file. `panel` makes them ready.

    Raises ConfigError when there is none, when two have one name, when a benchmark has no judge
    that scores it, and as `make` does.
    """
    if not recipe.judges:
        raise ConfigError("judges is empty; expected some of " + ", ".join(REGISTRY))
    judges: dict[str, Judge] = {}
    places: dict[str, int] = {}
    for number, options in enumerate(recipe.judges):
        judge = make(options, "the recipe", f"judges[{number}]")
        name = judge.name.lower()  # some file systems do not tell cases apart
        if name in judges:
            raise ConfigError(
                f"judges[{places[name]}] and judges[{number}] are both named {judge.name!r}; remove one, or give it "
                "another `name`"
            )
        judges[name], places[name] = judge, number
    benchmarks = [name for name, options in recipe.sets.items() if options.kind == "utility"]
    if benchmarks and all("scored" not in judge.verdicts for judge in judges.values()):
        raise ConfigError(f"judges: sets.{benchmarks[0]} is of kind utility, which `benchmark` scores; add it")
    return list(judges.values())


def panel(recipe: EvalRecipe) -> list[Judge]:
    """The recipe's judges, ready to judge its rows; loads no weights.

    Raises ConfigError as `read` and the judges' `of` do.
    """
    return [judge.of(recipe) for judge in read(recipe)]
