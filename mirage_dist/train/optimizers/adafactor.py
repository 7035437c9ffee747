"""Adafactor (Shazeer & Stern, 2018): second moments as one number a row and one a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mirage_dist.schema.errors import require
from mirage_dist.train.optimizers.base import Groups, Optimizer


@dataclass
class Adafactor(Optimizer):
    """PyTorch's Adafactor, without a first moment.

    The step is relative: `train.lr` times the root mean square of the parameter (at least `eps`), and at most
    1/sqrt(step). clip: the largest root mean square of an update before that (the paper's d). decay: exponent of the
    second moment's decay.
    """

    decay: float = -0.8
    eps: float = 1e-3
    clip: float = 1.0

    def __post_init__(self) -> None:
        require(self, ("decay",), "a number of at most 0", lambda x: -math.inf < x <= 0)
        require(self, ("eps",), "a number of at least 0", lambda x: 0 <= x < math.inf)
        require(self, ("clip",), "a number of at least 1", lambda x: 1 <= x < math.inf)

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(groups, beta2_decay=self.decay, eps=(None, self.eps), d=self.clip)

    def state_bytes(self, name: str, shape: Sequence[int]) -> int:
        """One float32 number a row and one a column; a vector has one an element."""
        count = math.prod(shape)
        return 4 * count if len(shape) < 2 else 4 * (count // shape[-1] + count // shape[-2])
