"""What a check is: one function from a `Context` to a `Verdict`, and one line of `CHECKS`.

    def driver(context: Context) -> Verdict:
        return ok("driver 580.65")

A check never raises for what it examines; what it raises anyway is reported as its failure (see `doctor.run`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mirage_dist.ranks import Group
from mirage_dist.schema import TrainRecipe

Status = Literal["ok", "not here", "warning", "failed"]
SEVERITY: tuple[Status, ...] = ("ok", "not here", "warning", "failed")
# Which ranks make a check: rank 0; the first rank of each host; every rank; all of them together, by collectives.
Scope = Literal["main", "host", "rank", "together"]


@dataclass(frozen=True)
class Verdict:
    """The result of a check: a line, how to mend what is wrong, and the measured values by name (JSON)."""

    status: Status
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def ok(text: str, **values: Any) -> Verdict:
    return Verdict("ok", text, "", values)


def not_here(text: str, remedy: str = "", **values: Any) -> Verdict:
    """For what this machine does not have, and what a run can do without."""
    return Verdict("not here", text, remedy, values)


def warning(text: str, remedy: str, **values: Any) -> Verdict:
    return Verdict("warning", text, remedy, values)


def failed(text: str, remedy: str, **values: Any) -> Verdict:
    return Verdict("failed", text, remedy, values)


class Peer(NamedTuple):
    """Where a rank is."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass
class Context:
    """What a check may use.

    peers: of every rank, in order. folder: where runs are to be written, as given; it need not exist. place: a folder
    of this command in that file system, the same on every rank, removed in the end; None where none can be made, for
    the reason `fault`. recipe: None where none was given. measured: what earlier checks of this rank have measured, by
    name.
    """

    group: Group
    peers: Sequence[Peer]
    folder: Path
    place: Path | None = None
    fault: str = ""
    recipe: TrainRecipe | None = None
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def here(self) -> Peer:
        return self.peers[self.group.rank]

    @property
    def of_host(self) -> list[Peer]:
        """The ranks on this host."""
        return [peer for peer in self.peers if peer.host == self.here.host]


class Check(NamedTuple):
    """function: "module:function" below `mirage_dist.doctor`; its module is imported when the check is made."""

    name: str
    group: str
    function: str
    scope: Scope

    def __call__(self, context: Context) -> Verdict:
        module, _, name = self.function.partition(":")
        function: Callable[[Context], Verdict] = getattr(importlib.import_module(f"mirage_dist.doctor.{module}"), name)
        return function(context)


# In the order in which they are made: later ones may use what earlier ones have measured.
CHECKS = (
    Check("python", "software", "software:python", "host"),
    Check("packages", "software", "software:packages", "host"),
    Check("optional packages", "software", "software:optional", "host"),
    Check("checkout", "software", "software:checkout", "host"),
    Check("GPU", "GPU", "gpu:device", "rank"),
    Check("one rank a GPU", "GPU", "gpu:sharing", "together"),
    Check("driver", "GPU", "gpu:driver", "host"),
    Check("GPU memory errors", "GPU", "gpu:memory_errors", "host"),
    Check("other GPU processes", "GPU", "gpu:processes", "host"),
    Check("loss head", "kernels", "kernels:loss_head", "rank"),
    Check("steering error", "kernels", "kernels:steering", "rank"),
    Check("attention", "kernels", "kernels:attention", "rank"),
    Check("compute speed", "ranks", "communication:compute", "together"),
    Check("all-reduce", "ranks", "communication:all_reduce", "together"),
    Check("all-gather", "ranks", "communication:all_gather", "together"),
    Check("reduce-scatter", "ranks", "communication:reduce_scatter", "together"),
    Check("links", "ranks", "communication:links", "together"),
    Check("clocks", "ranks", "communication:clocks", "together"),
    Check("write and read", "storage", "storage:speed", "host"),
    Check("space", "storage", "storage:space", "main"),
    Check("rename", "file system", "semantics:rename", "host"),
    Check("hard links", "file system", "semantics:links", "host"),
    Check("exclusive creation", "file system", "semantics:exclusive", "host"),
    Check("locks", "file system", "semantics:locks", "host"),
    Check("folder sync", "file system", "semantics:folder_sync", "host"),
    Check("modification times", "file system", "semantics:times", "host"),
    Check("seen by other ranks", "file system", "semantics:seen_by_others", "together"),
    Check("W&B", "services", "services:wandb", "main"),
    Check("Hugging Face cache", "services", "services:cache", "host"),
    Check("model and data", "services", "services:inputs", "host"),
    Check("shared memory", "limits", "limits:shared_memory", "host"),
    Check("open files", "limits", "limits:open_files", "rank"),
    Check("memory limit", "limits", "limits:memory", "host"),
    Check("threads", "limits", "limits:threads", "rank"),
    Check("requeue", "Slurm", "slurm:requeue", "main"),
    Check("preemption", "Slurm", "slurm:preemption", "main"),
    Check("time to save", "Slurm", "slurm:time_to_save", "main"),
    Check("warning before the time limit", "Slurm", "slurm:time_limit", "main"),
)
