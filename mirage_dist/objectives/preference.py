"""Objectives of pairs of answers to one question: the policy comes to prefer one to the other, against the reference.

Δ = log π(y|x) − log π_ref(y|x), summed over the response's tokens. Partners are at the same place of their streams, so
their margins need no search (see `Needs.paired`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mirage_dist.objectives.base import Logged, Needs, Term, View, sum_by_sequence, wanted
from mirage_dist.objectives.retaining import Retaining
from mirage_dist.schema.numbers import Positive, Weight


@dataclass
class DPO(Retaining):
    """L = −mean over pairs of log σ(β (Δ_chosen − Δ_rejected)) + retain term, which is `none` unless chosen.

    Direct preference optimisation (Rafailov et al., 2023, eq. 7); TRL's `sigmoid` loss without label smoothing. TRL's
    mean is over a micro-batch's pairs, this one over the step's. Logged: β Δ of both answers, as TRL's `rewards`, and
    the share of pairs whose margin is positive.
    """

    retain: Literal["ce", "kl", "none"] = "none"  # the term on `retain`: cross entropy, KL to the reference, or none
    beta: Positive = 0.1  # β, the scale of the log-ratios

    @property
    def needs(self) -> Needs:
        both = ("chosen", "rejected")
        own = Needs(streams=both, logp=both, ref_logp=both, paired=both, audited=("chosen",))
        return self.with_retain(own)

    def __call__(self, views: Mapping[str, View]) -> list[Term | Logged]:
        chosen_B, rejected_B = (self.beta * log_ratio(views[name]) for name in ("chosen", "rejected"))
        margin_B = chosen_B - rejected_B
        return [
            Term("dpo", 1.0, F.softplus(-margin_B).sum(), "chosen.sequences"),
            *self.retain_terms(views),
            Logged("reward_chosen", chosen_B.sum(), "chosen.sequences"),
            Logged("reward_rejected", rejected_B.sum(), "chosen.sequences"),
            Logged("preferred", (margin_B > 0).to(margin_B.dtype).sum(), "chosen.sequences"),
        ]


@dataclass
class IdkDPO(Retaining):
    """L = −forget_weight · (2/β) · mean over pairs of log σ(β (Δ_idk − Δ_forget)) + retain term.

    The answers to forget are rejected for answers that claim ignorance, in the stream `idk` (TOFU, Maini et al., 2024,
    "Preference Optimization"). The factor 2/β is that of NPO and of open-unlearning's `compute_dpo_loss`
    (src/trainer/utils.py), whose mean is over a micro-batch's pairs. As β vanishes it tends to
    gradient ascent on the one answer and fine-tuning on the other.
    """

    beta: Positive = 0.1  # β, the scale of the log-ratios
    forget_weight: Weight = 1.0  # factor of the preference term

    @property
    def needs(self) -> Needs:
        both = ("forget", "idk")
        return self.with_retain(Needs(streams=both, logp=both, ref_logp=both, paired=both, unlearned=("forget",)))

    def __call__(self, views: Mapping[str, View]) -> list[Term | Logged]:
        margin_B = log_ratio(views["idk"]) - log_ratio(views["forget"])
        loss = (2 / self.beta) * F.softplus(-self.beta * margin_B).sum()
        return [
            Term("forget", self.forget_weight, loss, "forget.sequences"),
            *self.retain_terms(views),
            Logged("margin", margin_B.sum(), "forget.sequences"),
        ]


def log_ratio(view: View) -> Tensor:
    """log π(y|x) − log π_ref(y|x) of each sequence's response: (B,)."""
    return sum_by_sequence(wanted(view.logp_N) - wanted(view.ref_logp_N), wanted(view.segment_N), view.sequences)
