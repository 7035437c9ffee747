"""Attacks applied one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Attack, apply
from mirage_dist.schema import ConfigError

if TYPE_CHECKING:
    from mirage_dist.evals.attacks.rewrites import Rewriter


@dataclass(frozen=True)
class Combine(Attack):
    """`attacks` in their order, each applied to every rewrite of the one before: a swap and then a prefix, say.

    K is the product of the parts' K; rewrites are ordered by the first part's shot, then by the second's, and so on.
    Where the last part draws answers, they come in rounds: one to each rewrite, then the next. After a part that makes
    conversations, the others rewrite the last turn of each, once.
    These are the options; `attacks.make` turns them into a `Chain`.
    """

    attacks: list[dict[str, Any]]  # each with its `kind` and that attack's options, applied in this order

    def __post_init__(self) -> None:
        if len(self.attacks) < 2:
            raise ConfigError("attacks: expected two or more, each a mapping with its kind")


@dataclass(frozen=True)
class Chain(Attack):
    """The combined attacks themselves. `min_match` stays 0: each part checks its own."""

    parts: list[Attack]

    def prepared(self, samples: Sequence[Sample], name: str, rewriter: Rewriter) -> Chain:
        """With each part prepared for the rewrites of the parts before it. Raises ConfigError as `apply` does."""
        parts = []
        for number, part in enumerate(self.parts, start=1):
            parts.append(part.prepared(samples, f"{name}-{number}", rewriter))
            rewrites, _ = apply(parts[-1], samples, f"{name}, part {number}")
            samples = [row for rows in rewrites for row in rows if _is_last(row)]
        return Chain(parts, control=self.control)

    @property
    def shots(self) -> int:
        return math.prod(part.shots for part in self.parts)

    @property
    def turns(self) -> bool:
        return self.parts[0].turns

    @property
    def with_history(self) -> bool:
        return any(part.with_history for part in self.parts)

    @property
    def begins(self) -> bool:  # type: ignore[override]
        return any(part.begins for part in self.parts)

    @property
    def targeted(self) -> bool:  # type: ignore[override]
        return any(part.targeted for part in self.parts)

    @property
    def weights(self) -> bool:  # type: ignore[override]
        return any(part.weights for part in self.parts)

    @property
    def draws(self) -> int:
        return self.parts[-1].draws

    @property
    def spent(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the one part that has stages, where every other part has one rewrite."""
        return next((part.spent for part in self.parts if part.spent and len(part.spent) == self.shots), ())

    @property
    def optimised(self) -> str:
        return " ".join(part.optimised for part in self.parts if part.optimised)

    @property
    def origin(self) -> str:
        return ", ".join(part.origin for part in self.parts if part.origin)

    @property
    def ids(self) -> list[str]:
        return [i for part in self.parts for i in part.ids]

    def __call__(self, sample: Sample) -> list[Sample]:
        rewrites = [sample]
        for part in self.parts:
            parted = [part(row) if _is_last(row) else [row] for row in rewrites]
            if not all(parted):
                return []  # with a rewrite missing, this sample would have a smaller K than the others
            rounds = zip(*parted, strict=True) if part.draws else parted
            rewrites = [row for rows in rounds for row in rows]
        return rewrites


def _is_last(row: Sample) -> bool:
    """Whether a row is no earlier turn of a conversation, which stays as it is."""
    return row.turn is None or row.turn.last
