"""Attacks one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Attack, Joined, apply
from mirage_dist.schema import ConfigError

# Makes what has to be made for one part: (part, what goes into it, its number) -> the part, ready to be called.
Ready = Callable[[Attack, Sequence[Sample], int], Attack]


@dataclass(frozen=True)
class Combine:
    """`attacks` applied in their order, each to every rewrite of the one before: a swap and then a prefix, say.

    K is the product of theirs; the first attack's shots are the slowest to change.
    """

    attacks: list[dict[str, Any]]
    control: bool = False
    parts: list[Attack] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if len(self.attacks) < 2:
            raise ConfigError("attacks: expected two or more, each a mapping with its kind")

    def with_parts(self, parts: Sequence[Attack]) -> Combine:
        combined = replace(self)
        object.__setattr__(combined, "parts", list(parts))
        return combined

    def prepared(self, samples: Sequence[Sample], name: str, ready: Ready) -> Combine:
        """With every part made ready for what goes into it. Raises ConfigError as `apply` does."""
        parts = []
        for number, part in enumerate(self.parts, start=1):
            parts.append(ready(part, samples, number))
            rewrites, _ = apply(parts[-1], samples, f"{name}, part {number}")
            samples = [row for rows in rewrites for row in rows]
        return self.with_parts(parts)

    @property
    def shots(self) -> int:
        return math.prod(part.shots for part in self.parts)

    min_match = 0.0  # each part checks its own

    @property
    def origin(self) -> str:
        return ", ".join(part.origin for part in self.parts if isinstance(part, Joined))

    @property
    def ids(self) -> Collection[str]:
        return [i for part in self.parts if isinstance(part, Joined) for i in part.ids]

    def __call__(self, sample: Sample) -> list[Sample]:
        rewrites = [sample]
        for part in self.parts:
            parted = [part(row) for row in rewrites]
            if not all(parted):
                return []  # a shot of the sample's is missing, so that its K would be another one
            rewrites = [row for rows in parted for row in rows]
        return rewrites
