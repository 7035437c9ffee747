"""`mirage train`: one process of a run, from a checked recipe to an exported model."""

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
from mirage_dist import objectives
from mirage_dist import world as worlds
from mirage_dist.config import ConfigError, TrainRecipe
from mirage_dist.data.sources import Source
from mirage_dist.model import activations, export, load, reference
from mirage_dist.model.policy import Request, no_grad_forward
from mirage_dist.objectives.base import Needs, Objective
from mirage_dist.train import checkpoint
from mirage_dist.train import engine as engines
from mirage_dist.train.feed import Feed, describe, read_streams
from mirage_dist.train.loop import Loop
from mirage_dist.train.monitor import Clock, Monitor, new_wandb_id
from mirage_dist.world import World

# What may change between a run and its continuation: where it tells its story, and how a step is cut up.
NOT_THE_RUN = (
    "run",
    "monitor",
    "deepspeed",
    "train.save_every",
    "train.export",
    "train.nonfinite_patience",
    "train.micro_batch",
    "world",
)


def check(recipe: TrainRecipe, world_size: int) -> tuple[Objective, dict[str, Source], dict[str, Any]]:
    """Everything that can be wrong before weights load: objective, reference, data, DeepSpeed JSON, run directory.

    Raises ConfigError.
    """
    objective = objectives.base.make(recipe.objective)
    needs = objective.needs
    _check_reference(recipe, needs)
    config = engines.deepspeed_config(recipe, world_size, len(needs.streams))
    load.check_directory(recipe.model)
    _check_directory(recipe)
    return objective, read_streams(recipe, needs), config


def train(recipe: TrainRecipe) -> None:
    """Train to the end, from the newest whole checkpoint where there is one. Every rank calls this."""
    objective, streams, config = check(recipe, worlds.place()[2])
    world = worlds.start()
    try:
        _train(recipe, objective, streams, config, world)
    except BaseException:
        worlds.finish()
        raise


def _train(
    recipe: TrainRecipe, objective: Objective, streams: Mapping[str, Source], config: dict[str, Any], world: World
) -> None:
    root, needs = Path(recipe.run.dir), objective.needs
    processor = load.processor(recipe.model)
    feed = Feed(recipe, needs, streams, processor)
    base_hash = load.base_hash(recipe.model.path) if world.main else ""
    manifest = _open(recipe, streams, base_hash, world)
    world.say(f"{root.name}: {objective} on {world.size} × {world.device.type}, {feed.steps} steps")
    for name, source in streams.items():
        world.say(f"{root.name}: stream {name}: {len(source.samples)} samples, left out {dict(source.dropped)}")
    cut = int(worlds.gather(world, [feed.check_lengths(world)], "lengths").sum())
    if cut:
        world.say(
            f"{root.name}: {cut} answers are longer than data.max_length={recipe.data.max_length} and will be cut"
        )
    torch.manual_seed(recipe.seed)
    engine = engines.build(recipe, config, world)
    if needs.layer is not None:
        activations.check_layer(engine.module.backbone, needs.layer)
    objective.start(engine.module.hidden_size, recipe.seed)
    forward, cache = _reference(recipe, engine, config, feed, world, manifest["base_hash"])
    first = _resume(root, engine, objective, manifest, world)
    loop = Loop(recipe, engine, objective, feed, world, forward, cache)
    monitor = Monitor(recipe, first, feed.steps, world.main, manifest["wandb_id"])
    clock = Clock(world.device)
    for number in range(first, feed.steps):
        # Dropout draws what it would have drawn in a run that never stopped.
        torch.manual_seed(recipe.seed * 1_000_003 + number * world.size + world.rank)
        record = loop.step(number)
        lap = clock.lap()
        monitor.log({**record, "tokens_per_s": record["tokens"] / lap["step_seconds"], **lap})
        done = number + 1
        if done == feed.steps or (recipe.train.save_every and done % recipe.train.save_every == 0):
            saved = {**manifest, "step": done, "seed": recipe.seed, "streams": _cursors(feed, recipe, done)}
            checkpoint.save(engine, root / "checkpoints", saved, objective.state_dict(), world)
    monitor.close()
    if recipe.train.export and world.main and not (root / "export").exists():
        export.export(root, root / "export")
    worlds.barrier(world, "end of the run")


def _check_reference(recipe: TrainRecipe, needs: Needs) -> None:
    kind, adapters = recipe.reference, recipe.model.lora is not None
    if not needs.reference:
        return
    if kind == "adapters_off" and not adapters:
        raise ConfigError("reference=adapters_off needs model.lora; full fine-tuning has cache or engine")
    if kind == "cache" and (needs.kl or needs.ref_activation):
        raise ConfigError(
            "reference=cache holds log-probabilities only; this objective compares whole distributions or activations: "
            "use engine" + (" or adapters_off" if adapters else "")
        )


