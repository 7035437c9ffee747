"""Representation misdirection for unlearning (Li et al., 2024), as the Safety Mirage paper uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mirage_dist.kernels.steer import steer_mse
from mirage_dist.objectives.base import (
    Needs,
    Objective,
    Positions,
    Term,
    View,
    cross_entropy,
    mean_by_sequence,
    sum_by_sequence,
    wanted,
)
from mirage_dist.schema import ConfigError
from mirage_dist.schema.numbers import Layer, Positive, Weight


@dataclass
class RMU(Objective):
    """L = Σ_layers MSE(h_forget, c) + retain_weight · MSE(h_retain, h_ref), + ce_weight · CE(retain) or kl_weight · KL.

    h is the output of decoder layer `layer`, or of each of `layers`; each MSE is a mean over hidden units and over the
    positions that `positions` marks. c = coeff · u/‖u‖ is the control vector, with u uniform in [0, 1)^D, drawn once a
    run and the same at every layer. `positions: all` includes padding, as the paper's code does, so the loss depends on
    how rows are batched. KL(reference ‖ policy) is the mean over the response tokens of the retained samples.

    coeff_of: `reference_norm` is adaptive RMU (Dang et al., 2025, arXiv:2408.06223): c = coeff · ‖h_ref‖ · u/‖u‖ at
    each position, with h_ref the reference's output there, so that one coeff (their β) suits every layer. Their code
    (baselines/adap_rmu/unlearn.py of github.com/RebelsNLU-jaist/llm-unlearning) takes the mean norm of a topic's first
    batch for the whole run; the paper's formula, which this is, depends on no batch.

    average: the mean over all marked positions (`positions`), or over sequences of the mean over each one's own
    (`sequences`), as open-unlearning means it. ce_average: likewise of the cross entropy over response tokens. The
    paper's code has one sequence a GPU and averages over GPUs, which is `sequences` for both.
    ce_stream: `retain_ce` is a further batch of retained samples, as in the paper's code.
    """

    layer: Layer = 7  # decoder layer whose output is steered, from 0
    layers: list[Layer] | None = None  # several of them, in place of `layer`
    coeff: Positive = 10.0  # length of the control vector c
    coeff_of: Literal["constant", "reference_norm"] = "constant"
    retain_weight: Weight = 1.0  # factor of the squared error on retained samples
    ce_weight: Weight = 1.0  # factor of the cross entropy on retained answers; 0 leaves the later layers out
    kl_weight: Weight = 0.0  # factor of KL(reference ‖ policy), in place of the cross entropy
    # positions of the means: with padding, without it, of the answer, or without picture tokens
    positions: Positions = "all"
    average: Literal["positions", "sequences"] = "positions"
    ce_average: Literal["tokens", "sequences"] = "tokens"
    ce_stream: Literal["retain", "retain_ce"] = "retain"
    control_D: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, default in (("ce_average", "tokens"), ("ce_stream", "retain")):
            if not self.ce_weight and getattr(self, name) != default:
                raise ConfigError(f"{name}={getattr(self, name)}: belongs to the cross entropy, and ce_weight is 0")
        if self.kl_weight and self.ce_weight:
            raise ConfigError(
                f"kl_weight={self.kl_weight}, ce_weight={self.ce_weight}: two terms that keep the answers to retained "
                "questions; set one of them to 0"
            )
        if self.layers is not None and len({*self.layers}) != max(len(self.layers), 1):
            raise ConfigError(f"layers={self.layers}: expected one or more different layers")
        if self.layers is not None and self.layer != RMU.layer:
            raise ConfigError(f"layer={self.layer}, layers={self.layers}: give one of the two")

    @property
    def tapped(self) -> tuple[int, ...]:
        """The layers whose outputs are steered."""
        return (self.layer,) if self.layers is None else tuple(self.layers)

    @property
    def needs(self) -> Needs:
        retain = ("retain",) if self.retain_weight else ()
        ce = (self.ce_stream,) if self.ce_weight else ()
        kl = ("retain",) if self.kl_weight else ()
        scaled = ("forget",) if self.coeff_of == "reference_norm" else ()
        return Needs(
            streams=tuple(dict.fromkeys(("forget", *retain, *ce, *kl))),
            logp=ce,
            kl=kl,
            activation=("forget", *retain),
            ref_activation=(*scaled, *retain),
            layers=self.tapped,
            positions=self.positions,
            unlearned=("forget",),
        )

    def start(self, hidden_size: int, seed: int) -> None:
        """Draw the control vector from a generator of its own, so that it is equal on every rank."""
        direction_D = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed))
        self.control_D = self.coeff * direction_D / direction_D.norm()

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        if self.control_D is None:
            raise RuntimeError("RMU has no control vector: call start() or load_state_dict() first")
        terms = []
        for layer in self.tapped:
            own = "" if self.layers is None else f"_{layer}"
            steer = self._squared_error(views["forget"], layer, self._target(views["forget"], layer))
            terms.append(Term(f"forget{own}", 1.0, steer, f"forget.{self.average}"))
            if self.retain_weight:
                retain = views["retain"]
                keep = self._squared_error(retain, layer, retain.ref_activations_BSD[layer].flatten(0, 1))
                terms.append(Term(f"retain{own}", self.retain_weight, keep, f"retain.{self.average}"))
        if self.ce_weight:
            terms.append(self._cross_entropy(views[self.ce_stream]))
        if self.kl_weight:
            kl = wanted(views["retain"].kl_M).sum()
            terms.append(Term("retain_kl", self.kl_weight, kl, "retain.kl_positions"))
        return terms

    def _target(self, view: View, layer: int) -> Tensor:
        """What the activations are steered to: (D,), or (B · S, D) where it follows the reference's norm."""
        target_D = wanted(self.control_D).to(view.activations_BSD[layer])
        if self.coeff_of == "constant":
            return target_D
        reference_RD = view.ref_activations_BSD[layer].flatten(0, 1)
        norm_R = torch.linalg.vector_norm(
            reference_RD, dim=1, dtype=torch.promote_types(reference_RD.dtype, torch.float32)
        )
        return (norm_R[:, None] * wanted(self.control_D).to(norm_R)).to(reference_RD.dtype)

    def _squared_error(self, view: View, layer: int, target: Tensor) -> Tensor:
        """Sum over marked positions of the mean over hidden units of (h − target)², or with `sequences` the sum over
        sequences of the mean over each one's; target: (D,) or (B · S, D).
        """
        weight_P = wanted(view.mask_BS).flatten()
        if self.average == "sequences":
            segment_P = wanted(view.segment_BS).flatten()
            weight_P = weight_P / sum_by_sequence(weight_P, segment_P, view.sequences).index_select(0, segment_P)
        return steer_mse(view.activations_BSD[layer], target, weight_P)

    def _cross_entropy(self, view: View) -> Term:
        if self.ce_average == "tokens":
            return cross_entropy("retain_ce", self.ce_weight, self.ce_stream, view)
        mean_B = mean_by_sequence(wanted(view.logp_N), wanted(view.segment_N), view.sequences)
        return Term("retain_ce", self.ce_weight, -mean_B.sum(), f"{self.ce_stream}.sequences")

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.control_D is None else {"control_D": self.control_D}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {"control_D"}:
            raise ConfigError(f"RMU keeps 'control_D', but the checkpoint holds {sorted(state)}")
        self.control_D = state["control_D"].clone()
