"""AdamW (Loshchilov & Hutter, 2019), with state in float32 or in 8 bits."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mirage_dist.schema import ConfigError
from mirage_dist.schema.errors import require
from mirage_dist.schema.numbers import PartShare, Weight
from mirage_dist.train.optimizers.base import Groups, Optimizer

SMALL, BLOCK = 4096, 256  # bitsandbytes: below so many elements the state is float32; elements that share one scale


@dataclass
class AdamW(Optimizer):
    """PyTorch's fused AdamW."""

    betas: list[PartShare] = field(default_factory=lambda: [0.9, 0.999])  # decay of the first and of the second moment
    eps: Weight = 1e-8  # added to the root of the second moment
    elementwise = True

    def __post_init__(self) -> None:
        require(self, ("betas",), "two numbers from 0 to below 1", lambda x: len(x) == 2)

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        first, second = self.betas
        return torch.optim.AdamW(groups, betas=(first, second), eps=self.eps, fused=True)  # six times as fast on a CPU


@dataclass
class AdamW8bit(AdamW):
    """AdamW of bitsandbytes, whose moments take one byte an element each (Dettmers et al., 2022).

    Blocks of 256 elements share a scale, hence whole parameters: cut elsewhere, the blocks would be others.
    """

    elementwise = False

    def check(self, zero: Mapping[str, Any]) -> None:
        super().check(zero)
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "train.optimizer.name=adamw8bit needs the package bitsandbytes, which is not installed; "
                "run `pip install bitsandbytes`, or use adamw"
            )

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as Wrapped  # type: ignore[import-not-found]

        first, second = self.betas
        return Wrapped(groups, betas=(first, second), eps=self.eps)

    def state_bytes(self, name: str, shape: Sequence[int]) -> int:
        """Two moments and their blocks' scales, and two tables of 256 float32 numbers."""
        count = math.prod(shape)
        if count < SMALL:
            return 2 * 4 * count
        return 2 * (count + 4 * -(-count // BLOCK) + 4 * 256)
