"""UNDIAL (Dong et al., 2025, arXiv:2402.10052): self-distillation with adjusted logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mirage_dist.objectives.base import Needs, Term, View, wanted
from mirage_dist.objectives.retaining import Retaining
from mirage_dist.schema.numbers import Weight


@dataclass
class UNDIAL(Retaining):
    """L = forget_weight · mean over response tokens of CE(q, π) + retain term, which is `none` unless chosen.

    q = softmax(z_ref − β · onehot(token)): the reference's distribution with the logit of the answer's own token
    lowered by β. q's entropy bounds the loss below, unlike that of gradient ascent.

    open-unlearning's `compute_undial_loss` (src/trainer/utils.py) takes the mean over *all* positions: at prompt,
    picture and padding its label is −100, which indexes the vocabulary from its end, so there the hundredth-last entry
    is lowered by β. Those positions are left out here; the mean is over the step's response tokens, not a
    micro-batch's.
    """

    retain: Literal["ce", "kl", "none"] = "none"  # the term on `retain`: cross entropy, KL to the reference, or none
    beta: Weight = 10.0  # β: by so much the logit of the answer's token is lowered
    forget_weight: Weight = 1.0  # factor of the forget term

    @property
    def needs(self) -> Needs:
        own = Needs(streams=("forget",), distil=("forget",), penalty=self.beta, unlearned=("forget",))
        return self.with_retain(own)

    def __call__(self, views: Mapping[str, View]) -> list[Term]:
        forget = wanted(views["forget"].distilled_N).sum()
        return [Term("forget", self.forget_weight, forget, "forget.tokens"), *self.retain_terms(views)]
