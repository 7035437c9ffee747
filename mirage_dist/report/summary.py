"""The content of `summary.json`, as types."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from mirage_dist.evals.results import Entry
from mirage_dist.report.compare import Comparison
from mirage_dist.report.curves.budgets import Budget


class Provenance(TypedDict, total=False):
    """What a caller of `report.report` may add to the summary.

    world: the world's options. wall_seconds: of all stages. config_hash: SHA-256 over the stages' recipes.
    raw: rates of the world's initial model, before any training. perplexity: model -> on plain English, the initial
    model's as `init`.
    """

    seed: int
    world: dict[str, Any] | None
    wall_seconds: float | None
    config_hash: str | None
    raw: Entry
    perplexity: dict[str, float]


class Summary(TypedDict):
    """`summary.json`: the headline figures of every model, and the paired tests between every two.

    models: model -> its headline judge's entry. budgets: success against draws or steps, of attacks that have a budget.
    judges: model -> its headline judge. seed, world, wall_seconds, config_hash, raw, perplexity: see `Provenance`; by
    default seed and world are the first run's. problems: what the report lacks, in sentences; empty for a whole one.
    cautions: what a reader must know before its rates, in sentences.
    """

    models: dict[str, Entry]
    comparisons: list[Comparison]
    budgets: list[Budget]
    seed: int
    world: dict[str, Any] | None
    wall_seconds: float | None
    config_hash: str | None
    suite: str
    judges: dict[str, str]
    problems: list[str]
    cautions: list[str]
    raw: NotRequired[Entry]
    perplexity: NotRequired[dict[str, float]]
