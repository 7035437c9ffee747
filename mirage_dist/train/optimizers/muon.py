"""Muon (Jordan et al., 2024): momentum, orthogonalised matrix by matrix; AdamW for everything else."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from mirage_dist.schema import ConfigError
from mirage_dist.schema.numbers import PartShare, whole
from mirage_dist.train.optimizers.adamw import AdamW
from mirage_dist.train.optimizers.base import Groups


@dataclass
class Muon(AdamW):
    """PyTorch's Muon for matrices, with updates as large as AdamW's (Liu et al., 2025), so that rates carry over.

    adamw: patterns of names of matrices that AdamW updates nevertheless; vectors and convolutions always are. `betas`
    and `eps` are AdamW's.
    """

    momentum: PartShare = 0.95  # decay of the matrices' momentum
    nesterov: bool = True  # look ahead by one step of momentum
    steps: Annotated[int, whole(1, 99)] = 5  # of the Newton-Schulz iteration
    adamw: list[str] = field(default_factory=lambda: ["*embed*", "*lm_head*", "*lora_*"])
    elementwise = False

    def check(self, zero: Mapping[str, Any]) -> None:
        super().check(zero)
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(f"train.optimizer.name=muon needs PyTorch 2.9 or newer, this is {torch.__version__}")

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        def part(chosen: Callable[[str, torch.Tensor], bool]) -> Groups:
            parts = []
            for group in groups:
                pairs = [pair for pair in zip(group["names"], group["params"], strict=True) if chosen(*pair)]
                if pairs:
                    names, params = zip(*pairs, strict=True)
                    parts.append({**group, "names": list(names), "params": list(params)})
            return parts

        made: list[torch.optim.Optimizer] = []
        if matrices := part(self.orthogonalised):
            options: dict[str, Any] = {"momentum": self.momentum, "nesterov": self.nesterov, "ns_steps": self.steps}
            made.append(torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw"))
        if others := part(lambda name, tensor: not self.orthogonalised(name, tensor)):
            made.append(super().make(others))
        return Together(made)

    def orthogonalised(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether Muon updates this parameter."""
        return tensor.dim() == 2 and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.adamw)


class Together(torch.optim.Optimizer):
    """Several optimizers of different parameters as one: their groups in one list, their states in one mapping."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.state = defaultdict(dict)
        self.param_groups = [group for part in parts for group in part.param_groups]  # the same objects
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)
