"""The term that keeps a model on retained samples, which every objective that forgets by likelihoods can have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mirage_dist.objectives.base import Needs, Objective, Positions, Term, View, cross_entropy, wanted
from mirage_dist.schema import ConfigError
from mirage_dist.schema.numbers import Weight


@dataclass
class Retaining(Objective):
    """Options and terms on the stream `retain`: retain_weight · CE (`ce`) or KL(reference ‖ policy) (`kl`), or `none`.

    CE is the mean over response tokens, KL over `kl_positions`. A subclass adds `with_retain` to its needs and
    `retain_terms` to its terms. Raises ConfigError for `kl_positions` without `retain: kl`.
    """

    retain: Literal["ce", "kl", "none"] = "ce"  # the term on `retain`: cross entropy, KL to the reference, or none
    retain_weight: Weight = 1.0  # factor of the retain term
    kl_positions: Positions = "response"  # of `retain: kl`: positions of the mean

    def __post_init__(self) -> None:
        if self.kl_positions != "response" and self.retain != "kl":
            raise ConfigError(
                f"kl_positions={self.kl_positions}: belongs to retain=kl (got {self.retain}); remove kl_positions"
            )

    def with_retain(self, needs: Needs) -> Needs:
        """The needs of an objective with those of its retain term."""
        if self.retain == "none":
            return needs
        own = ("retain",)
        added = {"logp": (*needs.logp, *own)} if self.retain == "ce" else {"kl": own, "kl_positions": self.kl_positions}
        return replace(needs, streams=(*needs.streams, *own), **added)

    def retain_terms(self, views: Mapping[str, View]) -> list[Term]:
        """The retain term, or none."""
        if self.retain == "none":
            return []
        if self.retain == "ce":
            return [cross_entropy("retain_ce", self.retain_weight, "retain", views["retain"])]
        kl = wanted(views["retain"].kl_M).sum()
        return [Term("retain_kl", self.retain_weight, kl, "retain.kl_positions")]
