"""Representation misdirection for unlearning (Li et al., 2024), as the Safety Mirage paper uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mirage_dist.kernels.steer import steer_mse
from mirage_dist.objectives.base import Needs, Positions, Term, View
from mirage_dist.objectives.likelihood import cross_entropy, require_positive, require_weight, wanted
from mirage_dist.schema import ConfigError


@dataclass
class RMU:
    """L = MSE(h_forget, c) + retain_weight · MSE(h_retain, h_ref) + ce_weight · CE(retain).

    h is the output of decoder layer `layer`, a mean over hidden units and over the positions that `positions`
    marks; c = coeff · u/‖u‖ is the control vector, u uniform in [0, 1)^D and drawn once a run.
    `positions: all` includes padding, as the paper's code does, and so depends on how rows are batched.
    """

    layer: int = 7
    coeff: float = 10.0
    retain_weight: float = 1.0
    ce_weight: float = 1.0
    positions: Positions = "all"
    control_D: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require_positive("coeff", self.coeff)
        require_weight("retain_weight", self.retain_weight)
        require_weight("ce_weight", self.ce_weight)
        if self.layer < 0:
            raise ConfigError(f"layer={self.layer}; must be a decoder layer's number, from 0")

    @property
    def needs(self) -> Needs:
        retain = ("retain",) if self.retain_weight else ()
        ce = ("retain",) if self.ce_weight else ()
        return Needs(
            streams=("forget", "retain") if retain or ce else ("forget",),
            logp=ce,
            activation=("forget", *retain),
            ref_activation=retain,
            layer=self.layer,
            positions=self.positions,
        )

    def start(self, hidden_size: int, seed: int) -> None:
        """Draw the control vector from its own generator: equal on every rank, whatever else has drawn."""
        direction_D = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed))
        self.control_D = self.coeff * direction_D / direction_D.norm()

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        if self.control_D is None:
            raise RuntimeError("RMU was called before start() or load_state_dict() gave it a control vector")
        forget = views["forget"]
        steer = _squared_error(forget, self.control_D.to(wanted(forget.activation_BSD)))
        terms = [Term("forget", 1.0, steer, "forget.positions")]
        if self.retain_weight:
            retain = views["retain"]
            keep = _squared_error(retain, wanted(retain.ref_activation_BSD))
            terms.append(Term("retain", self.retain_weight, keep, "retain.positions"))
        if self.ce_weight:
            terms.append(cross_entropy("retain_ce", self.ce_weight, "retain", views["retain"]))
        return terms

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.control_D is None else {"control_D": self.control_D}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {"control_D"}:
            raise ConfigError(f"RMU keeps 'control_D', the checkpoint holds {sorted(state)}")
        self.control_D = state["control_D"].clone()


def _squared_error(view: View, target: Tensor) -> Tensor:
    """Sum over marked positions of the mean over hidden units of (h − target)²; target is (D,) or (B, S, D)."""
    rows = target if target.dim() == 1 else target.flatten(0, 1)
    return steer_mse(wanted(view.activation_BSD), rows, wanted(view.mask_BS).flatten())
