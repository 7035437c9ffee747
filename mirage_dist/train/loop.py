"""The step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mirage_dist.model import activations
from mirage_dist.model.activations import Narrow
from mirage_dist.model.policy import Outputs, Request
from mirage_dist.model.reference import Forward, LogProbs, shared_layer
from mirage_dist.objectives.base import Objective, Term, View
from mirage_dist.ranks import Group, gather
from mirage_dist.schema import RunError, TrainRecipe
from mirage_dist.train.engine import learning_rate
from mirage_dist.train.feed import Feed, MicroBatch
from mirage_dist.train.optimizers.groups import set_rates


class NonFinite(RunError):
    """Too many steps in a row had a loss or gradient that is no number."""


class Loop:
    """One optimizer step at a time, the same loss and gradient for every micro-batch, accumulation and world size."""

    def __init__(
        self,
        recipe: TrainRecipe,
        engine: Any,
        objective: Objective,
        feed: Feed,
        group: Group,
        reference: Forward | None,
        cache: LogProbs | None,
    ) -> None:
        self.train, self.engine, self.objective, self.feed, self.group = recipe.train, engine, objective, feed, group
        self.needs, self.reference, self.cache = objective.needs, reference, cache
        self.splits = activations.is_plain(engine.module.backbone)
        activations_only = self.needs.ref_activation and not self.needs.ref_logp and not self.needs.kl
        self.share = None
        if reference is not None and activations_only and self.needs.layer is not None:
            self.share = shared_layer(engine.module, self.needs.layer)
        self.skipped_in_a_row = 0

    def step(
        self,
        number: int,
        window: Sequence[MicroBatch],
        flags: Sequence[bool] = (),
        before_update: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, Any], Tensor]:
        """Step `number` (from 0) of the run, on its window: its record for the log. Raises NonFinite.

        window: see `Feed.window`. flags: what this rank has to tell the others; every rank gets all of them, (ranks,
        flags), with the values that are gathered anyway. before_update: called when all gradients are there and no
        weight has changed.
        """
        counts = self.agree(number, self.feed.counts(window))
        rate = learning_rate(self.train, number, self.feed.steps)
        group_rates = set_rates(self.engine.optimizer, rate)
        sums: dict[str, Tensor] = {}
        for micro in window:
            terms = self.objective(self.views(micro.to(self.group.device)))
            loss = sum((t.weight / counts[t.count] * t.sum for t in terms), torch.zeros((), device=self.group.device))
            # DeepSpeed averages gradients over ranks; the counts are global already.
            self.engine.backward(loss * self.group.size, scale_wrt_gas=False)
            if micro is window[-1]:
                before_update()
            self.engine.step()  # clips, checks and steps behind the last micro-batch of the window
            for t in terms:
                sums[t.name] = sums.get(t.name, 0) + t.sum.detach()
        local = [sums[t.name].double() for t in terms]
        table = gather(self.group, [*torch.stack(local).tolist(), *flags], f"terms of step {number}")
        record = self.record(number, rate, counts, terms, table[:, : len(terms)].sum(0))
        return record | ({"group_lr": group_rates} if group_rates else {}), table[:, len(terms) :]

    def agree(self, number: int, own: Mapping[str, float]) -> dict[str, float]:
        """Global counts of the whole window, before its first forward; every rank must be at the same step."""
        total = gather(self.group, list(own.values()), f"step {number}: {' '.join(own)}").sum(0)
        return dict(zip(own, total.tolist(), strict=True))

    def views(self, micro: MicroBatch) -> dict[str, View]:
        """One forward over all rows, cut into the streams' views."""
        needs, batch = self.needs, micro.batch
        index_N, kl_index_M = micro.index(needs.logp), micro.index(needs.kl)
        labels_N = None if index_N is None else batch.labels_BS.flatten().index_select(0, index_N + 1)
        told = Outputs()
        if self.reference is not None and self.share is None:
            told = self.reference(batch.inputs, self.asked_of_reference(micro))
        layer = needs.layer if needs.activation else None
        request = Request(index_N, labels_N, kl_index_M, told.logits_MV, layer, self.above(micro), self.share)
        out = self.engine(batch.inputs, request)
        kept = self.compared(micro)
        if self.reference is not None and out.prefix is not None:
            prefix = out.prefix if kept is None else out.prefix.of(kept)
            told = self.reference(batch.inputs, Request(layer=layer, prefix=prefix))
        logp, kl = _cut(out.logp_N, micro, needs.logp), _cut(out.kl_M, micro, needs.kl)
        ref_logp = _cut(told.logp_N, micro, needs.ref_logp)
        if self.cache is not None:
            ref_logp = {name: self.cached(micro, name) for name in needs.ref_logp}
        narrowed = told.activation_BSD is not None and len(told.activation_BSD) < len(micro.samples)
        first = kept.start if kept is not None and narrowed else 0
        return {
            name: View(
                sequences=micro.sequences(name),
                segment_N=micro.segment(name),
                logp_N=logp.get(name),
                ref_logp_N=ref_logp.get(name),
                kl_N=kl.get(name),
                activation_BSD=_part(out.activation_BSD, micro, name, 0) if name in needs.activation else None,
                ref_activation_BSD=_part(told.activation_BSD, micro, name, first)
                if name in needs.ref_activation
                else None,
                mask_BS=micro.of_stream(name, micro.mask_BS),
            )
            for name in micro.rows
        }

    def above(self, micro: MicroBatch) -> Narrow | None:
        """Above the tapped layer only the rows go on of which the head is asked something."""
        needs = self.needs
        rows = micro.span((*needs.logp, *needs.kl)) if self.splits else None
        return None if rows is None or needs.layer is None else Narrow(needs.layer + 1, rows)

    def compared(self, micro: MicroBatch) -> slice | None:
        """The rows that are compared with the reference, where not all are; None for all."""
        needs = self.needs
        return micro.span((*needs.ref_logp, *needs.kl, *needs.ref_activation)) if self.splits else None

    def asked_of_reference(self, micro: MicroBatch) -> Request:
        """No more than the objective compares with: for RMU alone the reference's forward ends at the tapped layer, and
        all but its first layer see the compared rows only.
        """
        needs = self.needs
        index_N = micro.index(needs.ref_logp)
        labels_N = None if index_N is None else micro.batch.labels_BS.flatten().index_select(0, index_N + 1)
        layer = needs.layer if needs.ref_activation else None
        rows = self.compared(micro)
        narrow = None if rows is None else Narrow(1, rows)
        return Request(index_N, labels_N, micro.index(needs.kl), layer=layer, narrow=narrow)

    def cached(self, micro: MicroBatch, name: str) -> Tensor:
        assert self.cache is not None
        return self.cache.rows(micro.samples[micro.rows[name]], self.group.device)

    def record(
        self, number: int, rate: float, counts: Mapping[str, float], terms: Sequence[Term], sums: Tensor
    ) -> dict[str, Any]:
        """Global values of a finished step; counts a step that DeepSpeed skipped because of its gradient."""
        values = {t.name: value / counts[t.count] for t, value in zip(terms, sums.tolist(), strict=True)}
        loss = sum(t.weight * values[t.name] for t in terms)
        skipped = bool(self.engine.optimizer.overflow)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self.train.nonfinite_patience:
            raise NonFinite(
                f"step {number + 1}: loss {loss}, and the gradient was not finite in {self.skipped_in_a_row} steps "
                "in a row (train.nonfinite_patience); lower train.lr or look at the data of these steps"
            )
        norm = float("nan") if skipped else float(self.engine.get_global_grad_norm())
        return {
            "step": number + 1,
            "loss": _finite(loss),
            "terms": {name: _finite(value) for name, value in values.items()},
            "grad_norm": _finite(norm),
            "lr": rate,
            "skipped": skipped,
            "tokens": int(counts["input_tokens"]),
            "padding": 1 - counts["input_tokens"] / counts["slots"],
            "cut": int(counts["cut"]),
        }


def _part(tensor: Tensor | None, micro: MicroBatch, stream: str, first: int) -> Tensor | None:
    """A stream's part of an activation of the batch's rows from `first` on."""
    return None if tensor is None else micro.of_stream(stream, tensor, first)


def _cut(values_N: Tensor | None, micro: MicroBatch, streams: Sequence[str]) -> dict[str, Tensor]:
    """Values of the rows that `micro.index(streams)` named, by stream."""
    if values_N is None:
        return {}
    names = [name for name in micro.rows if name in streams]
    return dict(zip(names, values_N.split([micro.tokens[name] for name in names]), strict=True))


def _finite(value: float) -> float | None:
    """JSON has no NaN: a value that is no number is null."""
    return value if math.isfinite(value) else None
