"""What can be wrong with a run before weights load: the recipe by itself, then the model's parts and the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mirage_dist import objectives
from mirage_dist.data import audit, sources
from mirage_dist.data.sources import Source
from mirage_dist.model import directory, load, trainable
from mirage_dist.objectives.base import Needs, Objective
from mirage_dist.progress import log
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train import engine, rundir
from mirage_dist.train.feed import Feed, check_streams, read_streams
from mirage_dist.train.optimizers.groups import split


@dataclass(frozen=True)
class Checked:
    """A recipe that passed `check_recipe` for a number of ranks, and what was made of it.

    deepspeed: the completed DeepSpeed configuration.
    """

    recipe: TrainRecipe
    ranks: int
    objective: Objective
    deepspeed: dict[str, Any]

    @property
    def needs(self) -> Needs:
        return self.objective.needs


def check_recipe(recipe: TrainRecipe, ranks: int) -> Checked:
    """Check objective, streams, reference, DeepSpeed JSON, batch and run directory.

    Reads neither data nor model, so it can come before an embedded world is made. Raises ConfigError.
    """
    objective = objectives.base.make(recipe.objective)
    needs = objective.needs
    check_streams(recipe, needs)
    check_reference(recipe, needs)
    config = engine.deepspeed_config(recipe, ranks, len(needs.streams))
    rundir.check_directory(recipe, needs)
    return Checked(recipe, ranks, objective, config)


def check_inputs(checked: Checked) -> dict[str, Source]:
    """Check the model's parts that the recipe names, log what trains, and read the samples of every stream.

    Loads no weights and opens no picture. Raises ConfigError.
    """
    recipe, needs = checked.recipe, checked.needs
    check_weights(recipe, needs)
    policy = load.check_names(recipe.model, recipe.data, needs.layers, needs.depth)
    split(policy, recipe.train)
    log.info(f"{recipe.model.path}: {trainable.summary(policy.hf)}")
    return read_streams(recipe, needs)


def resolved(recipe: TrainRecipe, processor: Any) -> TrainRecipe:
    """The recipe with every `auto` that depends on the model replaced by what it means here (see `load.resolved`)."""
    return replace(recipe, data=load.resolved(recipe.model, recipe.data, recipe.train.dtype, processor))


def check_samples(checked: Checked) -> str:
    """`check_inputs`, every picture, the length of every sample, and whether an existing run began with these samples.

    Returns the counts in words.

    Raises ConfigError.
    """
    streams = check_inputs(checked)
    sources.check_pictures(streams)
    rundir.check_data(Path(checked.recipe.run.dir), rundir.describe_streams(streams))
    warn(checked, streams)
    processor = load.processor(checked.recipe.model)
    feed = Feed(resolved(checked.recipe, processor), checked.needs, streams, processor)
    cut = feed.check_lengths(Group(0, 0, 1, torch.device("cpu")))
    counts = ", ".join(f"{name} {len(source.samples)}" for name, source in streams.items())
    return f"samples: {counts}; {cut} answers to be cut; {feed.steps} steps"


def check_weights(recipe: TrainRecipe, needs: Needs) -> None:
    """Check the files of the model directory, and that its weights are whole, by their headers.

    A directory without weights is enough for a check and a plan. Raises ConfigError.
    """
    folder = directory.check(recipe.model.path, weights=False)
    if directory.has_weights(folder):
        load.check_weights(recipe.model, needs.depth)
    else:
        log.warning(f"model.path={folder}: no weights here yet; only the configuration was checked")


def warn(checked: Checked, streams: Mapping[str, Source]) -> None:
    """Log the objective's cautions, and what imitating these samples may teach instead (see `data.audit`)."""
    for caution in checked.objective.cautions:
        log.warning(f"objective {checked.recipe.objective['name']}: {caution}")
    for name in checked.needs.audited:
        if (text := audit.warning(streams[name].samples)) is not None:
            log.warning(f"data.streams.{name} fails the audit: {text}")


def check_reference(recipe: TrainRecipe, needs: Needs) -> None:
    """Raise ConfigError for a kind of reference that cannot give what the objective needs."""
    kind, lora = recipe.reference, recipe.model.lora
    if not needs.reference:
        return
    if kind == "adapters_off" and lora is None:
        raise ConfigError("reference=adapters_off requires model.lora; use cache or engine for full fine-tuning")
    if kind == "adapters_off" and lora is not None and lora.also_train:
        raise ConfigError(
            f"reference=adapters_off: model.lora.also_train={lora.also_train} trains parameters that switching the "
            "adapters off does not put back; use cache or engine"
        )
    if kind == "cache" and (needs.kl or needs.ref_activation):
        raise ConfigError(
            "reference=cache holds log-probabilities only, but this objective compares whole distributions or "
            "activations; use engine" + (" or adapters_off" if lora is not None else "")
        )
