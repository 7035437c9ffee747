"""Negative preference optimisation (Zhang et al., 2024), as the Safety Mirage paper uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mirage_dist.objectives.base import Needs, Term, View, mean_by_sequence, sum_by_sequence, wanted
from mirage_dist.objectives.retaining import Retaining
from mirage_dist.schema import ConfigError
from mirage_dist.schema.numbers import Positive, Weight


@dataclass
class NPO(Retaining):
    """L = forget_weight · (2/β) · mean_i softplus(β Δ_i) + retain_weight · retain term.

    Δ_i = log π(y_i|x_i) − log π_ref(y_i|x_i) over the response tokens of sequence i: their sum (`seq_sum`, the
    paper's formula) or their mean (`seq_mean`). A β tuned for one does not suit the other. The retain term is the token
    mean of the cross entropy (`ce`), the mean of KL(reference ‖ policy) at `kl_positions` (`kl`), or `none`.
    The collator guarantees a response token in every sequence, so that a mean has a denominator.

    `batch_mean` is the loss of the paper's code for vision-language models, for comparison with it: CE is the token
    mean over a *micro-batch*, so the loss depends on how a batch is split, by definition. It requires `retain: ce`:
    L = −(2/β) log σ(β (CE − CE_ref)) on forget, + retain_weight · (2/β) log σ(β (CE − CE_ref)) on retain, which
    weakens as retain degrades, + ce_weight · CE on a further batch of retained samples, the stream `retain_ce`.
    """

    # β, which weighs how far an answer is forgotten already; tuned for one `reduction`, it suits no other
    beta: Positive = 0.1
    # what Δ of a sequence is; `batch_mean`: the loss of the paper's code
    reduction: Literal["seq_sum", "seq_mean", "batch_mean"] = "seq_sum"
    forget_weight: Weight = 1.0  # factor of the forget term
    ce_weight: Weight | None = None  # of batch_mean: factor of the cross entropy on `retain_ce`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parity:
            if self.ce_weight is not None:
                raise ConfigError(
                    f"ce_weight={self.ce_weight}: only reduction=batch_mean has this term; remove ce_weight"
                )
            return
        if self.retain != "ce" or self.ce_weight is None:
            raise ConfigError(
                f"reduction=batch_mean: requires retain=ce and a ce_weight (got {self.retain}, {self.ce_weight})"
            )

    @property
    def parity(self) -> bool:
        """Whether this is the loss of the paper's code."""
        return self.reduction == "batch_mean"

    @property
    def cautions(self) -> tuple[str, ...]:
        if not self.parity:
            return ()
        return (*super().cautions, "with reduction=batch_mean the retain term weakens as retain degrades")

    @property
    def needs(self) -> Needs:
        if self.parity:
            own = ("forget", "retain") if self.retain_weight else ("forget",)
            streams = (*own, "retain_ce") if self.ce_weight else own
            return Needs(streams=streams, logp=streams, ref_logp=own, unlearned=("forget",), by_micro_batch=True)
        own = ("forget",)
        return self.with_retain(Needs(streams=own, logp=own, ref_logp=own, unlearned=own))

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        if self.parity:
            return self._batch_mean(views)
        margin_B = self._margin(views["forget"])
        forget = (2 / self.beta) * F.softplus(self.beta * margin_B).sum()
        return [Term("forget", self.forget_weight, forget, "forget.sequences"), *self.retain_terms(views)]

    def _margin(self, view: View) -> Tensor:
        """Δ of each sequence: (B,)."""
        difference_N, segment_N = wanted(view.logp_N) - wanted(view.ref_logp_N), wanted(view.segment_N)
        by_sequence = sum_by_sequence if self.reduction == "seq_sum" else mean_by_sequence
        return by_sequence(difference_N, segment_N, view.sequences)

    def _batch_mean(self, views: Mapping[str, View]) -> list[Term]:
        terms = [Term("forget", self.forget_weight, -self._log_sigmoid(views["forget"]), "micro_batches")]
        if self.retain_weight:
            terms.append(Term("retain", self.retain_weight, self._log_sigmoid(views["retain"]), "micro_batches"))
        if self.ce_weight:
            terms.append(Term("retain_ce", self.ce_weight, -wanted(views["retain_ce"].logp_N).mean(), "micro_batches"))
        return terms

    def _log_sigmoid(self, view: View) -> Tensor:
        """(2/β) · log σ(β (CE − CE_ref)) of a micro-batch."""
        rise = (wanted(view.ref_logp_N) - wanted(view.logp_N)).mean()
        return (2 / self.beta) * F.logsigmoid(self.beta * rise)
