"""The contract of objectives: from the `View`s of one micro-batch to the `Term`s of a sum, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mirage_dist.registry import Registry
from mirage_dist.schema import ConfigError

Positions = Literal["all", "unpadded", "response", "text"]


@dataclass(frozen=True)
class Needs:
    """What the training loop must read, compute and check for an objective.

    streams: names of the sample streams, in the order of their rows in a micro-batch; the first one defines an epoch
    unless the recipe's `train.epoch_stream` names another.

    Computed, for the streams that each tuple names:
    logp: log-probabilities of the response tokens. ref_logp: the same under the reference model.
    kl: KL(reference ‖ policy) over the vocabulary, at the positions `kl_positions`: of `response` those that predict a
    response token, else those that `positions` would mark.
    distil: cross entropy of the policy to the reference's distribution, of which the response token's logit is lowered
    by `penalty`; per response token.
    activation, ref_activation: outputs of the decoder layers `layers` (0 is the first) of policy and reference.
    positions: the positions that `View.mask_BS` marks.

    Declared, for the checks before the run:
    paired: streams whose samples belong together one to one (the chosen and the rejected answer of a preference).
    Partners are always in the same micro-batch, at the same place of their streams.
    unlearned: streams whose answers become less likely; answers there that refuse are an error, since the model would
    unlearn refusing. audited: streams whose answers the model imitates; they are audited for words that predict the
    refusal (see `data.audit`).
    by_micro_batch: the loss is a function of the micro-batch by definition, so that `train.micro_batch` belongs to the
    run. Only such an objective may count "micro_batches" in a term.
    """

    streams: tuple[str, ...]
    logp: tuple[str, ...] = ()
    ref_logp: tuple[str, ...] = ()
    kl: tuple[str, ...] = ()
    kl_positions: Positions = "response"
    distil: tuple[str, ...] = ()
    penalty: float = 0.0
    activation: tuple[str, ...] = ()
    ref_activation: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    positions: Positions = "unpadded"
    paired: tuple[str, ...] = ()
    unlearned: tuple[str, ...] = ()
    audited: tuple[str, ...] = ()
    by_micro_batch: bool = False

    @property
    def depth(self) -> int | None:
        """Number of decoder layers that the policy computes; None for all of them and the LM head."""
        return None if self.logp or self.kl or self.distil or not self.layers else max(self.layers) + 1

    @property
    def reference_depth(self) -> int | None:
        """Number of decoder layers that the reference computes; None for all of them and the LM head."""
        return None if self.ref_logp or self.distributions or not self.layers else max(self.layers) + 1

    @property
    def distributions(self) -> tuple[str, ...]:
        """Streams on which whole distributions over the vocabulary are compared with the reference's."""
        return tuple(dict.fromkeys((*self.kl, *self.distil)))

    @property
    def reference(self) -> bool:
        """Whether anything is compared with the reference model."""
        return bool(self.ref_logp or self.distributions or self.ref_activation)

    def depends_on_micro_batch(self, packing: bool) -> bool:
        """Whether the loss changes with the micro-batch: by definition, or through padding that counts.

        packing: `data.packing`, which leaves no padding.
        """
        padded = self.positions == "all" or (bool(self.kl) and self.kl_positions == "all")
        return self.by_micro_batch or (padded and not packing)


@dataclass(frozen=True)
class View:
    """One stream's part of what the forward of a micro-batch computed; fields that `Needs` does not name are empty.

    Shapes: N response tokens in batch order; M positions of `Needs.kl_positions` (N for `response`); B rows of S
    positions (right-padded, one sequence each, or one row of packed sequences); D the hidden size. `sequences` is the
    number of sequences, segment_N and segment_BS the sequence (from 0) of each response token and position, mask_BS 1.0
    at the positions that count. Activations are keyed by decoder layer.
    Everything is float32 (float64 in tests) except the segments (int64) and the activations (the model's dtype).
    Only logp_N, kl_M, distilled_N and activations_BSD carry a gradient.
    """

    sequences: int
    segment_N: Tensor | None = None
    logp_N: Tensor | None = None
    ref_logp_N: Tensor | None = None
    kl_M: Tensor | None = None
    distilled_N: Tensor | None = None
    activations_BSD: Mapping[int, Tensor] = field(default_factory=dict)
    ref_activations_BSD: Mapping[int, Tensor] = field(default_factory=dict)
    mask_BS: Tensor | None = None
    segment_BS: Tensor | None = None


@dataclass(frozen=True)
class Term:
    """One summand of the loss: weight · sum / (global value of the count named `count`).

    sum: a scalar. count: a count of the collator, known before the first forward: "STREAM.sequences", "STREAM.tokens"
    (response tokens), "STREAM.positions" (where mask_BS is 1), "STREAM.kl_positions" (elements of kl_M), or
    "micro_batches" (see `Needs.by_micro_batch`).
    The training loop divides; an objective never does. metrics.jsonl has sum / count under `terms`.
    """

    name: str
    weight: float
    sum: Tensor
    count: str


