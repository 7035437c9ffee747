"""`mirage train`: one process of a run, from a checked recipe to an exported model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from mirage_dist import objectives, ranks, signals
from mirage_dist.data import audit, sources, stream
from mirage_dist.data.sources import Source
from mirage_dist.liveness import Owner
from mirage_dist.model import directory, export, load, reference
from mirage_dist.objectives.base import Needs, Objective
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.signals import StopRequested
from mirage_dist.train import engine as engines
from mirage_dist.train import rundir
from mirage_dist.train.caches import reference as reference_cache
from mirage_dist.train.caches import vision as vision_cache
from mirage_dist.train.checkpoints import commit as checkpoint
from mirage_dist.train.checkpoints.commit import Saver
from mirage_dist.train.feed import Feed, check_streams, read_streams
from mirage_dist.train.lease import Lease, acquire
from mirage_dist.train.loop import Loop
from mirage_dist.train.monitor import Clock, Means, Monitor
from mirage_dist.train.optimizers.groups import split
from mirage_dist.train.watchdog import Watchdog


def check_recipe(recipe: TrainRecipe, world_size: int) -> tuple[Objective, dict[str, Any]]:
    """What can be wrong in a recipe by itself: objective, streams, reference, DeepSpeed JSON, batch, run directory.

    Reads neither data nor model, so that it comes before the embedded world makes either. Raises ConfigError.
    """
    objective = objectives.base.make(recipe.objective)
    check_streams(recipe, objective.needs)
    _check_reference(recipe, objective.needs)
    config = engines.deepspeed_config(recipe, world_size, len(objective.needs.streams))
    rundir.check_directory(recipe)
    return objective, config


def check(recipe: TrainRecipe, world_size: int) -> tuple[Objective, dict[str, Source], dict[str, Any]]:
    """Everything that can be wrong before weights load: the recipe, the model's parts that it names, and the data.

    Raises ConfigError.
    """
    objective, config = check_recipe(recipe, world_size)
    directory.check(recipe.model.path, weights=False)
    policy = load.check_names(recipe.model, recipe.data, objective.needs.layer, objective.needs.depth)
    split(policy, recipe.train)
    return objective, read_streams(recipe, objective.needs), config


def _warn(recipe: TrainRecipe, streams: Mapping[str, Source]) -> None:
    """Say what fine-tuning on these samples may teach in place of what they are for, a line each (see `data.audit`)."""
    if recipe.objective["name"] == "sft":
        for name, source in streams.items():
            if (text := audit.warning(source.samples)) is not None:
                print(f"WARNING: data.streams.{name} fails the audit: {text}", flush=True)


def dry(recipe: TrainRecipe) -> str:
    """`check`, and every sample's length; what there is, in words. Raises ConfigError."""
    group = Group(0, 0, ranks.place()[2], torch.device("cpu"))
    objective, streams, _ = check(recipe, group.size)
    sources.check_pictures(streams)
    _warn(recipe, streams)
    feed = Feed(recipe, objective.needs, streams, load.processor(recipe.model))
    cut = feed.check_lengths(Group(0, 0, 1, group.device))
    counts = ", ".join(f"{name} {len(source.samples)}" for name, source in streams.items())
    return f"samples: {counts}; {cut} answers to be cut; {feed.steps} steps"


def train(recipe: TrainRecipe) -> None:
    """Train to the end, from the newest whole checkpoint where there is one. Every rank calls this.

    Raises StopRequested when a signal asked for a stop (see `signals`); what was done is committed then.
    """
    objective, streams, config = check(recipe, ranks.place()[2])
    group = ranks.start(recipe.train.hang_seconds)
    try:
        _train(recipe, objective, streams, config, group)
    except BaseException:
        ranks.finish()
        raise


def _train(
    recipe: TrainRecipe, objective: Objective, streams: Mapping[str, Source], config: dict[str, Any], group: Group
) -> None:
    root, needs = Path(recipe.run.dir), objective.needs
    processor = load.processor(recipe.model)
    sources.check_pictures(streams, group.rank, group.size, lambda own: ranks.everyones(group, own))
    feed = Feed(recipe, needs, streams, processor)
    cut = feed.check_lengths(group)  # before the directory is claimed: what is wrong here changes the recipe
    with _leased(recipe, streams, group) as (lease, manifest):
        group.say(f"{root.name}: {objective} on {group.size} × {group.device.type}, {feed.steps} steps")
        for name, source in streams.items():
            group.say(f"{root.name}: stream {name}: {len(source.samples)} samples, left out {dict(source.dropped)}")
        if group.main:
            _warn(recipe, streams)
        if cut:
            group.say(
                f"{root.name}: {cut} answers are longer than data.max_length={recipe.data.max_length} and will be cut"
            )
        torch.manual_seed(recipe.seed)
        ranks.stop_here(group, "data are checked")
        engine = engines.build(recipe, config, group, needs.depth)
        ranks.stop_here(group, "the model is loaded")
        objective.start(engine.module.hidden_size, recipe.seed)
        watchdog = Watchdog(group, recipe.train.hang_seconds).start()
        if recipe.data.cache_vision:
            known = vision_cache.fill(recipe, engine, feed, group, manifest["base_hash"], lease.workspace)
            feed.encoder.recall(known)
        forward, cache = _reference(recipe, engine, config, feed, group, manifest["base_hash"], lease)
        first = _resume(root, engine, objective, manifest, group)
        loop = Loop(recipe, engine, objective, feed, group, forward, cache)
        _steps(recipe, loop, manifest, lease, first)
        watchdog.stop()
        ranks.barrier(group, "end of training")
        if recipe.train.export and group.main and not (root / "export").exists():
            export.export(root, root / "export", workspace=lease.workspace)
        ranks.barrier(group, "end of the run")


