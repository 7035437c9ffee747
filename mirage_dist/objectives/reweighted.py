"""Gradient ascent with a weight for every token, a function of the token's own probability p without a gradient.

A weight that vanishes with p bounds the ascent: a token that is forgotten no longer counts, as in NPO, but token by
token and without a reference model. open-unlearning's versions (src/trainer/utils.py) mean over a micro-batch's
response tokens and hold a reference model that they use only for `retain_loss_type: KL`; here the mean is over the
step's tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mirage_dist.objectives.base import Needs, Term, View, wanted
from mirage_dist.objectives.retaining import Retaining
from mirage_dist.schema.numbers import Weight


@dataclass
class Reweighted(Retaining):
    """L = forget_weight · mean over response tokens of w(p) · log p + retain term."""

    forget_weight: Weight = 1.0  # factor of the forget term

    @property
    def needs(self) -> Needs:
        return self.with_retain(Needs(streams=("forget",), logp=("forget",), unlearned=("forget",)))

    @abstractmethod
    def weights(self, logp_N: Tensor) -> Tensor:
        """w of each token for its log-probability: (N,)."""

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        logp_N = wanted(views["forget"].logp_N)
        forget = (self.weights(logp_N.detach()) * logp_N).sum()
        return [Term("forget", self.forget_weight, forget, "forget.tokens"), *self.retain_terms(views)]


@dataclass
class WGA(Reweighted):
    """Weighted gradient ascent (Wang et al., 2025, arXiv:2502.19301): w = p^β. β = 0 is gradient ascent."""

    beta: Weight = 1.0  # β; 0 is gradient ascent

    def weights(self, logp_N: Tensor) -> Tensor:
        return (self.beta * logp_N).exp()


@dataclass
class SatImp(Reweighted):
    """Saturation and importance (Yang et al., 2025, arXiv:2505.11953): w = p^β₁ · (1 − p)^β₂.

    The first factor spares tokens that are forgotten already, the second those that any model is sure of.
    """

    beta1: Weight = 5.0  # β₁: spares tokens that are forgotten already
    beta2: Weight = 1.0  # β₂: spares tokens that any model is sure of

    def weights(self, logp_N: Tensor) -> Tensor:
        return (self.beta1 * logp_N).exp() * (-logp_N.expm1()).pow(self.beta2)