@dataclass(frozen=True)
class Logged:
    """A value that is logged and is no part of the loss, such as a reward: sum / (global value of `count`).

    sum: a scalar; no gradient flows through it. count: as in `Term`. metrics.jsonl has the value under `values`.
    """

    name: str
    sum: Tensor
    count: str


class Objective(ABC):
    """Base class: a dataclass whose fields are the options in a recipe's `objective`.

    A subclass defines `needs` and `__call__`; one that keeps tensors between steps defines the other three methods too.
    """

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What to compute; follows from the options alone."""

    @abstractmethod
    def __call__(self, views: Mapping[str, View]) -> Sequence[Term | Logged]:
        """Terms and logged values of one micro-batch: the same names in the same order for every micro-batch."""

    @property
    def cautions(self) -> tuple[str, ...]:
        """Warnings about the chosen options, logged once at the start of a run."""
        if not self.needs.by_micro_batch:
            return ()
        return ("the loss is a function of the micro-batch by definition, so it changes with train.micro_batch",)

    def start(self, hidden_size: int, seed: int) -> None:
        """Draw what is drawn once a run, such as a control vector; the draw must be equal on every rank."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to keep in every checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned. Raises ConfigError for other tensors."""
        if state:
            raise ConfigError(f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(state)}")


# A new objective is one file and one line here; one from outside the package is named `module:Class`.
REGISTRY = Registry(
    "objective",
    "name",
    {
        "sft": "mirage_dist.objectives.likelihood:SFT",
        "ga": "mirage_dist.objectives.likelihood:GradientAscent",
        "graddiff": "mirage_dist.objectives.likelihood:GradDiff",
        "npo": "mirage_dist.objectives.npo:NPO",
        "simnpo": "mirage_dist.objectives.simnpo:SimNPO",
        "dpo": "mirage_dist.objectives.preference:DPO",
        "idk_dpo": "mirage_dist.objectives.preference:IdkDPO",
        "wga": "mirage_dist.objectives.reweighted:WGA",
        "satimp": "mirage_dist.objectives.reweighted:SatImp",
        "undial": "mirage_dist.objectives.undial:UNDIAL",
        "rmu": "mirage_dist.objectives.rmu:RMU",
    },
)


def make(options: Mapping[str, Any], source: str = "recipe") -> Objective:
    """The objective that `options` describes: `name`, and the fields of its dataclass.

    Raises ConfigError for an unknown name, field or value, a class that is not a dataclass derived from `Objective`,
    and streams in `needs` that are not among its `streams`.
    """
    name = options.get("name")
    loaded = REGISTRY.load(name, source, "objective.name")
    if not (issubclass(loaded, Objective) and is_dataclass(loaded)):
        raise ConfigError(
            f"{source}: objective.name={name!r}: not a dataclass derived from mirage_dist.objectives.base.Objective"
        )
    objective: Objective = REGISTRY.make(options, source, "objective")
    _check_needs(objective.needs, f"{source}: objective.name={name!r}")
    return objective


def _check_needs(needs: Needs, place: str) -> None:
    """A mistake here would otherwise show as a missing field of a view, hours later or never."""
    if "validation" in needs.streams:
        raise ConfigError(f"{place}: needs.streams names validation, which is the held-out stream; name it otherwise")
    per_stream = ("logp", "ref_logp", "kl", "distil", "activation", "ref_activation", "paired", "unlearned", "audited")
    for what in per_stream:
        if unknown := [stream for stream in getattr(needs, what) if stream not in needs.streams]:
            raise ConfigError(f"{place}: needs.{what} names {unknown}, which are not in needs.streams {needs.streams}")
    if (needs.activation or needs.ref_activation) and not needs.layers:
        raise ConfigError(f"{place}: needs.activation and needs.ref_activation require needs.layers")


# ---------------------------------------------------------------------------------------- what objectives share


def cross_entropy(name: str, weight: float, stream: str, view: View) -> Term:
    """The token mean of the cross entropy of one stream."""
    return Term(name, weight, -wanted(view.logp_N).sum(), f"{stream}.tokens")


def sum_by_sequence(values_N: Tensor, segment_N: Tensor, sequences: int) -> Tensor:
    """Sums of token values by sequence: (N,), (N,) -> (B,), in a fixed order (index_add on a GPU has none)."""
    own_BN = segment_N == torch.arange(sequences, device=segment_N.device)[:, None]
    return torch.where(own_BN, values_N, 0).sum(1)


def mean_by_sequence(values_N: Tensor, segment_N: Tensor, sequences: int) -> Tensor:
    """Means of token values by sequence, each of which has a token: (N,), (N,) -> (B,)."""
    length_B = sum_by_sequence(torch.ones_like(values_N), segment_N, sequences)
    return sum_by_sequence(values_N, segment_N, sequences) / length_B


def wanted(field: Tensor | None) -> Tensor:
    """A field of a View that `needs` names. Its absence is a bug of the objective's `needs`, not of the user."""
    if field is None:
        raise RuntimeError("this field of the View was not computed; name its stream in the objective's `needs`")
    return field
