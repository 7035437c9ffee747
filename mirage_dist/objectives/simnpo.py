"""Simple negative preference optimisation (Fan et al., 2024, arXiv:2410.07163): NPO without a reference model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F

from mirage_dist.objectives.base import Needs, Term, View, mean_by_sequence, wanted
from mirage_dist.objectives.retaining import Retaining
from mirage_dist.schema.numbers import Positive, Weight


@dataclass
class SimNPO(Retaining):
    """L = −forget_weight · (2/β) · mean_i log σ(−(β/|y_i|) log π(y_i|x_i) − γ) + retain term.

    The paper's loss, with the mean over the response's |y| tokens in place of NPO's ratio to a reference. Of
    open-unlearning's SimNPO (src/trainer/unlearn/simnpo.py, with a margin δ inside the bracket) γ is β · δ; its mean is
    over a micro-batch's sequences, this one over the step's.
    """

    beta: Positive = 2.5  # β, the scale of the answers' mean log-probabilities
    gamma: Weight = 0.0  # γ, the margin
    forget_weight: Weight = 1.0  # factor of the forget term

    @property
    def needs(self) -> Needs:
        return self.with_retain(Needs(streams=("forget",), logp=("forget",), unlearned=("forget",)))

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        view = views["forget"]
        logp_B = mean_by_sequence(wanted(view.logp_N), wanted(view.segment_N), view.sequences)
        forget = (2 / self.beta) * F.softplus(self.beta * logp_B + self.gamma).sum()
        return [Term("forget", self.forget_weight, forget, "forget.sequences"), *self.retain_terms(views)]
