"""From a committed checkpoint to an ordinary Hugging Face model directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mirage_dist import disk, ranks, runs
from mirage_dist.model import directory, load, weights
from mirage_dist.model.adapters import files
from mirage_dist.model.adapters.quantization import unquantized
from mirage_dist.model.exports import card, merged, whole
from mirage_dist.model.exports.card import Evaluation
from mirage_dist.model.families import roles
from mirage_dist.model.shards import MANIFEST, Shards, committed, damage, read_manifest, step_of
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.ranks import Group, no_bars_in_logs
from mirage_dist.schema import ConfigError, RunError, TrainRecipe, check_form

Form = Literal["merged", "adapter", "both"]
ALONE = Group(0, 0, 1, torch.device("cpu"))


def export(
    run: Path,
    out: Path,
    step: int | None = None,
    workspace: Path | None = None,
    form: Form = "merged",
    group: Group = ALONE,
    base: str | None = None,
    evaluations: Callable[[Path, Path], Sequence[Evaluation]] | None = None,
) -> None:
    """Write the model of a run's checkpoint (the newest, or of `step`) to `out`; every rank of `group` calls this.

    form: `merged`, the whole model, with adapters merged into the weights (a 4-bit base is loaded in the dtype of
    training for it); `adapter`, a peft adapter, without the base model; `both`, the whole model and `out`/adapter.
    Weights have the dtype of training; each file of them is written by one rank, which holds one tensor at a time. The
    files of processor, tokenizer and chat template are copies of the base model's. The result loads with
    `from_pretrained` of the base's auto class. Its card, README.md, says how it was made. The base model's licence
    files go with its weights. It is written in `workspace` (default: beside `out`) and renamed.
    base: the base model's name on the hub, by which card and adapter name it in place of its path. evaluations: those
    for the card, of (the folder under way, the checkpoint); rank 0 calls it last.
    Raises ConfigError when the checkpoint does not exist or is damaged, the base weights have changed or are not whole,
    `out` exists, or when the run has no adapter to write, or trained parameters that an adapter does not hold; RunError
    when a rank cannot write its part.
    """
    recipe = ranks.on_main(group, lambda: _checked(run, out, form))
    assert recipe is not None
    checkpoint = chosen(run / "checkpoints", step, group=group)
    ranks.on_main(group, lambda: _check_base(run, recipe, checkpoint))
    no_bars_in_logs(group.rank)
    with disk.folder(out, workspace=workspace) if group.main else nullcontext() as own:
        partial = ranks.from_main(group, own)
        assert partial is not None
        if form != "adapter":
            _write_merged(partial, recipe, checkpoint, out, group)
        if form != "merged" and group.main:
            _write_adapter(partial if form == "adapter" else partial / "adapter", recipe, checkpoint, base)
        if group.main:
            subject = _subject(run, recipe, checkpoint, form, base)
            if evaluations is not None:
                subject = replace(subject, evaluations=evaluations(partial, checkpoint))
            (partial / card.FILE).write_text(card.text(subject), encoding="utf-8")


def _checked(run: Path, out: Path, form: Form) -> TrainRecipe:
    """The run's recipe, after a check of the place to write."""
    recipe = runs.recipe(run)
    check_form(recipe.model, form, f"{run}: export as {form}")
    disk.remove_leftovers(out)  # also where it is whole, and nothing is written
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; export to a new directory")
    if Path(os.path.realpath(run / "checkpoints")) in Path(os.path.realpath(out)).parents:
        raise ConfigError(f"{out} is among the run's checkpoints; export to another place")
    return recipe


def _check_base(run: Path, recipe: TrainRecipe, checkpoint: Path) -> None:
    # A damaged file is named before gigabytes are hashed.
    weights.check(directory.check(recipe.model.path), load.configuration(recipe.model))
    if load.base_hash(recipe.model.path) != read_manifest(checkpoint)["base_hash"]:
        raise ConfigError(f"{recipe.model.path}: its files changed since {run} was trained on them")


def _subject(run: Path, recipe: TrainRecipe, checkpoint: Path, form: Form, base: str | None) -> card.Subject:
    """What the card is about."""
    text_only = roles.text_only(load.configuration(unquantized(recipe.model)))
    return card.Subject(
        run,
        recipe,
        step_of(checkpoint),
        disk.sha256(checkpoint / MANIFEST),
        read_manifest(checkpoint)["base_hash"],
        form,
        "text-generation" if text_only else "image-text-to-text",
        base or card.hub_name(recipe.model.path),
    )


