"""The dry run: the run's own parts on its longest samples, in a folder that is removed, and the report."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mirage_dist import disk, ranks, signals
from mirage_dist.data import stream
from mirage_dist.disk import removal
from mirage_dist.liveness import Owner
from mirage_dist.progress import log, show
from mirage_dist.ranks import Group
from mirage_dist.schema import RunError, TrainRecipe
from mirage_dist.train import engine as engines
from mirage_dist.train import run as whole
from mirage_dist.train.caches import vision as vision_cache
from mirage_dist.train.checkpoints import commit as checkpoint
from mirage_dist.train.checkpoints.commit import Saver
from mirage_dist.train.context import Identity, Run
from mirage_dist.train.dry_run import sameness
from mirage_dist.train.dry_run.phases import Phases
from mirage_dist.train.dry_run.report import Measured, Rank, rows, text
from mirage_dist.train.feed import Feed, MicroBatch
from mirage_dist.train.lease import Lease
from mirage_dist.train.loop import Loop
from mirage_dist.train.planning.check import Checked, check_model
from mirage_dist.train.planning.start import prepared
from mirage_dist.train.watchdog import Watchdog

STEPS = 2
CANDIDATES = 64  # of the longest rows, those with the longest answers come first
SAMPLED = 32  # steps of the run whose lengths are compared with those of the dry run
LOAD, CACHE, VISION = "model and engine", "reference", "vision cache"
FORWARD, UPDATE, SAVE, RESTORE = "forward and backward", "update", "save", "load"


def dry_run(checked: Checked) -> None:
    """Make the dry run of a recipe, and print its report. Every rank calls this; it writes nothing that stays.

    Raises RunError when memory does not suffice, or when a checkpoint does not give back what was saved.
    """
    with signals.start_up():
        check_model(checked, with_weights=True)
    whole.in_group(checked, lambda group: _dry_run(checked, group))


def _dry_run(checked: Checked, group: Group) -> None:
    phases, root = Phases(group.device), Path(checked.recipe.run.dir)
    # Nothing is ever committed: a signal ends it at any point, and the folder goes.
    with (
        signals.start_up(),
        _temporary(root, group) as lease,
        phases.within_memory(checked.recipe, group.size),
        prepared(_within(checked, lease.root), group) as data,  # as a first start checks them
    ):
        feed = data.feed
        parts = longest(feed)
        recipe = temporary_recipe(feed, lease.root)
        few = feed.only(parts, recipe)
        log.info(f"{root.name}: dry run of {checked.objective} on {group.size} × {group.device.type}")
        watchdog = Watchdog(group, recipe.train.hang_seconds).start()
        measured = _measure(checked, few, lease, phases, group)
        watchdog.stop()
        phases.end()
    own = Rank(
        group.rank,
        os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        phases.peaks,
        phases.reserved,
        phases.seconds,
    )
    every = ranks.everyones(group, own)
    faults = ranks.everyones(group, measured.differing)
    if group.main:
        measured = replace(measured, longest=_lengths(feed, parts), share=share_of_longest(feed, parts, group))
        show(text(feed, measured, every, phases.total, group))
    if bad := next((f"rank {rank}: {names[0]}" for rank, names in enumerate(faults) if names), None):
        raise RunError(f"dry run: the checkpoint did not give back what was saved ({bad}); do not start this run")


def _within(checked: Checked, folder: Path) -> Checked:
    recipe = checked.recipe
    return replace(checked, recipe=replace(recipe, run=replace(recipe.run, dir=str(folder))))


def _measure(checked: Checked, feed: Feed, lease: Lease, phases: Phases, group: Group) -> Measured:
    """All parts of a run once, on the few samples of `feed`."""
    recipe, objective = feed.recipe, checked.objective
    deepspeed = whole.deepspeed_config(checked, feed, group)
    phases.begin(LOAD)
    torch.manual_seed(recipe.seed)
    engine = engines.build(recipe, deepspeed, group, checked.needs.depth)
    objective.start(engine.module.hidden_size, recipe.seed)
    manifest = Identity(config_hash="dry run", base_hash="dry run", wandb_id="", world_size=group.size)
    run = Run(recipe, group, objective, feed, engine, deepspeed, manifest, lease)
    if recipe.data.cache_vision:
        phases.begin(VISION)
        feed.encoder.recall(vision_cache.fill(run))
    if checked.needs.reference:
        phases.begin(CACHE)
    loop = Loop(run, whole.reference_of(run))
    caches = _bytes(lease.root / "reference") + _bytes(lease.root / "vision")
    phases.begin("data")
    window = longest_window(feed)
    steps, skipped = [], 0
    for number in range(STEPS):
        phases.begin(FORWARD)
        record, _ = loop.step(number, window, before_update=lambda: phases.begin(UPDATE))
        phases.end()
        steps.append(phases.seconds[FORWARD] + phases.seconds[UPDATE])
        skipped += record["skipped"]
    phases.begin(SAVE)
    saver = Saver(lease.root / "checkpoints", lease.workspace, recipe.train, group)
    saved = {**manifest, "step": STEPS, "seed": recipe.seed, "streams": {}, "depth": checked.needs.depth}
    saver.save(engine, saved, objective.state_dict())
    saver.close()
    phases.end()
    size = _bytes(lease.root / "checkpoints")
    before = sameness.checksums(engine)
    control = {name: sameness.checksum(tensor) for name, tensor in objective.state_dict().items()}
    sameness.wipe(engine)
    ranks.barrier(group, "the state is wiped")
    phases.begin(RESTORE)
    newest = checkpoint.newest(lease.root / "checkpoints", group)
    if newest is None:
        raise RunError("dry run: the checkpoint that was just saved is damaged; do not trust this disk")
    _, state = checkpoint.load(engine, newest, manifest)
    phases.end()
    differing = sameness.differing(before, sameness.checksums(engine))
    restored = {name: sameness.checksum(tensor) for name, tensor in state.items()}
    return Measured(
        steps=steps,
        skipped=skipped,
        checkpoint=size,
        caches=caches,
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        differing=[*differing, *(sameness.differing(control, restored) if group.main else [])],
        free=_free(lease.root),
    )


def temporary_recipe(feed: Feed, root: Path) -> TrainRecipe:
    """The run's recipe as far as it decides memory and time, with nothing that reaches beyond the folder `root`."""
    recipe = feed.recipe
    return replace(
        recipe,
        run=replace(recipe.run, dir=str(root)),
        train=replace(recipe.train, max_steps=feed.steps, export="off", keep_best=None),
        monitor=replace(recipe.monitor, wandb="off", tensorboard=False),
    )