def _check_directory(recipe: TrainRecipe) -> None:
    """A run directory belongs to one recipe. Raises ConfigError naming the keys that differ."""
    file = Path(recipe.run.dir) / "config.yaml"
    if not file.is_file():
        return
    there = configs.load(file, [], TrainRecipe)
    if configs.config_hash(there, NOT_THE_RUN) != configs.config_hash(recipe, NOT_THE_RUN):
        changed = configs.differences(configs.to_dict(recipe), configs.to_dict(there))
        kept = [line for line in changed if not line.startswith(NOT_THE_RUN)]
        raise ConfigError(f"{recipe.run.dir} holds a run of another recipe ({'; '.join(kept)}); choose another run.dir")


def _open(recipe: TrainRecipe, streams: Mapping[str, Source], base_hash: str, world: World) -> dict[str, Any]:
    """Write the run directory's config.yaml, data.json and manifest.json once; the manifest, equal on every rank."""
    root = Path(recipe.run.dir)
    file = root / "manifest.json"
    if world.main and not file.is_file():
        root.mkdir(parents=True, exist_ok=True)
        configs.write_yaml(recipe, root / "config.yaml")
        (root / "data.json").write_text(json.dumps(describe(streams), indent=1))
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps(_manifest(recipe, streams, base_hash), indent=1))
        beside.replace(file)
    worlds.barrier(world, "run directory")
    manifest = json.loads(file.read_text())
    if world.main and manifest["base_hash"] != base_hash:
        raise ConfigError(
            f"{root}: the weights of {recipe.model.path} changed since this run began; choose another run.dir"
        )
    told = ("config_hash", "base_hash", "wandb_id")
    return {**{name: manifest[name] for name in told}, "world_size": world.size}


def _manifest(recipe: TrainRecipe, streams: Mapping[str, Source], base_hash: str) -> dict[str, Any]:
    samples = "".join(repr(sample) for source in streams.values() for sample in source.samples)
    libraries = ("mirage-dist", "torch", "transformers", "deepspeed", "peft")
    cuda = torch.cuda.is_available()
    return {
        "config_hash": configs.config_hash(recipe, NOT_THE_RUN),
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


def _reference(
    recipe: TrainRecipe, engine: Any, config: dict[str, Any], feed: Feed, world: World, base_hash: str
) -> tuple[reference.Forward | None, reference.LogProbs | None]:
    """The reference as a forward, or as a cache that the policy fills while it still is the base model."""
    if not feed.needs.reference:
        return None, None
    if recipe.reference == "engine":
        return reference.frozen(engines.build_reference(recipe, config)), None
    if recipe.reference == "adapters_off":
        return reference.adapters_off(engine), None
    return None, fill_cache(recipe, engine, feed, world, base_hash)


def fill_cache(recipe: TrainRecipe, engine: Any, feed: Feed, world: World, base_hash: str) -> reference.LogProbs:
    """Reference log-probabilities of every sample that needs them, each rank a part, kept in the run directory."""
    told = [base_hash, configs.to_dict(recipe)["data"], recipe.train.dtype, world.size]
    samples = {name: [repr(s) for s in feed.samples[name]] for name in feed.needs.ref_logp}
    key = hashlib.sha256(json.dumps([told, samples], sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(recipe.run.dir) / "reference" / key
    files = [folder / f"rank-{rank:05d}-of-{world.size:05d}.npz" for rank in range(world.size)]
    if worlds.gather(world, [not all(f.is_file() for f in files)], "reference cache").any():
        folder.mkdir(parents=True, exist_ok=True)
        world.say(f"{Path(recipe.run.dir).name}: computing reference log-probabilities")
        own = reference.LogProbs()
        for rows in feed.every_sample(feed.needs.ref_logp, world):
            micro = feed.collate(rows, world.device)
            (name,) = rows
            index_N, segment_N = micro.index([name]), micro.segment(name)
            assert index_N is not None
            assert segment_N is not None
            labels_N = micro.batch.labels_BS.flatten().index_select(0, index_N + 1)
            out = no_grad_forward(engine, micro.batch.inputs, Request(index_N, labels_N))
            assert out.logp_N is not None
            own.add(micro.samples, out.logp_N, segment_N)
        own.save(files[world.rank])
    worlds.barrier(world, "reference cache written")
    cache = reference.LogProbs()
    for file in files:
        cache.load(file)
    return cache


def _resume(root: Path, engine: Any, objective: Objective, manifest: Mapping[str, Any], world: World) -> int:
    """Put the newest whole checkpoint's state back; the step to go on with."""
    found = checkpoint.newest(root / "checkpoints", world)
    if found is None:
        return 0
    saved, state = checkpoint.load(engine, found, manifest)
    objective.load_state_dict(state)
    world.say(f"{root.name}: resumed from {found} at step {saved['step']}")
    return saved["step"]


def _cursors(feed: Feed, recipe: TrainRecipe, step: int) -> dict[str, dict[str, int]]:
    from mirage_dist.data import stream

    return {n: stream.state(len(s), step, recipe.train.global_batch) for n, s in feed.samples.items()}