def _write_merged(folder: Path, recipe: TrainRecipe, checkpoint: Path, out: Path, group: Group) -> None:
    model, depth = unquantized(recipe.model), read_manifest(checkpoint).get("depth")
    with Shards(checkpoint) as shards:
        plan = merged.planned(model, recipe.train.dtype, depth, shards)
        if plan is not None:
            _write_planned(folder, plan, shards, out, group)
        elif group.main:
            whole.write(folder, model, recipe.train.dtype, depth, shards)
            merged.sums(folder)
    if group.main:
        _check_written(folder, load.configuration(model), out)
        start = directory.resolve(recipe.model.path)
        directory.copy_processing(start, folder)
        for file in (file for pattern in card.TERMS for file in start.glob(pattern) if file.is_file()):
            shutil.copyfile(file, folder / file.name)


def _write_planned(folder: Path, plan: merged.Merged, shards: Shards, out: Path, group: Group) -> None:
    """Each rank writes its files; all end alike, so that nothing is left where one of them fails."""
    files = merged.Files.of(plan, group.size)
    written, fault = {}, None
    try:
        written = merged.write(folder, plan, files, shards, group)
    except (OSError, RunError) as error:
        fault = f"rank {group.rank}: {error}"
    parts = ranks.everyones(group, (written, fault))
    if faults := [other for _, other in parts if other is not None]:
        raise RunError(f"{out}: nothing was exported, since a part could not be written ({faults[0]})")
    if group.main:
        merged.describe(folder, plan)
        merged.index(folder, plan, files, {file: own for part, _ in parts for file, own in part.items()})


def _write_adapter(folder: Path, recipe: TrainRecipe, checkpoint: Path, base: str | None) -> None:
    assert recipe.model.lora is not None
    folder.mkdir(exist_ok=True)
    with Shards(checkpoint) as shards:
        own = {name: shards.whole(name).to(load.DTYPES[recipe.train.dtype]) for name in shards.shapes}
    files.write(folder, base or files.place(recipe.model.path), recipe.model.lora, own)
    merged.sums(folder)


def _check_written(folder: Path, config: Any, out: Path) -> None:
    """Raise RunError unless a model that was just written would load with every weight."""
    try:
        weights.check(folder, config)
    except ConfigError as error:
        raise RunError(f"{out}: nothing was exported, since the result would not load: {error}") from error


def chosen(folder: Path, step: int | None, sha256: Callable[[Path], str] = disk.sha256, group: Group = ALONE) -> Path:
    """The checkpoint of a step, or the newest one; every rank of `group` calls this and reads its share of the files.

    sha256: as in `shards.damage`. Raises ConfigError when there is none, or when it is damaged.

    Training goes on from an older one where the newest is damaged, and makes the later steps again. Nobody who wants
    the model would notice that it is an older one, so here its step has to be named.
    """
    present = [folder / name for name in ranks.from_main(group, [c.name for c in committed(folder)])]
    candidates = [c for c in present if step in (None, step_of(c))]
    if not candidates:
        names = ", ".join(c.name for c in present) or "none"
        raise ConfigError(f"{folder}: no checkpoint{'' if step is None else f' step-{step:06d}'} (there: {names})")
    damaged = ""
    for checkpoint in reversed(candidates):
        faults = ranks.everyones(group, damage(checkpoint, group.rank, group.size, sha256))
        fault = next((own for own in faults if own is not None), None)
        if fault is None:
            if damaged:
                raise ConfigError(
                    f"{damaged}; start the training again, which resumes before it, or name the newest whole one: step "
                    f"{step_of(checkpoint)} (mirage export --step {step_of(checkpoint)}, or model.step in a recipe)"
                )
            return checkpoint
        if (checkpoint / MANIFEST).exists():
            damaged = damaged or f"{checkpoint} is damaged: {fault}"
        else:  # it may be somebody else's folder
            log.warning(f"{checkpoint} is passed over: {fault}", extra=EVERY_RANK)
    raise ConfigError(f"{damaged or f'{folder}: no whole checkpoint'}; nothing was exported")
