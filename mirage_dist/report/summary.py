"""The content of `summary.json`, as types; summary.schema.json beside this file is the same as a JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from mirage_dist.erasure.results import ForgettingResult, UniversalResult
from mirage_dist.evals.results import Entry
from mirage_dist.report.compare import Comparison, Defended
from mirage_dist.report.curves.budgets import Budget
from mirage_dist.report.methods import Method
from mirage_dist.schema import ConfigError, documents

FILE = "summary.json"
# Raised by whatever makes an earlier reader misread the file: a member that goes or changes its meaning. A new member
# does not: readers pass over what they do not know.
SCHEMA_VERSION = 1


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

    schema_version: SCHEMA_VERSION of the package that wrote it; a file without it is of an earlier one, for which
    `read` has no methods, defences and figures. models: model -> its headline judge's entry. methods: runs that differ
    in their seed only, over their seeds. budgets: success against draws or steps, of attacks that have a budget.
    defences: what each defence does to each model, on the same questions.
    judges: model -> its headline judge. seed, world, wall_seconds, config_hash, raw, perplexity: see `Provenance`; by
    default seed and world are the first run's. problems: what the report lacks, in sentences; empty for a whole one.
    cautions: what a reader must know before its rates, in sentences. figures: files of figures beside it.
    universal, forgetting: model -> one perturbation as a test of erasure, and measures of forgetting, where
    `mirage erasure` made them.
    """

    models: dict[str, Entry]
    schema_version: int
    methods: dict[str, Method]
    comparisons: list[Comparison]
    budgets: list[Budget]
    defences: list[Defended]
    seed: int
    world: dict[str, Any] | None
    wall_seconds: float | None
    config_hash: str | None
    suite: str
    judges: dict[str, str]
    problems: list[str]
    cautions: list[str]
    figures: list[str]
    raw: NotRequired[Entry]
    perplexity: NotRequired[dict[str, float]]
    universal: NotRequired[dict[str, UniversalResult]]
    forgetting: NotRequired[dict[str, ForgettingResult]]


def read(file: Path) -> Summary:
    """A `summary.json`, of this version or an earlier one.

    Raises ConfigError, which names the file, where there is none, for one of a newer version, and for what is no
    summary.
    """
    content = documents.read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        raise ConfigError(f"{file}: is no summary of a report: it has no object `models`; make the report again")
    version = content.get("schema_version", 0)
    if not isinstance(version, int) or isinstance(version, bool) or version > SCHEMA_VERSION:
        raise ConfigError(
            f"{file}: has schema_version {version!r}, and this version of mirage_dist reads up to {SCHEMA_VERSION}; "
            "update mirage_dist, or make the report again with this version"
        )
    return cast(Summary, {"methods": {}, "defences": [], "figures": [], **content, "schema_version": version})
