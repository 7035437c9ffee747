"""Objectives as a lab would write them: outside the package, named `lab:Class` in a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_dist.objectives.base import Logged, Needs, Objective, Term, View, sum_by_sequence, wanted


@dataclass
class DPO(Objective):
    """L = −mean over pairs of log σ(β (Δ_chosen − Δ_rejected)), Δ = log π(y|x) − log π_ref(y|x) (Rafailov et al.)."""

    beta: float = 0.1

    @property
    def needs(self) -> Needs:
        both = ("chosen", "rejected")
        return Needs(streams=both, logp=both, ref_logp=both, paired=both, audited=("chosen",))

    def __call__(self, views: Mapping[str, View]) -> list[Term | Logged]:
        chosen_B, rejected_B = self.reward(views["chosen"]), self.reward(views["rejected"])
        margin_B = chosen_B - rejected_B
        return [
            Term("dpo", 1.0, -F.logsigmoid(margin_B).sum(), "chosen.sequences"),
            Logged("reward_chosen", chosen_B.sum(), "chosen.sequences"),
            Logged("margin", margin_B.sum(), "chosen.sequences"),
        ]

    def reward(self, view: View) -> Tensor:
        difference_N = wanted(view.logp_N) - wanted(view.ref_logp_N)
        return self.beta * sum_by_sequence(difference_N, wanted(view.segment_N), view.sequences)


@dataclass
class LayeredRMU(Objective):
    """RMU at several layers: Σ over layers of MSE(h_forget, c) + MSE(h_retain, h_ref)."""

    layers: list[int] = field(default_factory=lambda: [1, 2])
    coeff: float = 10.0
    control_D: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def needs(self) -> Needs:
        both = ("forget", "retain")
        return Needs(streams=both, activation=both, ref_activation=("retain",), layers=tuple(self.layers))

    def start(self, hidden_size: int, seed: int) -> None:
        direction_D = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed))
        self.control_D = self.coeff * direction_D / direction_D.norm()

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        forget, retain = views["forget"], views["retain"]
        terms = []
        for layer in self.layers:
            steer = squared_error(forget.activations_BSD[layer], wanted(self.control_D), wanted(forget.mask_BS))
            reference_BSD = retain.ref_activations_BSD[layer]
            keep = squared_error(retain.activations_BSD[layer], reference_BSD, wanted(retain.mask_BS))
            terms.append(Term(f"forget_{layer}", 1.0, steer, "forget.positions"))
            terms.append(Term(f"retain_{layer}", 1.0, keep, "retain.positions"))
        return terms

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.control_D is None else {"control_D": self.control_D}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.control_D = state["control_D"].clone()


def squared_error(values_BSD: Tensor, target: Tensor, mask_BS: Tensor) -> Tensor:
    return ((values_BSD - target).square().mean(-1) * mask_BS).sum()


@dataclass
class Codes(Objective):
    """Gradient ascent on `codes`, fine-tuning on `lessons`: the streams have other names than in the package."""

    per_batch: bool = False
    count: str = "codes.tokens"

    @property
    def needs(self) -> Needs:
        both = ("codes", "lessons")
        return Needs(streams=both, logp=both, unlearned=("codes",), audited=("lessons",), by_micro_batch=self.per_batch)

    def __call__(self, views: Mapping[str, View]) -> Sequence[Term]:
        codes, lessons = (wanted(views[name].logp_N).sum() for name in ("codes", "lessons"))
        return [Term("codes", 1.0, codes, self.count), Term("lessons", 1.0, -lessons, "lessons.tokens")]
