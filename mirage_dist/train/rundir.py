"""The run directory: its manifest, the recipe, data and weights it belongs to, and how often a job may restart."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict, cast

import torch

from mirage_dist import __version__, runs, state
from mirage_dist import config as configs
from mirage_dist.config import home
from mirage_dist.data.refusals import PhraseList
from mirage_dist.data.sample import stream_digest
from mirage_dist.data.sources import Source
from mirage_dist.model.adapters import quantization
from mirage_dist.objectives.base import Needs
from mirage_dist.progress import log
from mirage_dist.runs import DataSummary, RunManifest, StreamRecord
from mirage_dist.schema import ConfigError, RunError, TrainRecipe, secrets
from mirage_dist.schema.limits import VALUE_FILE
from mirage_dist.train.checkpoints import commit as checkpoint
from mirage_dist.train.lease import LOCK, Lease
from mirage_dist.train.monitor import new_wandb_id

# Keys that may change between two starts of a run: where it reports, how a step is cut up, what it keeps.
NOT_THE_RUN = (
    "run",
    "monitor",
    "deepspeed",
    "data.cache_vision",
    "data.workers",
    "data.verify",
    "train.save_every",
    "train.save_in_background",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.max_restarts",
    "train.hang_seconds",
    "train.dry_run",
    "train.export",
    "train.nonfinite_patience",
    "train.validate_every",
    "world",
)

# What a run writes into its directory, beside files whose names nobody else would choose.
OF_A_RUN = (
    "config.yaml",
    "data.json",
    "metrics.jsonl",
    "starts.jsonl",
    "owner.json",
    "checkpoints",
    "export",
    "reference",
    "vision",
    "samples",
    "profile",
    "hang",
)


class Start(TypedDict):
    """One line of starts.jsonl: the Slurm job, its restart count, and the progress of the run at that start.

    stopped: whether this start stopped on request.
    """

    job: str | None
    restart: str | None
    step: int
    reference_parts: int
    reference_caches: int
    vision_parts: int
    stopped: bool


def not_the_run(recipe: TrainRecipe, needs: Needs) -> tuple[str, ...]:
    """The keys that a continued run may change; the micro-batch is one of them unless the loss depends on it."""
    # `auto` may mean padding, and the model that decides it need not exist yet.
    by_micro_batch = needs.depends_on_micro_batch(recipe.data.packing is True)
    return NOT_THE_RUN if by_micro_batch else (*NOT_THE_RUN, "train.micro_batch")


def check_directory(recipe: TrainRecipe, needs: Needs) -> None:
    """A run directory belongs to one recipe. Raises ConfigError naming the keys that differ, or as `runs.recipe`, and
    for a directory in which no run has begun, but where something has a name that a run's files have.
    """
    root, free = Path(recipe.run.dir), not_the_run(recipe, needs)
    if not ((root / LOCK).exists() or (root / "manifest.json").exists()):
        if (theirs := next((name for name in OF_A_RUN if os.path.lexists(root / name)), None)) is not None:
            raise ConfigError(f"{root / theirs} exists, and no run wrote it; choose another run.dir, or move it away")
        return
    if not (root / "config.yaml").is_file():
        begun = runs.manifest(root)
        if begun is not None and configs.config_hash(recipe, begun["may_change"]) != begun["config_hash"]:
            raise ConfigError(f"{root} holds a run of another recipe, without its config.yaml; choose another run.dir")
        return
    there = runs.recipe(root)
    if configs.config_hash(there, free) != configs.config_hash(recipe, free):
        changed = configs.differences(configs.to_dict(recipe), configs.to_dict(there))
        kept = [line for line in changed if not line.startswith(free)]
        raise ConfigError(f"{recipe.run.dir} holds a run of another recipe ({'; '.join(kept)}); choose another run.dir")


def open_run(
    recipe: TrainRecipe,
    needs: Needs,
    data: dict[str, StreamRecord],
    summary: Callable[[], DataSummary],
    packed: bool,
    base_hash: str,
    lease: Lease,
) -> None:
    """Write config.yaml, data.json and manifest.json at the first start; rank 0 calls this.

    recipe: as given. data: the streams now. summary: the content of data.json. packed: whether batches are.
    Raises ConfigError at a later start when the base weights or the samples of a stream are no longer those that the
    run began with: the order of samples would change, and the run could not be repeated.
    """
    root = lease.root
    if (begun := runs.manifest(root)) is None:
        new = _manifest(recipe, needs, data, packed, base_hash)
        lease.publish("config.yaml", configs.to_yaml(recipe))
        lease.publish("data.json", state.sealed("data", summary(), indent=1))
        lease.publish("manifest.json", state.sealed("run", new, indent=1))
    elif begun["base_hash"] != base_hash:
        raise ConfigError(
            f"{root}: the weights of {recipe.model.path} changed since this run began; choose another run.dir"
        )
    elif not (root / "config.yaml").is_file():
        lease.publish("config.yaml", configs.to_yaml(recipe))
    check_data(root, data)


def manifest(root: Path) -> RunManifest:
    """manifest.json of a run that has begun. Raises RunError when it is missing, or as `runs.manifest`."""
    if (begun := runs.manifest(root)) is None:
        raise RunError(f"{root}: manifest.json was removed while the run goes on; start it again")
    return begun


def check_data(root: Path, data: Mapping[str, StreamRecord]) -> None:
    """Raise ConfigError when `root` holds a run that began with other samples, or the same ones in another order."""
    begun = runs.manifest(root)
    if begun is not None and (changes := changed_streams(begun["data"], data)):
        raise ConfigError(
            f"{root}: the data changed since this run began: {'; '.join(changes)}. Restore the data, or choose another "
            "run.dir to train on the new data from the start"
        )


def describe_streams(streams: Mapping[str, Source]) -> dict[str, StreamRecord]:
    """What the manifest records of each stream. The pictures must have been checked (`sources.check_pictures`)."""
    return {
        name: {
            "samples": len(source.samples),
            "sha256": stream_digest(replace(s, image=s.image and source.pictures[s.image]) for s in source.samples),
        }
        for name, source in streams.items()
    }


def changed_streams(before: Mapping[str, StreamRecord], now: Mapping[str, StreamRecord]) -> list[str]:
    """One phrase for each stream whose samples or their order are not those of `before`."""
    changes = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if old is None or new is None:
            changes.append(f"stream {name} exists {'no longer' if new is None else 'only now'}")
        elif old["samples"] != new["samples"]:
            changes.append(f"stream {name} had {old['samples']} samples and now has {new['samples']}")
        else:
            changes.append(f"stream {name} still has {new['samples']} samples, but their content or order differs")
    return changes


def count_start(lease: Lease, limit: int) -> None:
    """Record this start in starts.jsonl.

    Raises RunError when the same Slurm job has started `limit` times in a row without any progress, because the same
    cause would end it again. A start that stopped on request does not count, and a new submission starts a new count.
    """
    job = os.environ.get("SLURM_JOB_ID")
    step = max((checkpoint.step_of(f) for f in checkpoint.committed(lease.root / "checkpoints")), default=0)
    this: Start = {
        "job": job,
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
        "step": step,
        "reference_parts": len(list(lease.root.glob("reference/*/*.npz"))),
        "reference_caches": len(list(lease.root.glob("reference/*/*.safetensors"))),  # merged of such parts
        "vision_parts": len(list(lease.root.glob("vision/*/*.safetensors"))),
        "stopped": False,
    }
    before = _starts(lease.root)
    in_vain = stopped = 0
    for start in reversed(before):
        if job is None or {**start, "restart": this["restart"], "stopped": False} != this:
            break
        if start.get("stopped"):
            stopped += 1
        else:
            in_vain += 1
    if in_vain >= limit:
        raise RunError(
            f"{lease.root}: Slurm job {job} has started {in_vain} times from step {step} without a new checkpoint "
            f"(train.max_restarts={limit}); see its log for what ended it, then submit it again"
        )
    if stopped >= limit:
        log.warning(
            f"{lease.root}: Slurm job {job} was asked to stop {stopped} times before training began; if its time limit "
            "is the reason, submit it again with a longer one (sbatch --time)"
        )
    _write_starts(lease, [*before, this])


def forget_start(lease: Lease) -> None:
    """Record that this start of a Slurm job stopped on request, so that `count_start` does not count it."""
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")
    starts = _starts(lease.root)
    if job is not None and starts and (starts[-1]["job"], starts[-1]["restart"]) == (job, restart):
        starts[-1]["stopped"] = True
        _write_starts(lease, starts)


def _starts(root: Path) -> list[Start]:
    """The starts so far. A damaged file costs their count, never the run."""
    file = root / "starts.jsonl"
    if not os.path.lexists(file):
        return []
    try:
        lines = state.content(file, VALUE_FILE).splitlines()
        return [cast(Start, state.parse("start", line, f"{file}: line {n}")) for n, line in enumerate(lines, 1)]
    except state.Damaged as error:
        log.warning(f"{error}. Starts without progress (train.max_restarts) are counted anew from this one on")
        return []


def _write_starts(lease: Lease, starts: Sequence[Start]) -> None:
    lease.publish("starts.jsonl", "".join(state.sealed("start", start) for start in starts))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute a run."""
    libraries = {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft")}
    return {"python": platform.python_version(), "mirage-dist": __version__, **libraries}


def begun_like_this(root: Path) -> bool:
    """Whether `root` holds a run that began with the libraries of this process; `open_run` then compares the rest."""
    begun = runs.manifest(root)
    return begun is not None and begun["versions"] == versions()


def _manifest(
    recipe: TrainRecipe, needs: Needs, data: dict[str, StreamRecord], packed: bool, base_hash: str
) -> RunManifest:
    cuda, free = torch.cuda.is_available(), not_the_run(recipe, needs)
    return {
        "config_hash": configs.config_hash(recipe, free),
        "may_change": list(free),
        "data": data,
        "packed": packed,
        "load_in_4bit": quantization.wanted(recipe.model),
        "base_hash": base_hash,
        "refusals": PhraseList.read(recipe.data.refusals).sha256,
        "seed": recipe.seed,
        "wandb_id": new_wandb_id(),
        "command": [secrets.masked(word) for word in sys.argv],
        "git_commit": home.commit(),
        "versions": versions(),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
        },
    }
