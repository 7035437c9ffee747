"""The step."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mirage_dist.model.families import roles
from mirage_dist.model.reference import LogProbs, Reference
from mirage_dist.objectives.base import Logged, Term
from mirage_dist.ranks import everyones, meet, on_device
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.train.context import Run
from mirage_dist.train.engine import learning_rate
from mirage_dist.train.feed import MicroBatch
from mirage_dist.train.measures import usage
from mirage_dist.train.measures.flops import Cost
from mirage_dist.train.measures.records import Record
from mirage_dist.train.measures.timing import Stopwatch
from mirage_dist.train.optimizers.groups import set_rates
from mirage_dist.train.views import Views

Count = TypeVar("Count")
PARTS = ("data", "forward", "backward", "gather", "checkpoint")  # of a step, as every rank reports them


class NonFinite(RunError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Loop:
    """One optimizer step at a time, the same loss and gradient for every micro-batch, accumulation and world size.

    The host waits for the device once a step, at its end. Every rank makes a loop at the same point.
    """

    def __init__(self, run: Run, reference: Reference | None) -> None:
        self.run, self.engine, self.objective, self.group = run, run.engine, run.objective, run.group
        self.views = Views(run.engine, run.objective.needs, reference)
        self.skipped_in_a_row = 0
        self.hosts = everyones(run.group, socket.gethostname())
        self.watch = Stopwatch(run.group.device)
        self.watch.follow(run.engine.module, roles.decoder(run.engine.module.backbone))
        live = reference is not None and not isinstance(reference, LogProbs)
        other = getattr(reference, "engine", run.engine)
        if other is not run.engine:
            self.watch.follow(other.module, roles.decoder(other.module.backbone))
        first = (self.views.share or 0) if live else None
        self.cost = Cost(run.engine.module, run.objective.needs, self.views.narrows, first)

    def windows(self, made: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """The windows of a run's steps; the wait for each is part of its step's time."""
        return self.watch.waiting(made)

    def step(
        self,
        number: int,
        window: Sequence[MicroBatch],
        flags: Callable[[], Sequence[bool]] = tuple,
        before_update: Callable[[], None] = lambda: None,
    ) -> tuple[Record, Tensor]:
        """Step `number` (from 0) of the run, on its window: its record for metrics.jsonl, and all ranks' flags.

        window: see `Feed.window`. flags: this rank's, called after the update and sent with the values that are
        gathered anyway; the result is (ranks, flags). before_update: called when all gradients exist and no weight has
        changed. Raises NonFinite, and ConfigError for a count that the data do not have.
        """
        names, counts_N = self.agree(number, self.run.feed.counts(window))
        counts = dict(zip(names, counts_N.unbind(), strict=True))
        rate = learning_rate(self.run.recipe.train, number, self.run.feed.steps)
        group_rates = set_rates(self.engine.optimizer, rate)
        sums: list[Any] = []
        for micro in window:
            with self.watch.part("forward"):
                values = self.objective(self.views(micro.to(self.group.device)))
                terms = [v for v in values if isinstance(v, Term)]
                loss = sum((normalised(t, counts) for t in terms), torch.zeros((), device=self.group.device))
            with self.watch.part("backward"):
                # DeepSpeed averages gradients over ranks; the counts are global already.
                self.engine.backward(loss * self.group.size, scale_wrt_gas=False)
            if micro is window[-1]:
                with self.watch.part("checkpoint"):
                    before_update()
            with self.watch.part("update"):
                self.engine.step()  # clips, checks and steps after the last micro-batch of the window
            sums = [s + v.sum.detach() for s, v in zip(sums or [0] * len(values), values, strict=True)]
        raised = [bool(flag) for flag in flags()]
        table, counted = self.collected(number, sums, counts_N, raised)
        ends = (len(sums), len(sums) + 1, len(sums) + 1 + len(raised))
        record = self.record(
            number, rate, dict(zip(names, counted, strict=True)), values, table[:, : ends[0]].sum(0), table[0, ends[0]]
        )
        self._add_clocked(record, table[:, ends[2] :])
        if group_rates:
            record["group_lr"] = group_rates
        return record, table[:, ends[1] : ends[2]]

    def agree(self, number: int, own: Mapping[str, float]) -> tuple[list[str], Tensor]:
        """Names of the counts and their global values (n,) of the whole window, on the device, before its first
        forward; every rank must be at the same step.
        """
        return list(own), meet(self.group, list(own.values()), f"step {number}: {' '.join(own)}").sum(0)

    def collected(
        self, number: int, sums: Sequence[Tensor], counts_N: Tensor, flags: Sequence[bool]
    ) -> tuple[Tensor, list[float]]:
        """Every rank's row (sums of the values, gradient norm, flags, times, memory), and the global counts.

        One collective, and the step's one wait for the device.
        """
        norm = self.engine.get_global_grad_norm()
        known = isinstance(norm, Tensor)
        first = [s.double() for s in sums] + ([norm.double().to(self.group.device)] if known else [])
        times = [self.watch.own(), *(self.watch.seconds(part) for part in PARTS)]
        host = [*([] if known else [float(norm or 0.0)]), *flags, *times, *usage.peaks(self.group.device)]
        row = torch.cat([torch.stack(first), on_device(self.group, host)])
        table = meet(self.group, row, f"terms of step {number}")
        both = torch.cat([table.flatten(), counts_N]).cpu()
        return both[: table.numel()].view(table.shape), both[table.numel() :].tolist()

    def record(
        self,
        number: int,
        rate: float,
        counts: Mapping[str, float],
        values: Sequence[Term | Logged],
        sums: Tensor,
        norm: Tensor,
    ) -> Record:
        """Global values of a finished step; counts a step that DeepSpeed skipped because of its gradient."""
        if empty := sorted({v.count for v in values if not total(v, counts)}):
            raise RunError(f"step {number + 1}: the batch has none of {', '.join(empty)}, by which its loss is divided")
        means = [(v, s / total(v, counts)) for v, s in zip(values, sums.tolist(), strict=True)]
        terms = {v.name: mean for v, mean in means if isinstance(v, Term)}
        loss = sum(v.weight * mean for v, mean in means if isinstance(v, Term))
        logged = {v.name: _finite(mean) for v, mean in means if isinstance(v, Logged)}
        skipped = bool(self.engine.optimizer.overflow)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self.run.recipe.train.nonfinite_patience:
            raise NonFinite(
                f"step {number + 1}: loss {loss}, and the gradient was not finite in {self.skipped_in_a_row} steps "
                "in a row (train.nonfinite_patience); lower train.lr or look at the data of these steps"
            )
        record: Record = {
            "step": number + 1,
            "loss": _finite(loss),
            "terms": {name: _finite(value) for name, value in terms.items()},
            "grad_norm": None if skipped else _finite(float(norm)),
            "lr": rate,
            "micro_batch": self.run.recipe.train.rows,
            "skipped": skipped,
            "tokens": int(counts["input_tokens"]),
            "padding": 1 - counts["input_tokens"] / counts["slots"],
            "cut": int(counts["cut"]),
            "flops": self.cost.step(counts),
            "seconds": {},
            "memory": {},
            "memory_mib": 0.0,
        }
        if logged:
            record["values"] = logged
        return record

    def _add_clocked(self, record: Record, measured: Tensor) -> None:
        """Add what the ranks measured: rows of `own`, PARTS and `usage.NAMES`."""
        own, parts = measured[:, 0], measured[:, 1 : 1 + len(PARTS)]
        most = dict(zip(usage.NAMES, measured[:, 1 + len(PARTS) :].amax(0).tolist(), strict=True))
        seconds = dict(zip(PARTS, parts.mean(0).tolist(), strict=True))
        record["seconds"] = {**seconds, "update": self.watch.seconds("update")}
        record["memory"] = {name: value for name, value in most.items() if value}
        record["memory_mib"] = most["allocated_mib"] or most["host_mib"]
        if self.group.size > 1:
            slow = int(own.argmax())
            record["seconds"]["waiting"] = float(own[slow] - own.mean())
            data = float(parts[slow, PARTS.index("data")])
            record["slowest"] = {"rank": slow, "host": self.hosts[slow], "seconds": float(own[slow]), "data": data}


def normalised(term: Term, counts: Mapping[str, Tensor]) -> Tensor:
    """weight · sum / count, bitwise as with a count that is a number of the host, in the dtype of the sum."""
    count = total(term, counts)
    factor = torch.full_like(count, term.weight) / count  # weight / count would be weight · (1 / count)
    # A float64 scalar of the device would make the product float64, and a number of the host multiplies in float32.
    wide = torch.promote_types(term.sum.dtype, torch.float32)
    return (term.sum * factor.to(wide)).to(term.sum.dtype)


def total(value: Term | Logged, counts: Mapping[str, Count]) -> Count:
    """The global count that normalises a term or a logged value. Raises ConfigError when the data have none of it."""
    if value.count not in counts:
        names = ", ".join(name for name in counts if "." in name or name == "micro_batches")
        raise ConfigError(
            f"objective: {value.name!r} counts {value.count!r}; expected one of {names} (micro_batches only with "
            "needs.by_micro_batch)"
        )
    return counts[value.count]


def _finite(value: float) -> float | None:
    """JSON has no NaN: a value that is not finite becomes null."""
    return value if math.isfinite(value) else None
