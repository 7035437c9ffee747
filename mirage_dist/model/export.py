"""From a committed checkpoint to an ordinary Hugging Face model directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from mirage_dist import config as configs
from mirage_dist import disk, runs
from mirage_dist.model import directory, load, weights
from mirage_dist.model.adapters import files
from mirage_dist.model.adapters.quantization import unquantized
from mirage_dist.model.shards import MANIFEST, Shards, committed, damage, read_manifest, step_of
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.ranks import no_bars_in_logs
from mirage_dist.schema import ConfigError, RunError, TrainRecipe, check_form
from mirage_dist.schema.texts import fill

Form = Literal["merged", "adapter", "both"]
CARD = """---
library_name: {library}
base_model: {base}
---
# {name}

`{base}` after `{objective}` training with mirage_dist: step {step}, recipe hash `{hash}`.
Attack success and rejection rates belong beside this model; a low rate is behaviour, not proof of erasure.
"""


def export(run: Path, out: Path, step: int | None = None, workspace: Path | None = None, form: Form = "merged") -> None:
    """Write the model of a run's checkpoint (the newest, or of `step`) to `out`; needs no process group.

    form: `merged`, the whole model, with adapters merged into the weights (a 4-bit base is loaded in the dtype of
    training for it); `adapter`, a peft adapter, without the base model; `both`, the whole model and `out`/adapter.
    Weights have the dtype of training. The files of processor, tokenizer and chat template are
    copies of the base model's. The result loads with `from_pretrained` of the base's auto class. It is written in
    `workspace` (default: beside `out`) and renamed.
    Raises ConfigError when the checkpoint does not exist or is damaged, the base weights have changed or are not whole,
    `out` exists, or when the run has no adapter to write, or trained parameters that an adapter does not hold.
    """
    recipe = runs.recipe(run)
    check_form(recipe.model, form, f"{run}: export as {form}")
    disk.remove_leftovers(out)  # also where it is whole, and nothing is written
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; export to a new directory")
    if Path(os.path.realpath(run / "checkpoints")) in Path(os.path.realpath(out)).parents:
        raise ConfigError(f"{out} is among the run's checkpoints; export to another place")
    checkpoint = chosen(run / "checkpoints", step)
    manifest = read_manifest(checkpoint)
    # A damaged file is named before gigabytes are hashed.
    weights.check(directory.check(recipe.model.path), load.configuration(recipe.model))
    if load.base_hash(recipe.model.path) != manifest["base_hash"]:
        raise ConfigError(f"{recipe.model.path}: its files changed since {run} was trained on them")
    no_bars_in_logs()
    facts = {"base": recipe.model.path, "name": recipe.run.name or run.name, "objective": recipe.objective["name"]}
    card = fill(
        CARD,
        **facts,
        library="peft" if form == "adapter" else "transformers",
        step=str(step_of(checkpoint)),
        hash=configs.config_hash(recipe)[:16],
    )
    with disk.folder(out, workspace=workspace) as partial:
        (partial / "README.md").write_text(card)
        if form != "adapter":
            _write_merged(partial, recipe, checkpoint, manifest, out)
        if form != "merged":
            _write_adapter(partial if form == "adapter" else partial / "adapter", recipe, checkpoint)


def _write_merged(folder: Path, recipe: TrainRecipe, checkpoint: Path, manifest: Mapping[str, Any], out: Path) -> None:
    policy = load.policy(unquantized(recipe.model), recipe.train.dtype, {})
    if manifest.get("depth") is not None:  # later layers were not even loaded
        for parameter in policy.unused(manifest["depth"]):
            parameter.requires_grad_(False)
    hf = policy.hf
    _put(hf, checkpoint)
    if recipe.model.lora is not None:
        hf = hf.merge_and_unload()
    _as_plain_linear(hf)
    hf.save_pretrained(folder)
    _check_written(folder, hf.config, out)
    directory.copy_processing(directory.resolve(recipe.model.path), folder)


def _write_adapter(folder: Path, recipe: TrainRecipe, checkpoint: Path) -> None:
    assert recipe.model.lora is not None
    folder.mkdir(exist_ok=True)
    with Shards(checkpoint) as shards:
        own = {name: shards.whole(name).to(load.DTYPES[recipe.train.dtype]) for name in shards.shapes}
    files.write(folder, recipe.model.path, recipe.model.lora, own)


def _check_written(folder: Path, config: Any, out: Path) -> None:
    """Raise RunError unless a model that was just written would load with every weight."""
    try:
        weights.check(folder, config)
    except ConfigError as error:
        raise RunError(f"{out}: nothing was exported, since the result would not load: {error}") from error


def chosen(folder: Path, step: int | None, sha256: Callable[[Path], str] = disk.sha256) -> Path:
    """The checkpoint of a step, or the newest one. Raises ConfigError when there is none, or when it is damaged.

    sha256: as in `shards.damage`.

    Training goes on from an older one where the newest is damaged, and makes the later steps again. Nobody who wants
    the model would notice that it is an older one, so here its step has to be named.
    """
    present = committed(folder)
    candidates = [c for c in present if step in (None, step_of(c))]
    if not candidates:
        names = ", ".join(c.name for c in present) or "none"
        raise ConfigError(f"{folder}: no checkpoint{'' if step is None else f' step-{step:06d}'} (there: {names})")
    damaged = ""
    for checkpoint in reversed(candidates):
        fault = damage(checkpoint, sha256=sha256)
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


def _put(hf: Any, checkpoint: Path) -> None:
    """Copy the trained parameters into the model, whatever world size saved them."""
    parameters = dict(hf.named_parameters())
    with Shards(checkpoint) as shards, torch.no_grad():
        missing = [n for n, p in parameters.items() if p.requires_grad and n not in shards.shapes]
        unknown = [n for n in shards.shapes if n not in parameters]
        if missing or unknown:
            difference = f"missing {missing[:3]}, unknown {unknown[:3]}"
            raise ConfigError(f"{checkpoint}: does not belong to this model: {difference}")
        for name in shards.shapes:
            parameters[name].copy_(shards.whole(name))


def _as_plain_linear(hf: Any) -> None:
    """Give the output projection back the class that transformers knows; the loss head's is ours."""
    head = hf.get_output_embeddings()
    head.__class__ = torch.nn.Linear