def longest(feed: Feed) -> dict[str, stream.Indices]:
    """A micro-batch: stream -> indices of its longest samples, (micro_batch,); the same ones of paired streams.

    Of rows that are cut to the same length, those with the longest answers: they have most rows of the LM head.
    """
    width, paired, parts = rows(feed), feed.needs.paired, {}
    for name in feed.samples:
        partners = paired if name in paired else (name,)
        lengths = np.maximum.reduce([feed.lengths[other] for other in partners])
        order = np.argsort(-lengths, kind="stable")[: max(width, CANDIDATES)]
        answers = {int(i): sum(len(feed.samples[other][int(i)].answer) for other in partners) for i in order}
        chosen = sorted(answers, key=lambda i: (-int(lengths[i]), -answers[i], i))[:width]
        # A stream smaller than a micro-batch begins again, as an epoch does.
        parts[name] = np.resize(np.array(chosen, np.int64), width)
    return parts


def longest_window(feed: Feed) -> list[MicroBatch]:
    """A step of one rank of which every micro-batch has all samples of `feed`."""
    every = {name: np.arange(len(samples)) for name, samples in feed.samples.items()}
    micro = feed.collate(every)
    count = feed.recipe.train.global_batch // (rows(feed) * ranks.place()[2])
    return [micro] * count


def slots(feed: Feed, parts: Mapping[str, stream.Indices]) -> int:
    """Positions that a micro-batch of these samples has: with padding, or of its samples alone where it is packed."""
    lengths = [feed.lengths[name][indices] for name, indices in parts.items()]
    if feed.recipe.data.packing is True:
        return int(sum(each.sum() for each in lengths))
    return sum(map(len, lengths)) * max(int(each.max()) for each in lengths)


def share_of_longest(feed: Feed, parts: Mapping[str, stream.Indices], group: Group) -> float:
    """Positions of an average micro-batch of the run, over some steps, as a share of the dry run's."""
    width, steps = rows(feed), feed.steps
    counts = []
    for step in np.unique(np.linspace(0, steps - 1, min(steps, SAMPLED)).astype(int)):
        shards = {n: stream.shard(feed.chosen(n, int(step)), group.rank, group.size, width) for n in feed.samples}
        for number in range(len(next(iter(shards.values())))):
            counts.append(slots(feed, {name: shard[number] for name, shard in shards.items()}))
    return float(np.mean(counts)) / slots(feed, parts)


def _lengths(feed: Feed, parts: Mapping[str, stream.Indices]) -> dict[str, int]:
    return {name: int(feed.lengths[name][indices].max()) for name, indices in parts.items()}


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _free(folder: Path) -> int:
    table = os.statvfs(folder)
    return table.f_bavail * table.f_frsize


@contextmanager
def _temporary(root: Path, group: Group) -> Iterator[Lease]:
    """A lease on a folder beside the run directory, in its file system; removed in the end, also by a signal.

    What a killed dry run has left of its own goes first.
    """
    made: list[Path] = []

    def make() -> str:
        place = _beside(root.absolute())
        try:
            removal.remove_leftovers(place)
            made.append(removal.own(removal.sibling(place), parents=False))
            lease = Lease(made[0], Owner.current())
            disk.own(lease.workspace, lease.owner)
        except OSError as error:
            raise RunError(f"dry run: {place.parent}: cannot be written ({error.strerror})") from error
        return f"{lease.owner.token} {made[0]}"

    def clear() -> None:
        for folder in made:
            with suppress(OSError):
                disk.remove(folder)

    with signals.before_end(clear):
        try:
            token, _, folder = (ranks.on_main(group, make) or "").partition(" ")
            lease = Lease(Path(folder), Owner(token))
            with disk.refusals(root, "nothing of the run was touched"):
                yield lease
            ranks.barrier(group, "the folder is no longer used")
        finally:
            clear()


def _beside(root: Path) -> Path:
    """The name that the temporary folder is derived from: beside the run directory, or in it where it is a mount."""
    parent = next(folder for folder in root.parents if folder.is_dir())
    if root.is_dir() and root.stat().st_dev != parent.stat().st_dev:
        return root / "dry_run"
    return parent / f"{root.name}.dry_run"
