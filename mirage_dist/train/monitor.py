"""What a run reports of its steps: metrics.jsonl, a progress bar or lines, and the sinks that the recipe names."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import torch

from mirage_dist import config as configs
from mirage_dist import disk, signals, state
from mirage_dist.liveness import restart_count
from mirage_dist.monitoring import tensorboard, wandb_run
from mirage_dist.monitoring.process import END_SECONDS, STOP_SECONDS, Sender
from mirage_dist.monitoring.sinks import GROUPS, End
from mirage_dist.progress import Progress, log
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.schema.secrets import masked
from mirage_dist.train.lease import Fenced

# What W&B's config holds of manifest.json besides the recipe. The command line is left out.
FROM_MANIFEST = (
    "config_hash",
    "base_hash",
    "data",
    "git_commit",
    "versions",
    "hardware",
    "packed",
    "load_in_4bit",
)


class Monitor:
    """Rank 0's records of a run from `first_step` on; on other ranks it does nothing.

    `metrics.jsonl` holds one object for each step: a resumed run drops the lines of the steps that it will repeat. W&B
    and TensorBoard are served from it by processes of their own (see `monitoring`): whatever becomes of them, the run
    goes on, and each of them holds every step once. A context manager: an error within it is reported as a failed run.
    """

    def __init__(
        self, recipe: TrainRecipe, first_step: int, steps: int, main: bool, manifest: Mapping[str, Any], workspace: Path
    ) -> None:
        """manifest: the run's (see `runs.RunManifest`); only rank 0 uses it."""
        self.main, self.steps, self.every = main, steps, recipe.monitor.print_every
        self.name = recipe.run.name or Path(recipe.run.dir).name
        self.senders: list[Sender] = []
        self.closed, self.was_skipped = False, False
        if not main:
            return
        file = Path(recipe.run.dir) / "metrics.jsonl"
        beside = workspace / file.name
        drop_from(file, first_step, beside)
        # Opened before it is published: a process whose run another has taken over must not reach its successor's file.
        self.file = beside.open("a", encoding="utf-8")
        self.records = beside.open("rb")
        disk.publish(beside, file)
        self.progress = Progress(steps, self.name, initial=first_step, lines=0)
        # The other ranks wait for the last records, which must not take them for a rank that hangs.
        self.end_seconds = min(END_SECONDS, recipe.train.hang_seconds / 4)
        for sink, options in sinks_of(recipe, self.name, manifest).items():
            self.senders.append(Sender(self.name, sink, options, self.records.fileno()))
        if restart := restart_count():
            self.alert("Requeued", f"Slurm restarted the job ({_job()}, restart {restart}): on from step {first_step}")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self.closed:
            return
        if isinstance(error, Fenced):  # the run is another job's, which reports it
            for sender in self.senders:
                sender.kill()
            return
        if not isinstance(error, signals.StopRequested):
            self.alert("Failed", f"{type(error).__name__}: {error}")
        self._end("failed")

    def log(self, record: dict[str, Any]) -> None:
        """Report one step; `record["step"]` counts from 1."""
        if not self.main:
            return
        self.file.write(state.sealed("metrics", record))
        self.file.flush()
        step = record["step"]
        text = (
            f"loss {_number(record['loss'], 4)}  grad {_number(record['grad_norm'], 3)}  "
            f"{record['tokens_per_s']:.0f} tok/s"
        )
        if record["skipped"]:
            text += "  SKIPPED: the gradient is not finite"
        self.progress.update(text=text)
        if self.progress.bar is None and (step % self.every == 0 or step == self.steps or record["skipped"]):
            log.info(f"{self.name}: step {step}/{self.steps}  {text}")
        if record["skipped"] and not self.was_skipped:  # the first of several in a row
            self.alert("Step skipped", f"step {step}: the gradient is not finite; no weight changed")
        self.was_skipped = record["skipped"]
        for sender in self.senders:
            sender.tick()

    def alert(self, title: str, text: str) -> None:
        """Notify the run's owner through the sinks that can."""
        for sender in self.senders:
            sender.send("alert", title=f"{self.name}: {title}", text=masked(text))

    def close(self, preempted: bool = False) -> None:
        """End the records. preempted: W&B marks the run as one that will continue."""
        if not self.main:
            return
        if preempted:
            self.alert("Stopped", f"{signals.received() or 'a signal'} came; the same command continues ({_job()})")
        self._end("stopped" if preempted else "finished")

    def _end(self, end: End) -> None:
        if not self.main:
            return
        self.closed = True
        self.file.close()
        self.progress.close()
        limit = time.monotonic() + (self.end_seconds if end == "finished" else min(STOP_SECONDS, self.end_seconds))
        for sender in self.senders:
            sender.ending(end)
        for sender in self.senders:
            sender.close(limit - time.monotonic())
        self.records.close()


