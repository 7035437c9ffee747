"""Run directories as training leaves them, of values that nobody trained, for tests of what reads them."""

from dataclasses import asdict
from pathlib import Path

import torch

from mirage_dist import config as configs
from mirage_dist import state
from mirage_dist.model import load
from mirage_dist.model.shards import PARAM, Fragment, write
from mirage_dist.schema import TrainRecipe


def made_run(toy, folder: Path, *own: str) -> Path:
    """A run of NPO with one checkpoint. toy: see `toy.py`. own: further overrides of the recipe."""
    words = [*toy.overrides("npo", folder), "train.dtype=fp32", *own]
    recipe = configs.load("configs/train/demo_npo.yaml", words, TrainRecipe)
    checkpoint = folder / "checkpoints/step-000003"
    checkpoint.mkdir(parents=True)
    configs.write_yaml(recipe, folder / "config.yaml")
    base = load.base_hash(recipe.model.path)
    manifest = {
        "config_hash": configs.config_hash(recipe),
        "may_change": [],
        "data": {name: {"samples": 20, "sha256": name[0] * 64} for name in ("forget", "retain")},
        "base_hash": base,
        "seed": recipe.seed,
        "wandb_id": "4dtw7a0c",
        "git_commit": "c0ffee",
        "versions": {"torch": torch.__version__},
    }
    (folder / "manifest.json").write_text(state.sealed("run", manifest))
    streams = {name: {"first_words": {}, "commits": {}} for name in ("forget", "retain")}
    (folder / "data.json").write_text(state.sealed("data", {"streams": streams}))
    policy = load.policy(recipe.model, "fp32", {})
    generator = torch.Generator().manual_seed(1)
    held = [
        Fragment(PARAM, name, tuple(p.shape), 0, torch.randn(p.numel(), generator=generator) / 7)
        for name, p in policy.hf.named_parameters()
        if p.requires_grad
    ]
    file = checkpoint / "rank-00000-of-00001.safetensors"
    files = {file.name: asdict(write(file, held))}
    content = {"step": 3, "files": files, "base_hash": base, "depth": None}
    (checkpoint / "manifest.json").write_text(state.sealed("checkpoint", content))
    return folder
