"""A suite's `manifest.json`: what decides its answers, which makes the directory belong to one evaluation.

Workers that start with other settings are refused, so the rows of one directory are always of one evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from omegaconf import OmegaConf

from mirage_dist import config as configs
from mirage_dist import disk, state
from mirage_dist.evals.sharing.files import KEPT
from mirage_dist.schema import ConfigError, EndpointConfig, EvalRecipe
from mirage_dist.schema.data import WorldConfig
from mirage_dist.schema.evaluation import EvalSetConfig

if TYPE_CHECKING:  # so that reports and `--status`, which read manifests, import no heavy library
    from mirage_dist.evals.attacks import Coverage
    from mirage_dist.evals.rows import Settings
    from mirage_dist.evals.worklist import WorkList


class Ids(TypedDict):
    """How many ids there are, and the first ten."""

    count: int
    first: list[str]


class AttackCoverage(TypedDict):
    """asked: samples that have rewrites. unchanged_rewrites: those that equal their question."""

    asked: int
    unchanged_rewrites: int
    samples_without_rewrites: Ids
    unknown_ids_in_file: Ids


class SetCoverage(TypedDict):
    """What became of the records of one set's files. dropped: reason -> number. attacks: by name. commits: dataset of
    the hub -> the commit that was read.
    """

    samples: int
    skipped_records: int
    dropped: dict[str, int]
    renamed: int
    commits: dict[str, str]
    attacks: dict[str, AttackCoverage]


class Manifest(TypedDict):
    """settings: `decided_by`, which a later start must share; everything else describes the first start.

    asks: set -> attack -> number of questions (see `WorkList.asks`). versions: of Python and libraries.
    """

    settings: dict[str, Any]
    chunk_rows: NotRequired[int]
    asks: NotRequired[dict[str, dict[str, int]]]
    model: NotRequired[dict[str, Any]]
    recipe_hash: NotRequired[str]
    sets: NotRequired[dict[str, SetCoverage]]
    versions: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class _Questions:
    """The keys of a recipe that `decided_by` has whole."""

    suite: str
    sets: dict[str, EvalSetConfig]
    seed: int
    world: WorldConfig | None


OF_THE_RECIPE = ("suite", "sets", "seed", "world")


def decided_by(recipe: EvalRecipe, settings: Settings) -> dict[str, Any]:
    """Everything that decides the rows of a suite. Batch size, judges and the place of files do not."""
    tree = configs.to_dict(recipe)
    return {**{name: tree[name] for name in OF_THE_RECIPE}, **settings}


def describe(recipe: EvalRecipe, work: WorkList, decided: Mapping[str, Any], versions: Mapping[str, str]) -> Manifest:
    """The manifest of an evaluation that starts now."""
    return {
        "settings": dict(decided),
        "chunk_rows": recipe.generation.batch_size,
        "asks": work.asks,
        "model": configs.to_dict(recipe.model),
        "recipe_hash": recipe_hash(recipe),
        "sets": coverage(work),
        "versions": dict(versions),
    }


def claim(suite: Path, manifest: Manifest) -> Manifest:
    """Make `suite` this evaluation's directory, or check that it already is; returns the manifest in it.

    Raises ConfigError that names each of `manifest["settings"]` in which the existing manifest differs.
    """
    file = suite / "manifest.json"
    if not file.exists():
        with disk.refusals(suite, KEPT):
            if disk.create(file, state.sealed("suite", manifest, indent=1), private=True):
                return manifest
    check(suite, manifest["settings"])
    return read(suite)


def check(suite: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError when `suite` is another evaluation's directory, and name each of the settings that differ; and
    when no evaluation has begun there, but a file lies where it would be written, such as the recipe itself.
    """
    if not (suite / "manifest.json").exists():
        if (suite / "config.yaml").exists() and not (suite / "rows").exists():
            raise ConfigError(
                f"{suite / 'config.yaml'} exists, and no evaluation wrote it; choose another run.dir or `suite`, or "
                "move it away"
            )
        return
    if changed := configs.differences(_plain(settings), _completed(read(suite)["settings"])):
        raise ConfigError(
            f"{suite} holds answers of another evaluation: {'; '.join(changed)}. Choose another `suite` "
            "name, or move that directory away"
        )


def _completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a manifest, perhaps an earlier version's, with the defaults of keys that came since."""
    own = {name: settings[name] for name in OF_THE_RECIPE if name in settings}
    with suppress(ConfigError):  # what today's schema cannot read differs, and is named
        tree = OmegaConf.create(configs.literal(own))
        own = _plain(configs.to_dict(configs.from_tree(tree, [], _Questions, "manifest")))
    return {**settings, **own}


def read(suite: Path) -> Manifest:
    """Raises FileNotFoundError when the suite has no manifest, and RunError for one that is damaged or edited."""
    remedy = (
        "Move it away and start the evaluation again, which writes it anew; answers that are on disk count as before"
    )
    return cast(Manifest, state.read("suite", suite / "manifest.json", remedy))


def recipe_hash(recipe: EvalRecipe) -> str:
    """Equal for evaluations that ask the same questions in the same way, whose results are therefore comparable."""
    others = [
        "run",
        "follow",
        "wandb_outputs",
        "erasure",
        "model.path",
        "model.run",
        "model.step",
        *_endpoint_fields(recipe),
        "generation.batch_size",
        "generation.gpu_memory_utilization",
        "generation.tensor_parallel",
        "judges",
        "labels",
        "defences",
        "seed",
        "world",
    ]
    if recipe.template.defence is None:
        others.append("template.defence")  # as before there was this key
    return configs.config_hash(recipe, ignore=others)


def _endpoint_fields(recipe: EvalRecipe) -> list[str]:
    """The keys of an endpoint that do not decide how it is asked, or leave that as it is for every model."""
    decide = ("temperature", "max_tokens", "max_completion_tokens", "extra")
    usual = EndpointConfig()
    others = [own.name for own in fields(EndpointConfig) if own.name not in decide]
    others += [name for name in decide if getattr(recipe.model, name) == getattr(usual, name)]
    return [f"model.{name}" for name in (*others, "price")]


def coverage(work: WorkList) -> dict[str, SetCoverage]:
    """What became of the records of each set: numbers, and the first ids of each kind of miss."""
    return {
        name: {
            "samples": work.samples(name),
            "skipped_records": source.skipped,
            "dropped": dict(source.dropped),
            "renamed": source.renamed,
            "commits": source.commits,
            "attacks": {title: _of_attack(own) for title, own in work.coverage[name].items()},
        }
        for name, source in work.sources.items()
    }


def _of_attack(own: Coverage) -> AttackCoverage:
    return {
        "asked": own.covered,
        "unchanged_rewrites": own.unchanged,
        "samples_without_rewrites": _ids(own.without),
        "unknown_ids_in_file": _ids(own.unknown),
    }


def _ids(ids: Sequence[str]) -> Ids:
    return {"count": len(ids), "first": list(ids[:10])}


def _plain(tree: Any) -> Any:
    """As JSON reads it back: tuples become lists."""
    return json.loads(json.dumps(tree))
