"""`mirage train`: one process of a run, from a checked recipe to an exported model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from mirage_dist import calls, ranks, signals
from mirage_dist.data import stream
from mirage_dist.liveness import Owner
from mirage_dist.model import directory, export
from mirage_dist.model.directory import Hashed
from mirage_dist.model.reference import AdaptersOff, Frozen, Reference
from mirage_dist.progress import log
from mirage_dist.ranks import Group
from mirage_dist.schema import RunError
from mirage_dist.signals import StopRequested
from mirage_dist.train import engine as engines
from mirage_dist.train import rundir
from mirage_dist.train.caches import reference as reference_cache
from mirage_dist.train.caches import vision as vision_cache
from mirage_dist.train.checkpoints import commit as checkpoint
from mirage_dist.train.checkpoints.commit import Saver
from mirage_dist.train.context import Identity, Run
from mirage_dist.train.feed import Feed
from mirage_dist.train.lease import Lease, acquire
from mirage_dist.train.loop import Loop
from mirage_dist.train.measures import validation
from mirage_dist.train.measures.profiler import Profile
from mirage_dist.train.measures.records import Means, records
from mirage_dist.train.measures.records import held_out as metric_of
from mirage_dist.train.measures.validation import HeldOut
from mirage_dist.train.monitor import Monitor
from mirage_dist.train.optimizers.partitions import slices
from mirage_dist.train.planning import sharding
from mirage_dist.train.planning.check import Checked, check_family, check_model, warn
from mirage_dist.train.planning.start import Prepared, prepared
from mirage_dist.train.planning.streams import check_present
from mirage_dist.train.watchdog import Watchdog

LAUNCHER_SECONDS = 5.0  # a launcher has stopped the other ranks this long after one has ended


def train(checked: Checked) -> None:
    """Train to the end, from the newest whole checkpoint if there is one. Every rank calls this.

    Raises StopRequested when a signal asked for a stop (see `signals`); what was done is committed then. Raises
    RunError when another rank ended before this one.
    """
    with signals.start_up():
        check_model(checked, with_weights=True)
        check_present(checked.recipe)
    in_group(checked, lambda group: _train(checked, group))


def in_group(checked: Checked, work: Callable[[Group], None]) -> None:
    """Join the ranks and call `work` on each; every rank calls this.

    Raises RunError when another rank ended before this one.
    """
    with signals.start_up():
        group = ranks.start(checked.recipe.train.hang_seconds)
    try:
        work(group)
    except RuntimeError as error:
        if (reason := ranks.peer_lost(error)) is None:
            raise
        _end_after_peer(checked.recipe.run.dir, group, reason)


def _end_after_peer(root: str, group: Group, reason: str) -> NoReturn:
    """End this rank because another one ended first; `reason` is how a collective failed.

    The rank that failed reports the cause, or its launcher names it and then stops the others. So this rank waits for
    the launcher's signal, and only rank 0 adds a line. Without a launcher that stops the others, every rank reports.
    """
    if signals.wait(LAUNCHER_SECONDS) and not group.main:
        raise SystemExit(RunError.status)
    raise RunError(
        f"{root}: another rank ended or does not answer, see above (rank {group.rank} was at "
        f"{calls.last()[1]!r}: {reason}). Every committed checkpoint is whole; the same command resumes"
    )


def _train(checked: Checked, group: Group) -> None:
    objective, name = checked.objective, Path(checked.recipe.run.dir).name
    with ExitStack() as stack:
        with signals.start_up():
            # Before the directory is claimed: an error changes the recipe.
            data = stack.enter_context(prepared(checked, group))
            _check_family(data.feed, group)
            held_out = validation.of(data.feed, data.table, group)
            cut = data.cut + (held_out.cut if held_out is not None else 0)
            feed, recipe = data.feed, data.feed.recipe
            deepspeed = deepspeed_config(checked, feed, group)
        lease, manifest, base = stack.enter_context(_leased(checked, data, group))
        with signals.start_up():
            log.info(f"{name}: {objective} on {group.size} × {group.device.type}, {feed.steps} steps")
            if group.size == 1 and group.device.type == "cuda" and sharding.idle(deepspeed["zero_optimization"]):
                log.info(
                    f"{name}: one process has nothing to shard: deepspeed=configs/deepspeed/zero2.json trains the same "
                    "with half the work of the host"
                )
            for title, one in data.table.checks["streams"].items():
                counts, dropped = one["record"]["samples"], one["left_out"]["dropped"]
                log.info(f"{name}: stream {title}: {counts} samples, left out {dropped}")
            if group.main:
                warn(checked, data.table.checks["warnings"])
            if cut:
                length = recipe.data.max_length
                log.info(f"{name}: {cut} answers are longer than data.max_length={length} and will be cut")
            torch.manual_seed(recipe.seed)
            ranks.stop_here(group, "data are checked")
            engine = engines.build(recipe, deepspeed, group, checked.needs.depth)
            ranks.stop_here(group, "the model is loaded")
            objective.start(engine.module.hidden_size, recipe.seed)
            run = Run(recipe, group, objective, feed, engine, deepspeed, manifest, lease)
            watchdog = Watchdog(group, recipe.train.hang_seconds, run.root / "hang").start()
            if recipe.data.cache_vision:
                feed.encoder.recall(vision_cache.fill(run))
            loop = Loop(run, reference_of(run))
            first = resume(run)
            ranks.on_main(group, lambda: base and base.check_unchanged("start again when they are whole"))
            ranks.stop_here(group, "training begins")
        steps(run, loop, first, held_out)
        watchdog.stop()
        ranks.barrier(group, "end of training")
        _check_result(run)
        form, out = recipe.train.export, run.root / "export"
        if form != "off" and not ranks.from_main(group, out.exists()):
            export.export(run.root, out, workspace=lease.workspace, form=form, group=group)
        ranks.barrier(group, "end of the run")


def deepspeed_config(checked: Checked, feed: Feed, group: Group) -> dict[str, Any]:
    """The completed DeepSpeed JSON for these nodes and the resolved recipe's micro-batch. Every rank calls this."""
    node = sharding.node_size(checked.deepspeed["zero_optimization"], group)
    return engines.deepspeed_config(feed.recipe, group.size, len(feed.samples), node)


