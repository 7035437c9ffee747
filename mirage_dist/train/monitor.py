"""What a run tells: metrics.jsonl, one progress line, W&B when asked."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from mirage_dist import config as configs
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.signals import STOPPED

GROUPS = ("terms", "values")  # of a record: what an objective returned (see `objectives.base`), by name


class Monitor:
    """Rank 0's records of a run from `first_step` on; on other ranks it does nothing.

    `metrics.jsonl` holds one object a step, each step once: a resumed run drops the lines from where it resumes. W&B
    keeps what it has, so steps that are made again are not sent again.
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
        # Opened before it is put in place: a process that another took over from has no way to its successor's file.
        self.file = beside.open("a", encoding="utf-8")
        beside.replace(file)
        bar = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=first_step, desc=self.name, unit="step") if bar else None
        if recipe.monitor.wandb != "off":
            self.run = start_wandb(recipe, self.name, wandb_id)

    def log(self, record: dict[str, Any]) -> None:
        """One step's record; `step` counts from 1."""
        if not self.main:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        step = record["step"]
        told = (
            f"loss {_told(record['loss'], 4)}  grad {_told(record['grad_norm'], 3)}  {record['tokens_per_s']:.0f} tok/s"
        )
        if record["skipped"]:
            told += "  SKIPPED: the gradient is not finite"
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(told)
        elif step % self.every == 0 or step == self.steps or record["skipped"]:
            print(f"{self.name}: step {step}/{self.steps}  {told}", flush=True)
        if self.run is not None and step > self.sent:
            flat = {k: v for k, v in record.items() if k not in ("step", *GROUPS)}
            grouped = {f"{group}/{k}": v for group in GROUPS for k, v in record.get(group, {}).items()}
            self.run.log({**flat, **grouped}, step=step)

    def close(self, preempted: bool = False) -> None:
        """End the records; `preempted` tells W&B that the run will go on."""
        if not self.main:
            return
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        if self.run is not None:
            if preempted:
                self.run.mark_preempting()
            self.run.finish(exit_code=STOPPED if preempted else 0)


def _told(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def start_wandb(recipe: TrainRecipe, name: str, identity: str) -> Any:
    """One run for all ranks, the same one after a resume; recorded on disk where W&B cannot be reached."""
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
            print(
                f"{name}: W&B cannot be reached ({reason}); this part of the run is recorded under "
                f"{recipe.run.dir}/wandb, to be sent later with `wandb sync`",
                flush=True,
            )
            # Its service still holds the id, and would refuse it.
            wandb.teardown()
            os.environ.pop("WANDB_SERVICE", None)  # a service that a parent process had started ends with it
    return wandb.init(mode="offline", **given)


def new_wandb_id() -> str:
    """An id that no other run has."""
    return secrets.token_hex(4)


def drop_from(file: Path, first_step: int, out: Path) -> int:
    """Write the records of steps up to `first_step` to `out`; those after it will be made again.

    Returns the last step that there was.
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
    """Means of loss and terms over the steps since the last checkpoint, by which retention chooses the best one.

    best: the metric that it is to go by. Raises ConfigError at the first step when there is none of that name.
    """

    def __init__(self, best: str | None) -> None:
        self.best = best
        self.values: dict[str, list[float]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        grouped = {f"{group}.{name}": value for group in GROUPS for name, value in record.get(group, {}).items()}
        told = {"loss": record["loss"], **grouped}
        if self.best is not None and self.best not in told:
            raise ConfigError(f"train.keep_best={self.best}: {configs.nearest(self.best, list(told))}")
        for name, value in told.items():
            if value is not None:  # a step that was skipped
                self.values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The means, and a new beginning."""
        told = {name: fmean(values) for name, values in self.values.items()}
        self.values.clear()
        return told


class Clock:
    """Seconds between steps, and peak memory in MiB since the last one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def skip(self) -> None:
        """Leave what has happened since the last lap out of the next one."""
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
