"""Objectives on the response's likelihood alone: fine-tuning, gradient ascent, gradient difference.

log π(y|x) is summed over response tokens; each term is normalised by the global count of its tokens, so the
loss is the token mean whatever the micro-batch, the accumulation or the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mirage_dist.objectives.base import Needs, Stateless, Term, View
from mirage_dist.schema import ConfigError


@dataclass
class SFT(Stateless):
    """Supervised fine-tuning: L = −mean over response tokens of log π(token)."""

    @property
    def needs(self) -> Needs:
        return Needs(streams=("train",), logp=("train",))

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        return [cross_entropy("ce", 1.0, "train", views["train"])]


@dataclass
class GradientAscent(Stateless):
    """GA (Jang et al., 2023): L = +mean over the forget set's response tokens of log π(token).

    Unbounded below: it diverges if it runs for long, which is what NPO was made to prevent.
    """

    @property
    def needs(self) -> Needs:
        return Needs(streams=("forget",), logp=("forget",))

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        return [_ascent(views["forget"])]


@dataclass
class GradDiff(Stateless):
    """Gradient difference (Liu et al., 2022): gradient ascent on forget + retain_weight · CE on retain."""

    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        require_weight("retain_weight", self.retain_weight)

    @property
    def needs(self) -> Needs:
        both = ("forget", "retain")
        return Needs(streams=both, logp=both)

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        retain = cross_entropy("retain_ce", self.retain_weight, "retain", views["retain"])
        return [_ascent(views["forget"]), retain]


def cross_entropy(name: str, weight: float, stream: str, view: View) -> Term:
    """Token cross entropy of one stream, as a term of any objective."""
    return Term(name, weight, -wanted(view.logp_N).sum(), f"{stream}.tokens")


def _ascent(view: View) -> Term:
    return Term("forget", 1.0, wanted(view.logp_N).sum(), "forget.tokens")


def wanted(field: Tensor | None) -> Tensor:
    """A field of a View that `needs` asked for; its absence is a bug of the loop, not of the user."""
    if field is None:
        raise RuntimeError("a field of the View that the objective's `needs` names was not computed")
    return field


def require_weight(name: str, value: float) -> None:
    """Raise ConfigError unless the weight of a term is a finite number ≥ 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name}={value}; must be a finite number >= 0")


def require_positive(name: str, value: float) -> None:
    """Raise ConfigError unless the option is a finite number > 0."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value}; must be a finite number > 0")
