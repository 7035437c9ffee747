"""What a run reports of its steps: metrics.jsonl, a progress bar or lines, and W&B if the recipe names it."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mirage_dist import config as configs
from mirage_dist import disk
from mirage_dist.progress import Progress, log
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.signals import STOPPED

GROUPS = ("terms", "values", "group_lr")  # mappings in a record: name -> value


class Monitor:
    """Rank 0's records of a run from `first_step` on; on other ranks it does nothing.

    `metrics.jsonl` holds one object for each step: a resumed run drops the lines of the steps that it will repeat. W&B
    cannot drop any, so repeated steps are not sent again.
    """

    def __init__(
        self, recipe: TrainRecipe, first_step: int, steps: int, main: bool, wandb_id: str, workspace: Path
    ) -> None:
        self.main, self.steps, self.every = main, steps, recipe.monitor.print_every
        self.name = recipe.run.name or Path(recipe.run.dir).name
        self.run: Any = None
        if not main:
            return
        file = Path(recipe.run.dir) / "metrics.jsonl"
        beside = workspace / file.name
        self.sent = drop_from(file, first_step, beside)
        # Opened before it is published: a process whose run another has taken over must not reach its successor's file.
        self.file = beside.open("a", encoding="utf-8")
        disk.publish(beside, file)
        self.progress = Progress(steps, self.name, initial=first_step, lines=0)
        if recipe.monitor.wandb != "off":
            self.run = start_wandb(recipe, self.name, wandb_id)

    def log(self, record: dict[str, Any]) -> None:
        """Report one step; `record["step"]` counts from 1."""
        if not self.main:
            return
        self.file.write(json.dumps(record) + "\n")
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
        if self.run is not None and step > self.sent:
            flat = {k: v for k, v in record.items() if k not in ("step", *GROUPS)}
            grouped = {f"{group}/{k}": v for group in GROUPS for k, v in record.get(group, {}).items()}
            self.run.log({**flat, **grouped}, step=step)

    def close(self, preempted: bool = False) -> None:
        """End the records. preempted: W&B marks the run as one that will continue."""
        if not self.main:
            return
        self.file.close()
        self.progress.close()
        if self.run is not None:
            if preempted:
                self.run.mark_preempting()
            self.run.finish(exit_code=STOPPED if preempted else 0)


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def start_wandb(recipe: TrainRecipe, name: str, identity: str) -> Any:
    """One W&B run for all ranks, continued after a resume; recorded on disk where W&B cannot be reached."""
    import wandb

    options = recipe.monitor
    given: dict[str, Any] = {
        "project": options.project,
        "entity": options.entity,
        "name": name,
        "id": identity,
        "resume": "allow",
        "dir": recipe.run.dir,
        "config": configs.to_dict(recipe),
    }
    if options.wandb == "online":
        try:
            return wandb.init(mode="online", **given)
        except (wandb.Error, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            log.info(
                f"{name}: W&B cannot be reached ({reason}); this part of the run is recorded under "
                f"{recipe.run.dir}/wandb, to be sent later with `wandb sync`"
            )
            # W&B's service still holds the run's id and would refuse a second start with it.
            wandb.teardown()
            os.environ.pop("WANDB_SERVICE", None)  # names a service that a parent process started and that has ended
    return wandb.init(mode="offline", **given)


def new_wandb_id() -> str:
    """A random id for a W&B run."""
    return secrets.token_hex(4)


def drop_from(file: Path, first_step: int, out: Path) -> int:
    """Write the records of steps up to `first_step` to `out`; later steps will be repeated.

    Returns the last step on record.
    """
    kept, last = [], 0
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []:
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue  # a killed run's last line may be cut off
        last = max(last, step)
        if step <= first_step:
            kept.append(line)
    out.write_text("".join(kept), encoding="utf-8")
    return last


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
