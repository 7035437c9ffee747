"""What can be wrong with a run before weights load: the recipe by itself, then the model's parts and the data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mirage_dist import objectives, runs
from mirage_dist.data import audit, sources
from mirage_dist.data.sample import Sample
from mirage_dist.data.sources import Source
from mirage_dist.model import directory, load, trainable, weights
from mirage_dist.model.adapters import quantization
from mirage_dist.model.families import guard
from mirage_dist.objectives.base import Needs, Objective
from mirage_dist.progress import log
from mirage_dist.ranks import Group, everyones, together
from mirage_dist.schema import ConfigError, TrainConfig, TrainRecipe
from mirage_dist.train import engine, monitor, rundir
from mirage_dist.train.feed import Feed, encoder_of
from mirage_dist.train.measures import profiler, validation
from mirage_dist.train.optimizers.groups import split
from mirage_dist.train.planning import batch
from mirage_dist.train.planning.streams import check_streams, read_streams

# Rows of each stream that are taken to fit where the memory of the device is not known, as on a CPU.
UNMEASURED = 8


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


def check_recipe(recipe: TrainRecipe, ranks: int, node: int | None = None) -> Checked:
    """Check objective, streams, reference, DeepSpeed JSON, batch and run directory.

    node: the ranks of a node, where that is known. Reads neither data nor model, so it can come before an embedded
    world is made. Raises ConfigError.
    """
    objective = objectives.base.make(recipe.objective)
    needs = objective.needs
    monitor.check(recipe)
    check_streams(recipe, needs)
    validation.check(recipe, needs)
    profiler.check(recipe.monitor.profile, ranks)
    check_reference(recipe, needs)
    config = engine.deepspeed_config(divided(recipe, needs, ranks), ranks, len(needs.streams), node)
    rundir.check_directory(recipe, needs)
    return Checked(recipe, ranks, objective, config)


def check_inputs(checked: Checked, with_weights: bool = False) -> dict[str, Source]:
    """`check_model`, and the samples of every stream; opens no picture. Raises ConfigError."""
    check_model(checked, with_weights)
    return read_streams(checked.recipe, checked.needs)


def check_model(checked: Checked, with_weights: bool) -> None:
    """Check the model's parts that the recipe names, and log what trains.

    with_weights: whether the directory must have weights; a configuration is enough for a check or a plan. Loads no
    weights. Raises ConfigError.
    """
    recipe, needs = checked.recipe, checked.needs
    if quantization.wanted(recipe.model):
        quantization.check(checked.deepspeed["zero_optimization"]["stage"])
    check_weights(recipe, needs, with_weights)
    policy = load.check_names(recipe.model, recipe.data, needs.layers, needs.depth, recipe.train.dtype)
    split(policy, recipe.train)
    log.info(f"{Path(recipe.run.dir).name}: {trainable.summary(policy.hf)}")


def resolved(recipe: TrainRecipe, processor: Any, planned: bool = False) -> TrainRecipe:
    """The recipe with every `auto` that depends on the model replaced by what it means here (see `load.resolved`)."""
    return replace(recipe, data=load.resolved(recipe.model, recipe.data, recipe.train.dtype, processor, planned))


def agreed(recipe: TrainRecipe, processor: Any, group: Group) -> TrainRecipe:
    """`resolved`, the same on every rank: packed where all of them pack, and in a run that has begun, as it began.

    GPUs of two kinds, or another one at a later start, would else make other batches. Every rank calls this.
    """
    begun = together(group, lambda: runs.manifest(Path(recipe.run.dir)))
    if recipe.data.packing == "auto" and begun is not None:
        recipe = replace(recipe, data=replace(recipe.data, packing=begun["packed"]))
    own = resolved(recipe, processor)
    packed = all(everyones(group, own.data.packing))
    if own.data.packing and not packed:
        log.info("data.packing=auto: padded after all, since it is so on another rank")
    return replace(own, data=replace(own.data, packing=packed))


def divided(recipe: TrainRecipe, needs: Needs, ranks: int, largest_that_fits: int = UNMEASURED) -> TrainRecipe:
    """The recipe with `train.micro_batch: auto` replaced by the number for so many ranks (see `batch.choose`).

    Raises ConfigError where the loss depends on the micro-batch, and as `batch.choose`.
    """
    train = recipe.train
    if train.micro_batch != "auto":
        return recipe
    if needs.depends_on_micro_batch(recipe.data.packing is True):
        raise ConfigError(
            f"train.micro_batch=auto: the loss of objective {recipe.objective['name']} with these options depends on "
            "the micro-batch, so another number of GPUs would train another model; give a number"
        )
    rows = batch.choose(train.global_batch, ranks, largest_that_fits)
    return replace(recipe, train=replace(train, micro_batch=rows))


def check_samples(checked: Checked) -> str:
    """All that a start checks before weights load, in words. Raises ConfigError."""
    streams, alone = check_inputs(checked), Group(0, 0, 1, torch.device("cpu"))
    feed, cut = check_batches(checked, streams, alone)
    held_out = validation.of(feed, streams, alone)
    cut += held_out.cut if held_out is not None else 0
    rundir.check_data(Path(checked.recipe.run.dir), rundir.describe_streams(streams))
    warn(checked, [*audit_warnings(checked, streams), *feed.unwritable])
    kinds = check_family(feed)
    counts = ", ".join(f"{name} {len(source.samples)}" for name, source in streams.items())
    return f"samples: {counts}; {cut} answers to be cut; {feed.steps} steps; computed on a small model: {kinds}"


def check_batches(
    checked: Checked,
    streams: Mapping[str, Source],
    group: Group,
    largest_that_fits: Callable[[Feed], int] = lambda feed: UNMEASURED,
) -> tuple[Feed, int]:
    """Check every picture and the length of every sample, each rank its share, with the model's processor.

    largest_that_fits: rows for `train.micro_batch: auto`, once lengths are known (see `planning.fitting`). Returns the
    feed, of the resolved recipe, and how many answers will be cut. Raises ConfigError on every rank.
    """
    processor = load.processor(checked.recipe.model)
    recipe = agreed(checked.recipe, processor, group)
    refusals = encoder_of(recipe, processor).refusals
    sources.check_pictures(streams, group.rank, group.size, lambda own: everyones(group, own), refusals)
    feed = Feed(recipe, checked.needs, streams, processor)
    cut = feed.check_lengths(group)
    check_balance(feed)
    divide(feed, checked, largest_that_fits)
    return feed, cut


def check_balance(feed: Feed) -> None:
    """Log how `data.balance` draws the samples. Raises ConfigError where it cannot."""
    if feed.balance is not None:
        log.info(feed.balance.text)
        for text in feed.balance.uneven:
            log.warning(text)


def divide(feed: Feed, checked: Checked, largest_that_fits: Callable[[Feed], int] = lambda feed: UNMEASURED) -> None:
    """Replace `train.micro_batch: auto` in the feed's recipe by a number, and log it.

    largest_that_fits: see `check_batches`. Raises as `divided`.
    """
    if feed.recipe.train.micro_batch == "auto":
        feed.recipe = divided(feed.recipe, checked.needs, checked.ranks, largest_that_fits(feed))
        log.info(f"train.micro_batch=auto: {_division(feed.recipe.train, checked.ranks)}")


def _division(train: TrainConfig, ranks: int) -> str:
    """How the global batch is divided, in words."""
    steps = train.global_batch // (train.rows * ranks)
    return (
        f"{train.rows} rows of each stream at once on {ranks} rank{'s' * (ranks > 1)}, {steps} such micro-batch"
        f"{'es' * (steps > 1)} a step (train.global_batch={train.global_batch})"
    )


def check_family(feed: Feed) -> str:
    """Compute batches on a small model of the model's classes (see `families.guard`): which kinds, in words.

    Batches are of the data's shortest samples, pictured, mixed and of text alone. What goes wrong with a kind of sample
    that the data lack is logged as a warning. Call `Feed.check_lengths` first. Raises ConfigError.
    """
    model, encoder = feed.recipe.model, feed.encoder
    config, attention = load.configuration(model), load.attention(model, feed.recipe.train.dtype)
    measured = attention if attention in ("eager", "sdpa") else None  # flash-attention has no kernel for the CPU
    pictured, text = (_shortest(feed, shown) for shown in (True, False))
    if (fault := guard.fault(config, encoder, pictured, text, measured)) is not None:
        raise ConfigError(f"model.path={model.path}: {fault}")
    if encoder.text_only:
        return "batches of text"
    if pictured and text:
        return "pictured, mixed and text-only batches"
    with tempfile.TemporaryDirectory() as folder:
        own = "pictured" if pictured else "text-only"
        if pictured:
            text = [replace(sample, image=None) for sample in pictured]
        else:
            pictured = [replace(sample, image=_blank(Path(folder), n)) for n, sample in enumerate(text)]
        try:
            fault = guard.fault(config, encoder, pictured, text, measured)
        except ConfigError as error:
            fault = str(error)
    if fault is not None:
        log.warning(f"model.path={model.path}: {fault} (only {own} samples are in these data; they are in order)")
        return f"{own} batches"
    return f"{own} batches, and made-up mixed ones"


def _shortest(feed: Feed, shown: bool) -> list[Sample]:
    """Up to two different samples with (or without) a picture, of those with the fewest tokens."""
    lengths, places = [], []
    for name in feed.samples:
        own = np.flatnonzero(feed.shown(name) == shown)
        lengths.append(feed.lengths[name][own])
        places += [(name, number) for number in own]
    shortest = np.argsort(np.concatenate(lengths), kind="stable")[:16]
    samples = [feed.samples[name][int(number)] for name, number in (places[i] for i in shortest)]
    return list({sample.digest(): sample for sample in samples}.values())[:2]


def _blank(folder: Path, number: int) -> str:
    """A picture of one colour; those of different numbers have different sizes."""
    file = folder / f"{number}.png"
    Image.new("RGB", (64 + 32 * number, 64), "gray").save(file)
    return str(file)


def check_weights(recipe: TrainRecipe, needs: Needs, required: bool) -> None:
    """Check the files of the model directory, and that its weights are whole, by their headers.

    required: whether there must be weights. Raises ConfigError.
    """
    folder = directory.check(recipe.model.path, weights=required)
    if directory.has_weights(folder):
        weights.check(folder, load.configuration(recipe.model, needs.depth))
    else:
        log.warning(f"model.path={folder}: no weights here yet; only the configuration was checked")


def audit_warnings(checked: Checked, streams: Mapping[str, Source]) -> list[str]:
    """What imitating these samples may teach instead (see `data.audit`), and held-out samples that train."""
    refusals = checked.recipe.data.refusals
    counted = {name: audit.Imitated(refusals).add(streams[name].samples) for name in checked.needs.audited}
    return [*imitated_warnings(checked, counted), *validation.warnings(streams)]


def imitated_warnings(checked: Checked, counted: Mapping[str, audit.Imitated]) -> list[str]:
    """What imitating the samples of these streams may teach instead. counted: stream -> counts of all its samples.

    First words that are balanced are no such thing: the audit counts samples, not draws (see `check_balance`).
    """
    drawn = checked.recipe.data.balance is not None
    texts = {name: counts.warning(first_words=not drawn) for name, counts in counted.items()}
    return [f"data.streams.{name} {text}" for name, text in texts.items() if text is not None]


def warn(checked: Checked, warnings: Sequence[str]) -> None:
    """Log the objective's cautions, and `audit_warnings`."""
    for caution in checked.objective.cautions:
        log.warning(f"objective {checked.recipe.objective['name']}: {caution}")
    for text in warnings:
        log.warning(text)


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
    if kind == "cache" and (needs.distributions or needs.ref_activation):
        raise ConfigError(
            "reference=cache holds log-probabilities only, but this objective compares whole distributions or "
            "activations; use engine" + (" or adapters_off" if lora is not None else "")
        )