def sinks_of(recipe: TrainRecipe, name: str, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sink -> its options (see `monitoring.wandb_run`, `monitoring.tensorboard`), of those that the recipe names."""
    options, sinks = recipe.monitor, {}
    if options.wandb != "off":
        job = {key: os.environ.get(f"SLURM_{key.upper()}") for key in ("job_id", "restart_count", "job_nodelist")}
        recorded = {key: manifest[key] for key in FROM_MANIFEST if key in manifest}
        shown = {key: getattr(options, key) for key in ("group", "tags", "job_type", "notes")}
        config = {**configs.to_dict(recipe), "manifest": recorded, "slurm": job}
        sinks["wandb"] = wandb_run.options(
            options, recipe.run.dir, manifest["wandb_id"], evaluation=False, name=name, config=config, **shown
        )
    if options.tensorboard:
        sinks["tensorboard"] = {"dir": str(Path(recipe.run.dir) / "tensorboard")}
    return sinks


def check(recipe: TrainRecipe) -> None:
    """Raise ConfigError when the recipe names a sink whose library is not installed."""
    if recipe.monitor.tensorboard and not tensorboard.installed():
        raise ConfigError(
            f"monitor.tensorboard: needs {tensorboard.LIBRARY}, which is not installed; "
            "`pip install 'mirage-dist[tensorboard]'` brings it"
        )


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"Slurm job {job}" if job else "not a Slurm job"


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def new_wandb_id() -> str:
    """A random id for a W&B run."""
    return secrets.token_hex(4)


def drop_from(file: Path, first_step: int, out: Path) -> int:
    """Write the records of steps up to `first_step` to `out`; later steps will be repeated.

    Returns the last step on record. Raises as `records`.
    """
    kept = last = 0
    with out.open("wb") as handle:
        for line, record in records(file, first_step) if file.exists() else ():
            last = max(last, record["step"])
            if record["step"] <= first_step:
                handle.write(line)
                kept = record["step"]
    if kept < first_step:
        log.warning(f"{file}: holds no whole record of steps {kept + 1} to {first_step}; the run goes on without them")
    return last


def records(file: Path, needed: int | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of metrics.jsonl and the object in each, without its seal.

    A killed run's last line may be cut off: what is damaged after the last whole line is left out. Raises state.Damaged
    for any other damaged line, unless all lines after it are of later steps than `needed` (None: all are needed).
    """
    damage: state.Damaged | None = None
    for number, (_, line) in enumerate(state.lines(file), 1):
        try:
            record = state.parse("metrics", line, f"{file}: line {number}")
        except state.Damaged as error:
            damage = damage or error
            continue
        if damage is not None and (needed is None or record["step"] <= needed):
            raise state.Damaged(f"{damage}. Restore the file, or delete the line to go on without its record")
        yield line, record


class Means:
    """Means of loss, terms and logged values over the steps since the last checkpoint; retention compares them.

    best: the metric that retention minimises. Raises ConfigError at the first step when no metric has that name.
    """

    def __init__(self, best: str | None) -> None:
        self.best = best
        self.values: dict[str, list[float]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        grouped = {f"{group}.{name}": value for group in GROUPS for name, value in record.get(group, {}).items()}
        metrics = {"loss": record["loss"], **grouped}
        if self.best is not None and self.best not in metrics:
            raise ConfigError(f"train.keep_best={self.best}: {configs.nearest(self.best, list(metrics))}")
        for name, value in metrics.items():
            if value is not None:  # None in a skipped step
                self.values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The means so far; the next ones start anew."""
        means = {name: fmean(values) for name, values in self.values.items()}
        self.values.clear()
        return means


class Clock:
    """Seconds between two laps, and the peak memory in MiB since the last lap."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def skip(self) -> None:
        """Exclude the time since the last lap from the next one."""
        self.last = time.perf_counter()

    def lap(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return {"step_seconds": seconds, "memory_mib": self._memory()}

    def _memory(self) -> float:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
