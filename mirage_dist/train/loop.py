"""The step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from mirage_dist.model.reference import Reference
from mirage_dist.objectives.base import Logged, Term
from mirage_dist.ranks import gather
from mirage_dist.schema import ConfigError, RunError
from mirage_dist.train.context import Run
from mirage_dist.train.engine import learning_rate
from mirage_dist.train.feed import MicroBatch
from mirage_dist.train.views import Views


class NonFinite(RunError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Record(TypedDict):
    """One step in metrics.jsonl; null stands for a value that is not finite.

    step: from 1. terms, values: what the objective returned (see `objectives.base`), divided by the global counts;
    `values` is left out when it is empty. skipped: the gradient was not finite, so no weight changed. tokens: input
    tokens of all ranks, without padding. padding: fraction of the positions. cut: samples whose answer was truncated.
    """

    step: int
    loss: float | None
    terms: dict[str, float | None]
    values: NotRequired[dict[str, float | None]]
    grad_norm: float | None
    lr: float
    skipped: bool
    tokens: int
    padding: float
    cut: int


class Loop:
    """One optimizer step at a time, the same loss and gradient for every micro-batch, accumulation and world size."""

    def __init__(self, run: Run, reference: Reference | None) -> None:
        self.run, self.engine, self.objective, self.group = run, run.engine, run.objective, run.group
        self.views = Views(run.engine, run.objective.needs, reference)
        self.skipped_in_a_row = 0

    def step(
        self,
        number: int,
        window: Sequence[MicroBatch],
        flags: Sequence[bool] = (),
        before_update: Callable[[], None] = lambda: None,
    ) -> tuple[Record, Tensor]:
        """Step `number` (from 0) of the run, on its window: its record for metrics.jsonl, and all ranks' flags.

        window: see `Feed.window`. flags: this rank's, sent with the values that are gathered anyway; the result is
        (ranks, flags). before_update: called when all gradients exist and no weight has changed.
        Raises NonFinite, and ConfigError for a count that the data do not have.
        """
        counts = self.agree(number, self.run.feed.counts(window))
        rate = learning_rate(self.run.recipe.train, number, self.run.feed.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums: list[Any] = []
        for micro in window:
            values = self.objective(self.views(micro.to(self.group.device)))
            terms = [v for v in values if isinstance(v, Term)]
            loss = sum((t.weight / total(t, counts) * t.sum for t in terms), torch.zeros((), device=self.group.device))
            # DeepSpeed averages gradients over ranks; the counts are global already.
            self.engine.backward(loss * self.group.size, scale_wrt_gas=False)
            if micro is window[-1]:
                before_update()
            self.engine.step()  # clips, checks and steps after the last micro-batch of the window
            sums = [s + v.sum.detach() for s, v in zip(sums or [0] * len(values), values, strict=True)]
        local = torch.stack([s.double() for s in sums]).tolist()
        table = gather(self.group, [*local, *flags], f"terms of step {number}")
        return self.record(number, rate, counts, values, table[:, : len(local)].sum(0)), table[:, len(local) :]

    def agree(self, number: int, own: Mapping[str, float]) -> dict[str, float]:
        """Global counts of the whole window, before its first forward; every rank must be at the same step."""
        summed = gather(self.group, list(own.values()), f"step {number}: {' '.join(own)}").sum(0)
        return dict(zip(own, summed.tolist(), strict=True))

    def record(
        self, number: int, rate: float, counts: Mapping[str, float], values: Sequence[Term | Logged], sums: Tensor
    ) -> Record:
        """Global values of a finished step; counts a step that DeepSpeed skipped because of its gradient."""
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
        norm = float("nan") if skipped else float(self.engine.get_global_grad_norm())
        record: Record = {
            "step": number + 1,
            "loss": _finite(loss),
            "terms": {name: _finite(value) for name, value in terms.items()},
            "grad_norm": _finite(norm),
            "lr": rate,
            "skipped": skipped,
            "tokens": int(counts["input_tokens"]),
            "padding": 1 - counts["input_tokens"] / counts["slots"],
            "cut": int(counts["cut"]),
        }
        if logged:
            record["values"] = logged
        return record


def total(value: Term | Logged, counts: Mapping[str, float]) -> float:
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
