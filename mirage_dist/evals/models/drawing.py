"""Tokens drawn at random, each row by a generator of its own: the rows beside it do not change a draw.

A row's next token is the largest of its log-probabilities plus independent Gumbel noise, which is a draw from their
distribution (Gumbel 1954; Maddison et al., NeurIPS 2014, arXiv 1411.0030). Noise belongs to a token, whatever its rank:
log-probabilities that differ in their last bits, as in a batch of another size they may, give another token only where
two sums lie that close.

Shapes: B rows of a batch, R of which are drawn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mirage_dist.data.sample import Draw


class Drawing(LogitsProcessor):
    """Makes the likeliest token of a row the drawn one, for one batch of greedy decoding.

    draws: of each row, None for one that stays greedy. The noise comes from the CPU's generator, on every device.
    """

    def __init__(self, draws: Sequence[Draw | None]) -> None:
        drawn = [(row, draw) for row, draw in enumerate(draws) if draw is not None]
        self.rows = [row for row, _ in drawn]
        self.temperature_R1 = torch.tensor([[draw.temperature] for _, draw in drawn])
        self.top_p_R1 = torch.tensor([[draw.top_p] for _, draw in drawn])
        self.generators = [torch.Generator().manual_seed(draw.seed) for _, draw in drawn]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: the logits of the next token, (B, V), float32, after the model's own rules such as a penalty."""
        if not self.rows:
            return scores
        device, vocabulary = scores.device, scores.shape[1]
        logp_RV = (scores[self.rows] / self.temperature_R1.to(device)).log_softmax(dim=1)
        noise_RV = torch.stack([gumbel(vocabulary, generator) for generator in self.generators])
        summed_RV = logp_RV + noise_RV.to(device)
        scores = scores.clone()
        scores[self.rows] = summed_RV.masked_fill(~nucleus(logp_RV, self.top_p_R1.to(device)), -torch.inf)
        return scores


def gumbel(size: int, generator: torch.Generator) -> Tensor:
    """Independent standard Gumbel variables, (size,), float32."""
    exponential = -torch.log1p(-torch.rand(size, dtype=torch.float64, generator=generator))
    return -exponential.clamp(min=1e-20).log().float()


def nucleus(logp_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """The fewest likeliest tokens of each row that together have at least the probability top_p: (R, V), bool."""
    kept_RV = logp_RV > -torch.inf
    if (top_p_R1 == 1).all():
        return kept_RV
    p_RV, order_RV = logp_RV.exp().sort(dim=1, descending=True, stable=True)
    before_RV = p_RV.cumsum(dim=1) - p_RV
    within_RV = (before_RV < top_p_R1) | (top_p_R1 == 1)
    within_RV[:, 0] = True
    return kept_RV & torch.zeros_like(kept_RV).scatter(1, order_RV, within_RV)