def _steps(recipe: TrainRecipe, loop: Loop, manifest: Mapping[str, Any], lease: Lease, first: int) -> None:
    """From step `first` (from 0) to the end, or to the step in which a rank was asked to stop."""
    group, feed = loop.group, loop.feed
    saver = Saver(lease.root / "checkpoints", lease.workspace, recipe.train, group)
    saver.settle(first)
    monitor = Monitor(recipe, first, feed.steps, group.main, manifest["wandb_id"], lease.workspace)
    means, clock = Means(recipe.train.keep_best), Clock(group.device)
    done, stop = first, False
    with closing(feed.windows(range(first, feed.steps), group)) as windows:
        for number, window in enumerate(windows, first):
            # Dropout draws what it would have drawn in a run that never stopped.
            torch.manual_seed(recipe.seed * 1_000_003 + number * group.size + group.rank)
            told = [signals.received() is not None, saver.written]
            record, flags = loop.step(number, window, told, saver.before_update)
            stop, written = bool(flags[:, 0].any()), bool(flags[:, 1].all())
            lap = clock.lap()
            if group.main:
                lease.check()
            monitor.log({**record, "tokens_per_s": record["tokens"] / lap["step_seconds"], **lap})
            means.add(record)
            saver.step_ended(written)
            done = number + 1
            if stop or done == feed.steps or (recipe.train.save_every and done % recipe.train.save_every == 0):
                saved = {**manifest, "step": done, "seed": recipe.seed, "streams": _cursors(feed, recipe, done)}
                saved["depth"] = feed.needs.depth
                saver.save(loop.engine, {**saved, "metrics": means.take()}, loop.objective.state_dict())
                clock.skip()
            if stop:
                break
    saver.close()
    monitor.close(preempted=stop)
    if stop:
        raise StopRequested(f"{lease.root}: stopped on request; step {done} of {feed.steps} is committed")


@contextmanager
def _leased(recipe: TrainRecipe, streams: Mapping[str, Source], group: Group) -> Iterator[tuple[Lease, dict[str, Any]]]:
    """The run directory, owned for as long as this lasts, and its manifest; equal on every rank."""
    root = Path(recipe.run.dir)
    lease, fault = None, None
    try:
        try:
            if group.main:
                lease = acquire(root)
                with lease.write_failures():
                    rundir.count_start(lease, recipe.train.max_restarts)
                    rundir.open_run(recipe, streams, load.base_hash(recipe.model.path), lease)
        except (ConfigError, RunError) as error:
            fault = error
        # All ranks end alike: one that waited here would tell of a lost connection, and perhaps be heard first.
        status, token = ranks.from_main(group, (fault.status if fault else 0, lease.owner.token if lease else ""))
        if fault is not None:
            raise fault
        if status:
            raise SystemExit(status)
        held = lease or Lease(root, Owner(token))
        manifest = json.loads((root / "manifest.json").read_text())
        told = {name: manifest[name] for name in ("config_hash", "base_hash", "wandb_id")}
        with held.write_failures():
            yield held, {**told, "world_size": group.size}
    finally:
        if lease is not None:
            lease.release()


def _check_reference(recipe: TrainRecipe, needs: Needs) -> None:
    kind, adapters = recipe.reference, recipe.model.lora is not None
    if not needs.reference:
        return
    if kind == "adapters_off" and not adapters:
        raise ConfigError("reference=adapters_off needs model.lora; full fine-tuning has cache or engine")
    if kind == "adapters_off" and recipe.model.lora is not None and recipe.model.lora.also_train:
        raise ConfigError(
            f"reference=adapters_off: model.lora.also_train={recipe.model.lora.also_train} trains what switching the "
            "adapters off does not put back; use cache or engine"
        )
    if kind == "cache" and (needs.kl or needs.ref_activation):
        raise ConfigError(
            "reference=cache holds log-probabilities only; this objective compares whole distributions or activations: "
            "use engine" + (" or adapters_off" if adapters else "")
        )


def _reference(
    recipe: TrainRecipe,
    engine: Any,
    config: dict[str, Any],
    feed: Feed,
    group: Group,
    base_hash: str,
    lease: Lease,
) -> tuple[reference.Forward | None, reference.LogProbs | None]:
    """The reference as a forward, or as a cache that the policy fills while it still is the base model."""
    if not feed.needs.reference:
        return None, None
    if recipe.reference == "engine":
        return reference.frozen(engines.build_reference(recipe, config, feed.needs.reference_depth)), None
    if recipe.reference == "adapters_off":
        return reference.adapters_off(engine), None
    return None, reference_cache.fill(recipe, engine, feed, group, base_hash, lease.workspace)


def _resume(root: Path, engine: Any, objective: Objective, manifest: Mapping[str, Any], group: Group) -> int:
    """Put the newest whole checkpoint's state back; the step to go on with."""
    found = checkpoint.newest(root / "checkpoints", group)
    if found is None:
        return 0
    saved, state = checkpoint.load(engine, found, manifest)
    objective.load_state_dict(state)
    group.say(f"{root.name}: resumed from {found} at step {saved['step']}")
    return saved["step"]


def _cursors(feed: Feed, recipe: TrainRecipe, step: int) -> dict[str, dict[str, int]]:
    return {n: stream.state(len(s), step, recipe.train.global_batch) for n, s in feed.samples.items()}
