"""Weights & Biases: one run for all starts of a training run, in which each step appears once.

Online, W&B's server says which steps it holds. Offline, the files under RUN/wandb say it (see `wandb_files`): each
start adds a folder, and `wandb sync` sends the folders of one run one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mirage_dist.monitoring import wandb_files
from mirage_dist.monitoring.sinks import End, Scalars, reason
from mirage_dist.schema import MonitorConfig
from mirage_dist.signals import STOPPED

# What the table of runs shows of a series of a training run; of others it shows the last value. docs/training.md lists
# the charts that go with them.
SUMMARIES = {
    "loss": "min,last",
    "terms/*": "min,last",
    "validation/loss": "min,last",
    "grad_norm": "max",
    "memory/*": "max",
    "memory_mib": "max",
    "step_seconds": "mean",
    "seconds/*": "mean",
    "tokens_per_s": "mean",
    "tokens_per_s_gpu": "mean",
    "mfu": "mean",
}
FLUSH_SECONDS = 1.0  # W&B's service may be killed at any time, and loses what it has not written


def options(monitor: MonitorConfig, folder: str, identity: str, evaluation: bool, **more: Any) -> dict[str, Any]:
    """What `WandbRun` takes. folder: the training run's directory. identity: the W&B run's id. more: for wandb.init."""
    return {
        "mode": monitor.wandb,
        "project": monitor.project,
        "entity": monitor.entity,
        "id": identity,
        "dir": folder,
        "watched": os.getpid(),
        "evaluation": evaluation,
        **more,
    }


class WandbRun:
    """A sink (see `sinks.Sink`).

    options: mode, and what `wandb.init` takes: project, entity, id, dir, name, config, group, tags, job_type, notes.
    watched: the process whose use of the machine is measured. evaluation: whether this adds to the run of a training
    process that may be running. name_of_run: for messages.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        given = dict(options)
        self.online = given.pop("mode") == "online"
        self.evaluation: bool = given.pop("evaluation")
        self.watched: int = given.pop("watched")
        self.say: Callable[..., None] = given.pop("say")
        self.given, self.identity = given, given["id"]
        self.folder = Path(given["dir"]) / "wandb"
        self.run: Any = None
        self.last, self.evaluated = 0, set[int]()

    def open(self) -> int:
        os.environ.pop("WANDB_SERVICE", None)  # a parent's, which is signalled and ends with the parent
        if self.online:
            self._open_online()
        if not self.online:
            self._open_offline()
        if self.evaluation:
            # Training may be many steps ahead, and W&B rejects steps that go back.
            self.run.define_metric("eval/*", step_metric="eval/step")
        else:
            for name, summary in SUMMARIES.items():
                self.run.define_metric(name, summary=summary)
        return self.last

    def _open_online(self) -> None:
        import wandb

        try:
            self.run = self._init("shared" if self.evaluation else "online")
        except Exception as error:
            self.online = False
            # W&B's service still holds the run's id and would refuse a second start with it.
            wandb.teardown()
            os.environ.pop("WANDB_SERVICE", None)
            self.say(
                warning=f"W&B cannot be reached ({reason(error)}); this part of the run is recorded under {self.folder}"
                f", to be sent later with `wandb sync`",
                goes_on=True,
            )
            return
        self.say(info=f"W&B: {self.run.url}")
        if not self.evaluation:
            self.last = max(self.run.step - 1, 0)  # the server's: a resumed run continues with the next step
            wandb_files.mark_sent(self.folder, self.identity)
            wandb_files.note(self.folder, self.identity, self.last)

    def _open_offline(self) -> None:
        before = wandb_files.held(self.folder, self.identity)
        self.run = self._init("offline")
        self.last, self.evaluated = before.step, before.evaluated
        if not self.evaluation:
            self.say(info=f"W&B: recorded under {self.folder}; `wandb sync {self.folder}/offline-run-*` sends it")
            wandb_files.note(self.folder, self.identity, self.last)

    def _init(self, mode: str) -> Any:
        import wandb

        settings: dict[str, Any] = {
            # Output may hold what the files of this run keep private; a patch of the source tree may as well.
            "console": "off",
            "disable_git": True,
            "silent": True,
            "x_stats_pid": self.watched,
            "x_transaction_log_flush_interval": FLUSH_SECONDS,
            "mode": mode,
        }
        if mode == "shared":  # training alone sets the run's final state
            settings.update(x_primary=False, x_label="eval", x_update_finish_state=False)
        else:
            settings.update(resume="allow")
        return wandb.init(settings=wandb.Settings(**settings), **self.given)

    def write(self, step: int, values: Scalars) -> None:
        self.run.log(values, step=step, commit=True)
        self.last = step

    def log(self, values: Mapping[str, float], table: Mapping[str, Any] | None) -> None:
        import wandb

        if int(values["eval/step"]) in self.evaluated:
            return
        outputs = {} if table is None else {"eval/outputs": wandb.Table(**table)}
        self.run.log({**values, **outputs})

    def summary(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def alert(self, title: str, text: str) -> None:
        self.run.alert(title, text)

    def artifact(
        self, folder: Path, files: Iterable[str], name: str, about: Mapping[str, Any], alias: str
    ) -> tuple[str, str | None]:
        """Add these files of a folder as a version of the model artifact `name`; W&B makes none of equal content.

        Returns its digest and, online, its name and version once W&B has all files. No file is copied.
        """
        import wandb

        made = wandb.Artifact(name, type="model", metadata=dict(about))
        for path in files:
            made.add_file(os.path.abspath(folder / path), name=path, policy="immutable", skip_cache=True)
        logged = self.run.log_artifact(made, aliases=[alias])
        return made.digest, logged.wait().qualified_name if self.online else None

    def close(self, end: End) -> None:
        import wandb

        if end == "stopped":
            self.run.mark_preempting()
        self.run.finish(exit_code={"finished": 0, "stopped": STOPPED, "failed": 1}[end])
        wandb.teardown()
        if self.evaluation:
            return
        if not self.online and (stored := wandb_files.held(self.folder, self.identity).step) < self.last:
            raise OSError(f"{self.folder} holds the steps up to {stored} of {self.last}: W&B could not write them")
        wandb_files.note(self.folder, self.identity, self.last)