def _check_family(feed: Feed, group: Group) -> None:
    """`check_family` on rank 0, at the first start of a run."""

    def measure() -> None:
        if not rundir.begun_like_this(Path(feed.recipe.run.dir)):
            check_family(feed)

    ranks.on_main(group, measure)


def reference_of(run: Run) -> Reference | None:
    """The reference in the form that the recipe names; a cache is filled while the policy is still the base model.

    None when the objective compares with none. Every rank calls this, before the first step and before `resume`.
    """
    needs = run.objective.needs
    if not needs.reference:
        return None
    if run.recipe.reference == "engine":
        return Frozen(engines.build_reference(run.recipe, run.deepspeed, needs.reference_depth))
    if run.recipe.reference == "adapters_off":
        return AdaptersOff(run.engine)
    return reference_cache.fill(run)


def resume(run: Run) -> int:
    """Load the state of the newest whole checkpoint. Returns the step (from 0) to continue with, 0 for a new run."""
    newest = checkpoint.newest(run.root / "checkpoints", run.group)
    if newest is None:
        return 0
    saved, state = checkpoint.load(run.engine, newest, run.manifest)
    run.objective.load_state_dict(state)
    log.info(f"{run.root.name}: resumed from {newest} at step {saved['step']}")
    return saved["step"]


def steps(run: Run, loop: Loop, first: int, held_out: HeldOut | None = None) -> None:
    """From step `first` (from 0) to the end, or to the step in which a signal asked any rank to stop.

    Raises StopRequested in the second case.
    """
    recipe, group, feed, lease = run.recipe, run.group, run.feed, run.lease
    saver = Saver(run.root / "checkpoints", lease.workspace, recipe.train, group)
    saver.settle(first)
    means, done, stop = Means(recipe.train.keep_best), first, False
    with (
        closing(feed.windows(range(first, feed.steps), group)) as windows,
        held_out or nullcontext(),
        Profile(recipe.monitor.profile, run.root, lease.workspace, group) as profile,
        _monitor(run, first, _overdue(run, first, held_out, saver)) as monitor,
    ):
        ranks.on_main(group, lambda: means.recall(run.root / "metrics.jsonl", _last_planned(run, first), first))
        loop.watch.skip()
        for number, window in enumerate(loop.windows(windows), first):
            # Dropout draws what it would have drawn in a run that never stopped.
            torch.manual_seed((recipe.seed * 1_000_003 + number * group.size + group.rank) % (1 << 63))
            done = number + 1
            profile.before(done)
            record, flags = loop.step(
                number, window, lambda: [signals.received() is not None, saver.written], saver.before_update
            )
            profile.after(done)
            stop, written = bool(flags[:, 0].any()), bool(flags[:, 1].all())
            seconds = loop.watch.lap()
            if group.main:
                lease.check()
            if held_out is not None and held_out.due(done):
                record["validation"] = None if stop else held_out.measure(run.engine, done)
                stop = record["validation"] is None
            monitor.log(record, seconds)
            means.add(record)
            saver.step_ended(written)
            planned = _last_planned(run, done) == done
            if stop or planned:
                # A checkpoint that only a stop has made is none that retention could keep as the best.
                metrics = means.take() if planned else {}
                saver.save(run.engine, {**_manifest(run, done), "metrics": metrics}, run.objective.state_dict())
            loop.watch.skip()
            if stop:
                break
        saver.close()
        monitor.close(preempted=stop)
    if stop:
        _stop(run, done)


