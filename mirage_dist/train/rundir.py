"""The run directory: what it says of itself, whose recipe it belongs to, how often a job may start over in it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mirage_dist import config as configs
from mirage_dist.data.sources import Source
from mirage_dist.objectives.base import Needs
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.train.checkpoints import commit as checkpoint
from mirage_dist.train.feed import describe
from mirage_dist.train.lease import Lease
from mirage_dist.train.monitor import new_wandb_id

# What may change between a run and its continuation: where it tells its story, how a step is cut up, what is kept.
NOT_THE_RUN = (
    "run",
    "monitor",
    "deepspeed",
    "data.cache_vision",
    "data.workers",
    "train.save_every",
    "train.save_in_background",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.max_restarts",
    "train.hang_seconds",
    "train.export",
    "train.nonfinite_patience",
    "world",
)


def not_the_run(recipe: TrainRecipe, needs: Needs) -> tuple[str, ...]:
    """The keys that a continued run may change; the micro-batch is one of them unless the loss depends on it."""
    by_micro_batch = needs.depends_on_micro_batch(recipe.data.packing)
    return NOT_THE_RUN if by_micro_batch else (*NOT_THE_RUN, "train.micro_batch")


def check_directory(recipe: TrainRecipe, needs: Needs) -> None:
    """A run directory belongs to one recipe. Raises ConfigError naming the keys that differ."""
    file = Path(recipe.run.dir) / "config.yaml"
    if not file.is_file():
        return
    there = configs.load(file, [], TrainRecipe)
    free = not_the_run(recipe, needs)
    if configs.config_hash(there, free) != configs.config_hash(recipe, free):
        changed = configs.differences(configs.to_dict(recipe), configs.to_dict(there))
        kept = [line for line in changed if not line.startswith(free)]
        raise ConfigError(f"{recipe.run.dir} holds a run of another recipe ({'; '.join(kept)}); choose another run.dir")


def open_run(recipe: TrainRecipe, needs: Needs, streams: Mapping[str, Source], base_hash: str, lease: Lease) -> None:
    """Write config.yaml, data.json and manifest.json once; rank 0 calls this.

    Raises ConfigError when the base weights are no longer those that the run began with.
    """
    root = lease.root
    file = root / "manifest.json"
    if not file.is_file():
        configs.write_yaml(recipe, lease.workspace / "config.yaml")
        lease.put("config.yaml")
        lease.publish("data.json", json.dumps(describe(streams), indent=1))
        lease.publish("manifest.json", json.dumps(_manifest(recipe, needs, streams, base_hash), indent=1))
    if json.loads(file.read_text())["base_hash"] != base_hash:
        raise ConfigError(
            f"{root}: the weights of {recipe.model.path} changed since this run began; choose another run.dir"
        )


def count_start(lease: Lease, limit: int) -> None:
    """Note this start in starts.jsonl. Raises RunError when the same Slurm job has started `limit` times in a row
    without leaving anything new: whatever ended it will end it again. A new submission starts the count anew.
    """
    file, job = lease.root / "starts.jsonl", os.environ.get("SLURM_JOB_ID")
    step = max((checkpoint.step_of(f) for f in checkpoint.committed(lease.root / "checkpoints")), default=0)
    told = {
        "job": job,
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
        "step": step,
        "reference_parts": len(list(lease.root.glob("reference/*/*.npz"))),
        "vision_parts": len(list(lease.root.glob("vision/*/*.safetensors"))),
    }
    before = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    in_vain = 0
    for start in reversed(before):
        if job is None or {**start, "restart": told["restart"]} != told:
            break
        in_vain += 1
    if in_vain >= limit:
        raise RunError(
            f"{lease.root}: Slurm job {job} has started {in_vain} times from step {step} without a new checkpoint "
            f"(train.max_restarts={limit}); see its log for what ended it, then submit it again"
        )
    lease.publish("starts.jsonl", "".join(json.dumps(start) + "\n" for start in [*before, told]))


def _manifest(recipe: TrainRecipe, needs: Needs, streams: Mapping[str, Source], base_hash: str) -> dict[str, Any]:
    samples = "".join(repr(sample) for source in streams.values() for sample in source.samples)
    libraries = ("mirage-dist", "torch", "transformers", "deepspeed", "peft")
    cuda = torch.cuda.is_available()
    return {
        "config_hash": configs.config_hash(recipe, not_the_run(recipe, needs)),
        "data_hash": hashlib.sha256(samples.encode()).hexdigest(),
        "base_hash": base_hash,
        "seed": recipe.seed,
        "wandb_id": new_wandb_id(),
        "command": sys.argv,
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
    }


def _git_commit() -> str | None:
    """The commit of this source tree, None where it is no checkout."""
    command = ["git", "-C", str(configs.REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
