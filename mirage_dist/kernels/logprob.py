"""Token log-probabilities straight from hidden states: the torch backend, which is also the oracle.

Every likelihood objective is a function of the response tokens' log-probabilities, so the head computes
only those: rows are selected before the matrix product (a LLaVA sample has some 676 positions and 60 response
tokens), and no logits of prompt or image positions ever exist.

Precision: inputs are upcast, so products, sums, softmax and the gradients of the logits are float32 whatever
the input dtype (float64 stays float64); gradients are rounded once, to the dtype of the tensor they belong to.
A product in bfloat16 would round each logit to 8 bits, which is 0.002-0.1 in a sequence's log-probability.
The price is a float32 copy of the weight until backward (0.5 GiB for LLaVA-1.5-7B).

Shapes: B sequences, S positions, D hidden size, N response tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # label of a position that carries no loss, as in Hugging Face models


def response_index(labels_BS: Tensor) -> Tensor:
    """Flat positions b·S + t of the hidden rows that predict a response token, in batch order: (N,) int64.

    The hidden state at t predicts the token at t + 1; a label in column 0 has no row that predicts it.
    """
    wanted_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
    wanted_BS[:, :-1] = labels_BS[:, 1:] != IGNORE
    return wanted_BS.flatten().nonzero().squeeze(1)


def select_response(
    hidden_BSD: Tensor, labels_BS: Tensor, index_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that predict response tokens: hidden (N, D), their labels (N,), the sequence of each (N,).

    `index_N` is `response_index(labels_BS)` computed ahead by the collator: then nothing waits for the
    device. Rows stand in batch order. N is 0 for a batch without response tokens.
    """
    index_N = response_index(labels_BS) if index_N is None else index_N
    hidden_ND = hidden_BSD.flatten(0, 1).index_select(0, index_N)
    labels_N = labels_BS.flatten().index_select(0, index_N + 1)
    return hidden_ND, labels_N, index_N // labels_BS.shape[1]


def linear_logits(
    hidden_ND: Tensor, weight_VD: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Logits (N, V) in float32, in float64 for float64 input; `softcap` is Gemma's cap · tanh(z / cap)."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    # Autocast would take the product back to 16 bits.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logits_NV = F.linear(hidden_ND.to(dtype), weight_VD.to(dtype), None if bias is None else bias.to(dtype))
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def linear_token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(W h)[label] of each row: (N,) in float32, in float64 for float64 input.

    Any upstream gradient is allowed. For N = 0 the empty result still depends on hidden and weight, so that
    a rank without response tokens makes the same backward calls as the others.
    """
    logits_NV = linear_logits(hidden_ND, weight_VD, bias=bias, softcap=softcap)
    return -F.cross_entropy(logits_NV, labels_N, reduction="none")


def linear_token_kl(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ref_logits_NV: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """KL(reference ‖ policy) over the vocabulary, row by row: (N,); same precision as `linear_token_logps`.

    `ref_logits_NV` is what `linear_logits` gave under the reference; it gets no gradient.
    """
    logits_NV = linear_logits(hidden_ND, weight_VD, bias=bias, softcap=softcap)
    logp_NV = logits_NV.log_softmax(-1)
    ref_logp_NV = ref_logits_NV.detach().to(logp_NV.dtype).log_softmax(-1)
    return F.kl_div(logp_NV, ref_logp_NV, reduction="none", log_target=True).sum(-1)