def _stop(run: Run, done: int) -> NoReturn:
    # Together: a launcher that finds one rank gone gives the others only seconds. Nobody waits for a lost one.
    with suppress(RuntimeError):
        ranks.barrier(run.group, "the stop")
    raise StopRequested(f"{run.root}: stopped on request; step {done} of {run.feed.steps} is committed")


def _last_planned(run: Run, step: int) -> int:
    """The last step up to `step` (from 1) at whose end a run that is never stopped saves; 0 for none."""
    every = run.recipe.train.save_every
    return step if step == run.feed.steps else step - step % every if every else 0


def _monitor(run: Run, first: int, amended: Mapping[str, Any] | None) -> Monitor:
    feed = run.feed

    def samples_of(step: int) -> dict[str, list[str]]:
        return {name: [own[i].id for i in feed.chosen(name, step)] for name, own in feed.samples.items()}

    manifest = rundir.manifest(run.root)
    return Monitor(run.recipe, first, feed.steps, run.group, manifest, run.lease.workspace, samples_of, amended)


def _overdue(run: Run, first: int, held_out: HeldOut | None, saver: Saver) -> dict[str, Any] | None:
    """The held-out loss of the step that the run resumed from, where the stop came before it; workers begin.

    Raises StopRequested when the next stop comes before it too.
    """
    if held_out is None:
        return None
    file = run.root / "metrics.jsonl"
    lacking = bool(ranks.on_main(run.group, lambda: held_out.lacking(file, first)))
    held_out.begin(first, lacking)
    if not lacking:
        return None
    if (measured := held_out.measure(run.engine, first)) is None:
        _stop(run, first)
    if _last_planned(run, first) == first:
        # Before the record has it: a start that is killed between the two measures again.
        saver.amend(first, metric_of(measured))
    return {"validation": measured}


def _check_result(run: Run) -> None:
    """Raise RunError on every rank when the finished run changed no weight, or made one that is not finite."""
    held = (piece for piece in slices(run.engine) if piece.count)
    own = {piece.name for piece in held if not piece.of(piece.flat).isfinite().all()}
    spoilt = sorted(set().union(*ranks.everyones(run.group, own)))

    def check() -> None:
        skipped, steps = sum(record["skipped"] for _, record in records(run.root / "metrics.jsonl")), run.feed.steps
        if not spoilt and skipped < steps:
            return
        fault = f"{spoilt[0]} ({len(spoilt)} parameters in all) is not finite" if spoilt else "no weight changed"
        raise RunError(
            f"{run.root}: after {steps} steps, of which {skipped} were skipped, {fault}, so nothing is "
            "exported; lower train.lr, or look in metrics.jsonl for the first step without a finite loss, and choose "
            "another run.dir"
        )

    ranks.on_main(run.group, check)


def _manifest(run: Run, step: int) -> dict[str, Any]:
    """What the manifest of a checkpoint says of the run."""
    batch = run.recipe.train.global_batch
    cursors = {name: stream.state(len(samples), step, batch) for name, samples in run.feed.samples.items()}
    depth = run.objective.needs.depth
    rows = run.recipe.train.rows
    return {
        **run.manifest,
        "step": step,
        "seed": run.recipe.seed,
        "streams": cursors,
        "depth": depth,
        "micro_batch": rows,
        "accumulation": batch // (rows * run.group.size),
    }


@contextmanager
def _leased(checked: Checked, data: Prepared, group: Group) -> Iterator[tuple[Lease, Identity, Hashed | None]]:
    """The run directory, owned in this block, and its manifest, equal on every rank; on rank 0 the base model."""
    recipe, root = checked.recipe, Path(checked.recipe.run.dir)
    lease: Lease | None = None
    base: Hashed | None = None

    def give_back(stopped: bool = True) -> None:
        if lease is not None:
            if stopped:
                with suppress(OSError):  # another job took over
                    rundir.forget_start(lease)
            lease.release()

    def claim() -> str:
        nonlocal lease, base
        lease = acquire(root)
        with lease.write_failures():
            rundir.count_start(lease, recipe.train.max_restarts)
            folder = directory.resolve(recipe.model.path)
            base = directory.hashed(folder, directory.state(folder))
            table, packed = data.table, data.feed.recipe.data.packing is True
            rundir.open_run(recipe, checked.needs, table.records(), table.summary, packed, base.digest, lease)
            data.publish(lease)
        return lease.owner.token

    stopped = False
    try:
        with signals.before_end(give_back):
            with signals.start_up():
                token = ranks.on_main(group, claim)
            assert token is not None
            held = lease or Lease(root, Owner(token))
            manifest = rundir.manifest(root)
            identity = Identity(
                config_hash=manifest["config_hash"],
                base_hash=manifest["base_hash"],
                wandb_id=manifest["wandb_id"],
                world_size=group.size,
            )
            with held.write_failures():
                yield held, identity, base
    except StopRequested:
        stopped = True
        raise
    finally:
        give_back(stopped)
