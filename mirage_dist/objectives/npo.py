"""Negative preference optimisation (Zhang et al., 2024), as the Safety Mirage paper uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_dist.config import ConfigError
from mirage_dist.objectives.base import Needs, Stateless, Term, View, sum_by_sequence
from mirage_dist.objectives.likelihood import cross_entropy, require_positive, require_weight, wanted


@dataclass
class NPO(Stateless):
    """L = forget_weight · (2/β) · mean_i softplus(β Δ_i) + retain_weight · retain term.

    Δ_i = log π(y_i|x_i) − log π_ref(y_i|x_i) over the response tokens of sequence i: their sum (`seq_sum`, the
    paper's formula) or their mean (`seq_mean`). β does not carry over between the two. The retain term is the
    token mean of the cross entropy (`ce`) or of KL(reference ‖ policy) (`kl`), or `none`.
    The collator guarantees a response token in every sequence, so that a mean has a denominator.
    """

    beta: float = 0.1
    reduction: Literal["seq_sum", "seq_mean"] = "seq_sum"
    forget_weight: float = 1.0
    retain: Literal["ce", "kl", "none"] = "ce"
    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive("beta", self.beta)
        require_weight("forget_weight", self.forget_weight)
        require_weight("retain_weight", self.retain_weight)
        if self.reduction not in ("seq_sum", "seq_mean"):
            raise ConfigError(f"reduction={self.reduction!r}; allowed: seq_sum, seq_mean")

    @property
    def needs(self) -> Needs:
        return Needs(
            streams=("forget",) if self.retain == "none" else ("forget", "retain"),
            logp=("forget", "retain") if self.retain == "ce" else ("forget",),
            ref_logp=("forget",),
            kl=("retain",) if self.retain == "kl" else (),
        )

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        margin_B = self._margin(views["forget"])
        forget = (2 / self.beta) * F.softplus(self.beta * margin_B).sum()
        terms = [Term("forget", self.forget_weight, forget, "forget.sequences")]
        if self.retain == "ce":
            terms.append(cross_entropy("retain_ce", self.retain_weight, "retain", views["retain"]))
        elif self.retain == "kl":
            kl = wanted(views["retain"].kl_N).sum()
            terms.append(Term("retain_kl", self.retain_weight, kl, "retain.tokens"))
        return terms

    def _margin(self, view: View) -> Tensor:
        """Δ of each sequence: (B,)."""
        difference_N, segment_N = wanted(view.logp_N) - wanted(view.ref_logp_N), wanted(view.segment_N)
        margin_B = sum_by_sequence(difference_N, segment_N, view.sequences)
        if self.reduction == "seq_sum":
            return margin_B
        return margin_B / sum_by_sequence(torch.ones_like(difference_N), segment_N, view.sequences)
