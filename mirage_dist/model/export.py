"""From a committed checkpoint to an ordinary Hugging Face model directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from mirage_dist import config as configs
from mirage_dist.model import load
from mirage_dist.model.shards import Shards, committed, damage, read_manifest, step_of
from mirage_dist.schema import ConfigError, RunError, TrainRecipe

CARD = """---
library_name: transformers
base_model: {base}
---
# {name}

`{base}` after `{objective}` training with mirage_dist: step {step}, recipe hash `{hash}`.
Attack success and rejection rates belong beside this model; a low rate is behaviour, not proof of erasure.
"""


def export(run: Path, out: Path, step: int | None = None, workspace: Path | None = None) -> None:
    """Write the model of a run's checkpoint (the newest, or of `step`) to `out`; needs no process group.

    Weights come in the dtype of training; adapters are merged. The result loads with
    `AutoModelForImageTextToText.from_pretrained`. It is written in `workspace` (default: beside `out`) and renamed.
    Raises ConfigError when there is no such checkpoint, it is damaged, or `out` exists.
    """
    recipe = configs.load(run / "config.yaml", [], TrainRecipe)
    if out.exists():
        raise ConfigError(f"{out} exists; export to a new directory")
    checkpoint = chosen(run / "checkpoints", step)
    manifest = read_manifest(checkpoint)
    if load.base_hash(recipe.model.path) != manifest["base_hash"]:
        raise ConfigError(f"{recipe.model.path}: its weights changed since {run} was trained on them")
    policy = load.policy(recipe.model, recipe.train.dtype, {})
    if manifest.get("depth") is not None:  # what lies behind was not even loaded
        for parameter in policy.behind(manifest["depth"]):
            parameter.requires_grad_(False)
    hf = policy.hf
    _put(hf, checkpoint)
    if recipe.model.lora is not None:
        hf = hf.merge_and_unload()
    partial = (workspace or out.parent) / f"{out.name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    # save_pretrained makes the folders that are missing: a workspace that another job has removed would come back.
    partial.mkdir(parents=workspace is None)
    told = {"base": recipe.model.path, "name": recipe.run.name or run.name, "objective": recipe.objective["name"]}
    card = partial / "README.md"
    card.write_text(CARD.format(**told, step=step_of(checkpoint), hash=configs.config_hash(recipe)[:16]))
    _as_plain_linear(hf)
    hf.save_pretrained(partial)
    load.processor(recipe.model).save_pretrained(partial)
    if not card.is_file():
        raise RunError(f"{partial}: was removed while it was written; nothing was exported")
    partial.rename(out)


def chosen(folder: Path, step: int | None) -> Path:
    """The checkpoint of a step, or the newest whole one. Raises ConfigError when there is none."""
    there = committed(folder)
    wanted = [c for c in there if step in (None, step_of(c))]
    if not wanted:
        names = ", ".join(c.name for c in there) or "none"
        raise ConfigError(f"{folder}: no checkpoint{'' if step is None else f' step-{step:06d}'} (there: {names})")
    for checkpoint in reversed(wanted):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        print(f"{checkpoint} is passed over: {fault}", flush=True)
    raise ConfigError(f"{folder}: {', '.join(c.name for c in wanted)} is damaged; nothing was exported")


def _put(hf: Any, checkpoint: Path) -> None:
    """Put the trained parameters into the model, whatever world size saved them."""
    parameters = dict(hf.named_parameters())
    with Shards(checkpoint) as shards, torch.no_grad():
        missing = [n for n, p in parameters.items() if p.requires_grad and n not in shards.shapes]
        unknown = [n for n in shards.shapes if n not in parameters]
        if missing or unknown:
            raise ConfigError(f"{checkpoint}: is not of this model: missing {missing[:3]}, unknown {unknown[:3]}")
        for name in shards.shapes:
            parameters[name].copy_(shards.whole(name))


def _as_plain_linear(hf: Any) -> None:
    """Saved models are what transformers knows: the loss head's class stays ours."""
    head = hf.get_output_embeddings()
    head.__class__ = torch.nn.Linear
