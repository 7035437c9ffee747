"""What an optimizer is to a recipe: `train.optimizer: {name: …}` and the fields of one of these classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mirage_dist.registry import Registry
from mirage_dist.schema import ConfigError

Groups = list[dict[str, Any]]  # of `params`, their `names`, `lr` and `weight_decay`
PROBE = 64  # largest dimension of the parameter on which the size of the state is measured


@dataclass
class Optimizer:
    """Options of an optimizer, and how to make it. Subclasses are dataclasses.

    elementwise: whether the update of an element depends on nothing but this element's own value, gradient and state
    (AdamW: yes; Adafactor and Muon, which look at rows, columns or norms: no). DeepSpeed's ZeRO hands its optimizer
    flat pieces of many parameters joined together. An elementwise optimizer updates these pieces where they are; any
    other is given whole parameters in their own shapes (see `whole`), so that it computes what it would without ZeRO.
    """

    elementwise: ClassVar[bool] = False

    def check(self, zero: Mapping[str, Any]) -> None:
        """Raise ConfigError early for what this machine or the DeepSpeed JSON's `zero_optimization` cannot do."""
        if not self.elementwise and zero.get("offload_optimizer", {}).get("device", "none") != "none":
            raise ConfigError(
                "zero_optimization.offload_optimizer moves flat pieces of parameters to host memory, and "
                f"{type(self).__name__} updates whole parameters; remove offload_optimizer, or use adamw"
            )

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        """The PyTorch optimizer of these parameter groups. It updates its state tensors in `step` and nowhere else.

        A parameter without a gradient is to be left alone. The groups' `lr` is set anew before every step.
        """
        raise NotImplementedError

    def state_bytes(self, name: str, shape: Sequence[int]) -> int:
        """Bytes of the state of one parameter, scalars such as step counts left out.

        Measured on a small parameter and scaled; exact where the state has the parameter's shape.
        """
        probe = nn.Parameter(torch.zeros([min(size, PROBE) for size in shape]))
        probe.grad = torch.zeros_like(probe)
        optimizer = self.make([{"params": [probe], "names": [name], "lr": 1e-3, "weight_decay": 0.0}])
        optimizer.step()
        tensors = [
            value for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor) and value.dim()
        ]
        return sum(t.nbytes for t in tensors) * math.prod(shape) // max(1, probe.numel())


# A new optimizer is one file and one line here; one from outside the package is named `module:Class`.
REGISTRY = Registry(
    "optimizer",
    "name",
    {
        "adamw": "mirage_dist.train.optimizers.adamw:AdamW",
        "adamw8bit": "mirage_dist.train.optimizers.adamw:AdamW8bit",
        "adafactor": "mirage_dist.train.optimizers.adafactor:Adafactor",
        "muon": "mirage_dist.train.optimizers.muon:Muon",
    },
)


def make(options: Mapping[str, Any]) -> Optimizer:
    """The optimizer that `train.optimizer` describes. Raises ConfigError for an unknown name or option."""
    where = "train.optimizer"
    cls = REGISTRY.load(options.get("name"), "recipe", f"{where}.name")
    if not issubclass(cls, Optimizer):
        raise ConfigError(
            f"{where}.name={options['name']!r}: not a subclass of {Optimizer.__module__}.Optimizer; docs/optimizers.md "
            "shows how to wrap a PyTorch optimizer in one"
        )
    return REGISTRY.make(options, "recipe", where)
