"""Objectives of the response's likelihood alone: fine-tuning, gradient ascent, gradient difference.

Each term sums log π(y|x) over response tokens and is divided by the global number of these tokens, so the loss is the
token mean whatever the micro-batch, the accumulation or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mirage_dist.objectives.base import Needs, Objective, Term, View, cross_entropy, wanted
from mirage_dist.objectives.retaining import Retaining


@dataclass
class SFT(Objective):
    """Supervised fine-tuning: L = −mean over response tokens of log π(token)."""

    @property
    def needs(self) -> Needs:
        return Needs(streams=("train",), logp=("train",), audited=("train",))

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        return [cross_entropy("ce", 1.0, "train", views["train"])]


@dataclass
class GradientAscent(Objective):
    """Gradient ascent (Jang et al., 2023): L = +mean over the forget set's response tokens of log π(token).

    The loss is unbounded below, so a long run diverges; NPO was made to prevent that.
    """

    @property
    def needs(self) -> Needs:
        return Needs(streams=("forget",), logp=("forget",), unlearned=("forget",))

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        return [_ascent(views["forget"])]


@dataclass
class GradDiff(Retaining):
    """Gradient difference (Liu et al., 2022): gradient ascent on forget + retain term."""

    @property
    def needs(self) -> Needs:
        return self.with_retain(Needs(streams=("forget",), logp=("forget",), unlearned=("forget",)))

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        return [_ascent(views["forget"]), *self.retain_terms(views)]


def _ascent(view: View) -> Term:
    return Term("forget", 1.0, wanted(view.logp_N).sum(), "forget.tokens")
