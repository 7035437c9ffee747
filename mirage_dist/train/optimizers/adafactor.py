"""Adafactor (Shazeer & Stern, 2018): second moments as one number a row and one a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from mirage_dist.schema.limits import MAGNITUDE
from mirage_dist.schema.numbers import Weight, real
from mirage_dist.train.optimizers.base import Groups, Optimizer


@dataclass
class Adafactor(Optimizer):
    """PyTorch's Adafactor, without a first moment.

    The step is relative: `train.lr` times the root mean square of the parameter (at least `eps`), and at most
    1/sqrt(step). clip: the largest root mean square of an update before that (the paper's d). decay: exponent of the
    second moment's decay.
    """

    decay: Annotated[float, real(-MAGNITUDE.value, 0)] = -0.8
    eps: Weight = 1e-3  # least root mean square of a parameter that a step is relative to
    clip: Annotated[float, real(1, MAGNITUDE.value)] = 1.0

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(groups, beta2_decay=self.decay, eps=(None, self.eps), d=self.clip)

    def state_bytes(self, name: str, shape: Sequence[int]) -> int:
        """One float32 number a row and one a column; a vector has one an element."""
        count = math.prod(shape)
        return 4 * count if len(shape) < 2 else 4 * (count // shape[-1] + count // shape[-2])
