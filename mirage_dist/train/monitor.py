"""What a run tells: metrics.jsonl, one progress line, W&B when asked."""

from __future__ import annotations

import json
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mirage_dist import config as configs
from mirage_dist.config import TrainRecipe


class Monitor:
    """Rank 0's records of a run from `first_step` on; on other ranks it does nothing.

    `metrics.jsonl` holds one object a step, each step once: a resumed run drops the lines from where it resumes.
    """

    def __init__(self, recipe: TrainRecipe, first_step: int, steps: int, main: bool, wandb_id: str) -> None:
        self.main, self.steps, self.every = main, steps, recipe.monitor.print_every
        self.name = recipe.run.name or Path(recipe.run.dir).name
        self.run: Any = None
        if not main:
            return
        self.file = Path(recipe.run.dir) / "metrics.jsonl"
        drop_from(self.file, first_step)
        bar = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=first_step, desc=self.name, unit="step") if bar else None
        if recipe.monitor.wandb != "off":
            self.run = start_wandb(recipe, self.name, wandb_id)

    def log(self, record: dict[str, Any]) -> None:
        """One step's record; `step` counts from 1."""
        if not self.main:
            return
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
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
        if self.run is not None:
            flat = {k: v for k, v in record.items() if k not in ("step", "terms")}
            self.run.log({**flat, **{f"terms/{k}": v for k, v in record["terms"].items()}}, step=step)

    def close(self) -> None:
        if self.main and self.bar is not None:
            self.bar.close()
        if self.run is not None:
            self.run.finish()


def _told(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def start_wandb(recipe: TrainRecipe, name: str, identity: str) -> Any:
    """One run for all ranks, the same one after a resume."""
    import wandb

    options = recipe.monitor
    return wandb.init(
        project=options.project,
        entity=options.entity,
        name=name,
        id=identity,
        resume="allow",
        mode="online" if options.wandb == "online" else "offline",
        dir=recipe.run.dir,
        config=configs.to_dict(recipe),
    )


def new_wandb_id() -> str:
    """An id that no other run has."""
    return secrets.token_hex(4)


def drop_from(file: Path, first_step: int) -> None:
    """Keep the records of steps up to `first_step`; those after it will be made again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a killed run's last line may be cut off
        if record["step"] <= first_step:
            kept.append(line)
    beside = file.with_suffix(".tmp")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(file)


class Clock:
    """Seconds between steps, and peak memory in MiB since the last one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

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
