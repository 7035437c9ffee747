"""What a run reports of its steps: metrics.jsonl, a progress bar or lines, and the sinks that the recipe names."""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

from mirage_dist import config as configs
from mirage_dist import disk, signals, state
from mirage_dist.liveness import restart_count
from mirage_dist.monitoring import tensorboard, wandb_run
from mirage_dist.monitoring.process import END_SECONDS, STOP_SECONDS, Sender
from mirage_dist.monitoring.sinks import End
from mirage_dist.progress import Progress, log
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.schema.secrets import masked
from mirage_dist.train.lease import Fenced
from mirage_dist.train.measures import flops
from mirage_dist.train.measures.records import Record, Spike, drop_from
from mirage_dist.train.measures.spikes import Spikes

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
PACE = 50  # steps by whose pace the time that is left is estimated, with what came between them
SLOW = 0.1  # share of a step that the ranks wait for the slowest one, from which on a line names it


class Monitor:
    """Rank 0's records of a run from `first_step` on; on other ranks it does nothing.

    `metrics.jsonl` holds one object for each step: a resumed run drops the lines of the steps that it will repeat. W&B
    and TensorBoard are served from it by processes of their own (see `monitoring`): whatever becomes of them, the run
    goes on, and each of them holds every step once. A context manager: an error within it is reported as a failed run.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        first_step: int,
        steps: int,
        group: Group,
        manifest: Mapping[str, Any],
        workspace: Path,
        samples_of: Callable[[int], dict[str, list[str]]] = lambda _step: {},
        amended: Mapping[str, Any] | None = None,
    ) -> None:
        """manifest: the run's (see `runs.RunManifest`); only rank 0 uses it. samples_of: a step (from 0) -> ids of its
        samples on all ranks, by stream. amended: what the record of `first_step` lacks.
        """
        self.main, self.steps, self.every = group.main, steps, recipe.monitor.print_every
        self.name = recipe.run.name or Path(recipe.run.dir).name
        self.senders: list[Sender] = []
        self.closed, self.was_skipped = False, False
        if not self.main:
            return
        file = Path(recipe.run.dir) / "metrics.jsonl"
        beside = workspace / file.name
        self.spikes, self.samples_of = Spikes(recipe.monitor.spike), samples_of
        for record in drop_from(file, first_step, beside, amended):
            self.spikes.add(record)
        self.group = group
        name = torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else ""
        self.peak = flops.peak(name)
        if name and self.peak is None:
            log.info(f"{self.name}: no MFU, because the peak of a {name} is not known here")
        self.times = deque([time.monotonic()], maxlen=PACE)
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

    def log(self, record: Record, step_seconds: float) -> None:
        """Report one step; `record["step"]` counts from 1. step_seconds: how long it took by the clock."""
        if not self.main:
            return
        step = record["step"]
        record["step_seconds"] = step_seconds
        record["tokens_per_s"] = record["tokens"] / step_seconds
        record["tokens_per_s_gpu"] = record["tokens_per_s"] / self.group.size
        if self.peak is not None:
            record["mfu"] = record["flops"] / step_seconds / (self.group.size * self.peak)
        if scores := self.spikes.add(record):
            record["spike"] = Spike(scores=scores, samples=self.samples_of(step - 1))
        self.file.write(state.sealed("metrics", cast(Mapping[str, Any], record)))
        self.file.flush()
        self._show(record)
        if record["skipped"] and not self.was_skipped:  # the first of several in a row
            self.alert("Step skipped", f"step {step}: the gradient is not finite; no weight changed")
        self.was_skipped = record["skipped"]
        for sender in self.senders:
            sender.tick()

    def _show(self, record: Record) -> None:
        step, text = record["step"], _text(record)
        self.times.append(time.monotonic())
        self.progress.update(text=text)
        worth = record["skipped"] or record.get("validation") is not None
        if self.progress.bar is None and (step % self.every == 0 or step == self.steps or worth):
            pace = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
            left = timedelta(seconds=round(pace * (self.steps - step)))
            log.info(f"{self.name}: step {step}/{self.steps}  {text}  {left} left")
        if (spike := record.get("spike")) is not None:
            outliers = ", ".join(f"{n} {_number(record[n], 4)} ({score:.0f})" for n, score in spike["scores"].items())
            log.warning(
                f"{self.name}: step {step}: {outliers} stands out of the steps before it (in brackets: deviations "
                "above their median); metrics.jsonl names its samples"
            )

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


def _text(record: Record) -> str:
    """A step in a few words, for the bar and the log."""
    text = (
        f"loss {_number(record['loss'], 4)}  grad {_number(record['grad_norm'], 3)}  "
        f"{record.get('tokens_per_s', 0.0):.0f} tok/s"
    )
    if (share := record.get("mfu")) is not None:
        text += f"  {share:.0%} MFU"
    if (held_out := record.get("validation")) is not None:
        text += f"  validation {_number(held_out['loss'], 4)}"
    slowest, waiting = record.get("slowest"), record["seconds"].get("waiting", 0.0)
    if slowest is not None and waiting > SLOW * record.get("step_seconds", 0.0):
        text += f"  waits {waiting:.2f} s for rank {slowest['rank']} on {slowest['host']}"
    if record["skipped"]:
        text += "  SKIPPED: the gradient is not finite"
    return text


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
