"""Representation misdirection for unlearning (Li et al., 2024), as the Safety Mirage paper uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mirage_dist.kernels.steer import steer_mse
from mirage_dist.objectives.base import (
    Needs,
    Objective,
    Positions,
    Term,
    View,
    cross_entropy,
    sum_by_sequence,
    wanted,
)
from mirage_dist.schema import ConfigError
from mirage_dist.schema.numbers import Layer, Positive, Weight


@dataclass
class RMU(Objective):
    """L = MSE(h_forget, c) + retain_weight · MSE(h_retain, h_ref) + ce_weight · CE(retain).

    h is the output of decoder layer `layer`; each MSE is a mean over hidden units and over the positions that
    `positions` marks. c = coeff · u/‖u‖ is the control vector, with u uniform in [0, 1)^D, drawn once a run.
    `positions: all` includes padding, as the paper's code does, so the loss depends on how rows are batched.

    average: the mean over all marked positions (`positions`), or over sequences of the mean over each one's own
    (`sequences`), as open-unlearning means it. ce_average: likewise of the cross entropy over response tokens. The
    paper's code has one sequence a GPU and averages over GPUs, which is `sequences` for both.
    ce_stream: `retain_ce` is a further batch of retained samples, as in the paper's code.
    """

    layer: Layer = 7
    coeff: Positive = 10.0
    retain_weight: Weight = 1.0
    ce_weight: Weight = 1.0
    positions: Positions = "all"
    average: Literal["positions", "sequences"] = "positions"
    ce_average: Literal["tokens", "sequences"] = "tokens"
    ce_stream: Literal["retain", "retain_ce"] = "retain"
    control_D: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, default in (("ce_average", "tokens"), ("ce_stream", "retain")):
            if not self.ce_weight and getattr(self, name) != default:
                raise ConfigError(f"{name}={getattr(self, name)}: belongs to the cross entropy, and ce_weight is 0")

    @property
    def needs(self) -> Needs:
        retain = ("retain",) if self.retain_weight else ()
        ce = (self.ce_stream,) if self.ce_weight else ()
        return Needs(
            streams=tuple(dict.fromkeys(("forget", *retain, *ce))),
            logp=ce,
            activation=("forget", *retain),
            ref_activation=retain,
            layers=(self.layer,),
            positions=self.positions,
            unlearned=("forget",),
        )

    def start(self, hidden_size: int, seed: int) -> None:
        """Draw the control vector from a generator of its own, so that it is equal on every rank."""
        direction_D = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed))
        self.control_D = self.coeff * direction_D / direction_D.norm()

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        if self.control_D is None:
            raise RuntimeError("RMU has no control vector: call start() or load_state_dict() first")
        forget = views["forget"]
        target_D = self.control_D.to(forget.activations_BSD[self.layer])
        terms = [Term("forget", 1.0, self._squared_error(forget, target_D), f"forget.{self.average}")]
        if self.retain_weight:
            retain = views["retain"]
            reference_RD = retain.ref_activations_BSD[self.layer].flatten(0, 1)
            keep = self._squared_error(retain, reference_RD)
            terms.append(Term("retain", self.retain_weight, keep, f"retain.{self.average}"))
        if self.ce_weight:
            terms.append(self._cross_entropy(views[self.ce_stream]))
        return terms

    def _squared_error(self, view: View, target: Tensor) -> Tensor:
        """Sum over marked positions of the mean over hidden units of (h − target)², or with `sequences` the sum over
        sequences of the mean over each one's; target: (D,) or (B · S, D).
        """
        weight_P = wanted(view.mask_BS).flatten()
        if self.average == "sequences":
            segment_P = wanted(view.segment_BS).flatten()
            weight_P = weight_P / sum_by_sequence(weight_P, segment_P, view.sequences).index_select(0, segment_P)
        return steer_mse(view.activations_BSD[self.layer], target, weight_P)

    def _cross_entropy(self, view: View) -> Term:
        if self.ce_average == "tokens":
            return cross_entropy("retain_ce", self.ce_weight, self.ce_stream, view)
        logp_N, segment_N = wanted(view.logp_N), wanted(view.segment_N)
        length_B = sum_by_sequence(torch.ones_like(logp_N), segment_N, view.sequences)
        mean_B = sum_by_sequence(logp_N, segment_N, view.sequences) / length_B
        return Term("retain_ce", self.ce_weight, -mean_B.sum(), f"{self.ce_stream}.sequences")

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.control_D is None else {"control_D": self.control_D}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {"control_D"}:
            raise ConfigError(f"RMU keeps 'control_D', but the checkpoint holds {sorted(state)}")
        self.control_D = state["control_D"].clone()
