"""What an objective is: a pure function from a micro-batch's `View`s to `Term`s, and the registry of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mirage_dist.registry import Registry
from mirage_dist.schema import ConfigError

Positions = Literal["all", "unpadded", "response", "text"]


@dataclass(frozen=True)
class Needs:
    """What the loop must compute for an objective; each tuple names the streams it is wanted for.

    streams: the streams of samples, in the order in which their rows stand in a micro-batch; the first one
    defines an epoch. logp: response-token log-probabilities. ref_logp: the same under the reference model.
    kl: per-token KL(reference || policy) over the vocabulary. activation / ref_activation: output of decoder
    layer `layer` (0 is the first), for the policy / for the reference. positions: which positions `mask_BS` marks.
    """

    streams: tuple[str, ...]
    logp: tuple[str, ...] = ()
    ref_logp: tuple[str, ...] = ()
    kl: tuple[str, ...] = ()
    activation: tuple[str, ...] = ()
    ref_activation: tuple[str, ...] = ()
    layer: int | None = None
    positions: Positions = "unpadded"

    @property
    def depth(self) -> int | None:
        """How many decoder layers the policy is asked for; None where its head is asked as well."""
        return None if self.logp or self.kl or self.layer is None else self.layer + 1

    @property
    def reference_depth(self) -> int | None:
        """The same of the reference."""
        return None if self.ref_logp or self.kl or self.layer is None else self.layer + 1

    @property
    def reference(self) -> bool:
        return bool(self.ref_logp or self.kl or self.ref_activation)


@dataclass(frozen=True)
class View:
    """What one micro-batch's forward gave for one stream; fields that were not asked for are None.

    Shapes: N response rows (tokens) in batch order, B rows of S positions (right-padded, one sequence each; or one row
    of packed sequences), D hidden size. segment_N is the sequence (from 0) that a response row belongs to. mask_BS is
    1.0 at the positions that count.
    Everything is float32 (float64 in tests) but segment_N (int64) and the activations, which are in the model's dtype;
    only logp_N, kl_N and activation_BSD carry a gradient.
    """

    sequences: int
    segment_N: Tensor | None = None
    logp_N: Tensor | None = None
    ref_logp_N: Tensor | None = None
    kl_N: Tensor | None = None
    activation_BSD: Tensor | None = None
    ref_activation_BSD: Tensor | None = None
    mask_BS: Tensor | None = None


@dataclass(frozen=True)
class Term:
    """One summand of the loss: weight · sum / (global value of the count named `count`).

    count is a key of the collator's counts, known before the first forward: "STREAM.sequences",
    "STREAM.tokens" (response tokens), "STREAM.positions" (where mask_BS is 1) or "micro_batches".
    The loop divides; an objective never does.
    """

    name: str
    weight: float
    sum: Tensor
    count: str


class Objective(Protocol):
    """One file a family. The options are the fields of a dataclass; `needs` follows from them."""

    @property
    def needs(self) -> Needs: ...

    def start(self, hidden_size: int, seed: int) -> None:
        """Draw what is drawn once a run (a control vector); equal on every rank."""

    def __call__(self, views: Mapping[str, View]) -> list[Term]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Stateless:
    """Base of the objectives that keep nothing between steps."""

    def start(self, hidden_size: int, seed: int) -> None:
        return None

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ConfigError(f"{type(self).__name__} keeps no state, the checkpoint holds {sorted(state)}")


# A new objective is one file and one line here; one from outside the package is named `module:Class`.
REGISTRY = Registry(
    "objective",
    "name",
    {
        "sft": "mirage_dist.objectives.likelihood:SFT",
        "ga": "mirage_dist.objectives.likelihood:GradientAscent",
        "graddiff": "mirage_dist.objectives.likelihood:GradDiff",
        "npo": "mirage_dist.objectives.npo:NPO",
        "rmu": "mirage_dist.objectives.rmu:RMU",
    },
)


def make(options: Mapping[str, Any], source: str = "recipe") -> Objective:
    """The objective that `options` (`name` and its fields) describes.

    Raises ConfigError for an unknown name, field or value.
    """
    return REGISTRY.make(options, source, "objective")


def sum_by_sequence(values_N: Tensor, segment_N: Tensor, sequences: int) -> Tensor:
    """Sum rows by the sequence they belong to: (N,), (N,) -> (B,), in a fixed order (index_add on a GPU has none)."""
    own_BN = segment_N == torch.arange(sequences, device=segment_N.device)[:, None]
    return torch.where(own_BN, values_N, 0).sum(1)
