"""Token log-probabilities straight from hidden states.

Every likelihood objective is a function of the response tokens' log-probabilities, so the head computes only those:
rows are selected before the matrix product (a LLaVA sample has some 676 positions and 60 response tokens), and no
logits of prompt or image positions ever exist. With z = W h and upstream gradients g of a log-probability and e of a
log-sum-exp, dz = g·(onehot − p) + e·p, dH = dz W and dW = dzᵀ H, whatever the objective.

Precision: logits, softmax and log-probabilities are float32 whatever the input dtype (float64 stays float64), the same
numbers in forward and in backward. A bfloat16 logit would be off by up to 2⁻⁹ of itself, which is 0.002-0.1 in a
sequence's log-probability. On CUDA the gradient of the logits of bfloat16 inputs is rounded to bfloat16 for its
products (projection.py), elsewhere it is not. Nothing is filtered, no sum depends on the order of threads: the same
call twice is bitwise the same.

Shapes: B sequences, S positions, D hidden size, N response tokens, V vocabulary, C columns of a chunk of it.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirage_dist.kernels import passes
from mirage_dist.kernels.losses import linear_ce, linear_npo
from mirage_dist.kernels.passes import Wanted
from mirage_dist.kernels.projection import Projection, cut
from mirage_dist.kernels.rows import IGNORE, Softmax

__all__ = [
    "IGNORE",
    "linear_ce",
    "linear_logits",
    "linear_npo",
    "linear_token_kl",
    "linear_token_logps",
    "response_index",
    "select_response",
]
Mode = Literal["auto", "cached", "recompute"]


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


@overload
def linear_token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mode: Mode = "auto",
    workspace_mb: int = 512,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mode: Mode = "auto",
    workspace_mb: int = 512,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_token_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mode: Mode = "auto",
    workspace_mb: int = 512,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(W h)[label] of each row: (N,) in float32, in float64 for float64 input; with `return_lse` also the
    log-sum-exp (N,) of its logits.

    Any upstream gradient is allowed, of both. A row whose label is −100 has log-probability 0 and no gradient from it.
    For N = 0 the empty result still depends on hidden and weight, so that a rank without response tokens makes the
    same backward calls as the others.

    `cached` keeps the logits (N, V) until backward, which turns them into their own gradient: 6NVD operations.
    `recompute` makes them again, in chunks of the vocabulary of at most `workspace_mb` MiB: 8NVD. `auto` keeps what
    fits the workspace; where weight and bias train not, it forms each row's gradient in forward, for backward to
    scale, and keeps neither: 4NVD.

    Raises ValueError for a label outside the vocabulary (−∞ on a GPU, see `passes.check_labels`) and a mode that is
    none of these.
    """
    if mode not in ("auto", "cached", "recompute"):
        raise ValueError(f"mode={mode!r}; must be auto, cached or recompute")
    passes.check_labels(labels_N, len(weight_VD))
    trains = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias)]
    if mode == "auto" and trains == [True, False, False] and not return_lse:
        return _FrozenTokenLogProbs.apply(hidden_ND, weight_VD, bias, labels_N, softcap, workspace_mb)
    # Without a backward to come there is nothing to keep.
    kept = None if any(trains) and mode == "auto" else any(trains) and mode == "cached"
    logp_N, lse_N = _TokenLogProbs.apply(hidden_ND, weight_VD, bias, labels_N, softcap, kept, workspace_mb)
    return (logp_N, lse_N) if return_lse else logp_N


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, softcap, kept: bool | None, workspace_mb):  # type: ignore[override]
        with passes.exact(hidden):
            projection = Projection(hidden, weight, bias, softcap)
            columns = passes.columns_that_fit(projection, len(hidden), workspace_mb)
            kept = columns == len(weight) if kept is None else kept
            room_NC = projection.workspace(len(hidden), len(weight) if kept else columns)
            softmax = passes.statistics(projection, hidden.to(projection.row_dtype), labels, room_NC)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.set_materialize_grads(False)
        ctx.softmax, ctx.softcap, ctx.kept, ctx.columns = softmax, softcap, kept, room_NC.shape[1]
        ctx.logits = room_NC if kept else None
        return softmax.logp(labels), softmax.lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_lse: Tensor | None):  # type: ignore[override]
        hidden, weight, bias, labels = ctx.saved_tensors
        softmax: Softmax = ctx.softmax
        grad_logp = torch.zeros_like(softmax.max_N) if grad_logp is None else grad_logp
        with passes.exact(hidden):
            projection = Projection(hidden, weight, bias, ctx.softcap)
            rows = hidden.to(projection.row_dtype)
            room_NC, ctx.logits = ctx.logits, None
            if room_NC is None:
                room_NC = projection.workspace(len(hidden), ctx.columns)
                if ctx.kept:
                    # The first backward used the kept logits up: a further one of the same graph makes them again, the
                    # same way, so that its bits are the same.
                    passes.statistics(projection, rows, labels, room_NC)
            wanted = Wanted(*ctx.needs_input_grad[:3])
            found = passes.gradients(projection, rows, labels, softmax, grad_logp, grad_lse, room_NC, ctx.kept, wanted)
        return *found.rounded(hidden, weight, bias), None, None, None, None


class _FrozenTokenLogProbs(torch.autograd.Function):
    """For a weight that does not train: a row's gradient for g = 1 is made in forward, and scaled by g in backward."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, softcap, workspace_mb):  # type: ignore[override]
        with passes.exact(hidden):
            projection = Projection(hidden, weight, bias, softcap)
            parts = cut(len(labels), passes.rows_that_fit(projection, workspace_mb))
            rows, wanted = hidden.to(projection.row_dtype), Wanted(hidden=True, weight=False, bias=False)
            logp, found = passes.single_pass(
                projection, rows, labels, parts, lambda _, logp: torch.ones_like(logp), wanted
            )
        ctx.save_for_backward(found.hidden_ND)
        ctx.dtype = hidden.dtype
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor):  # type: ignore[override]
        (unit,) = ctx.saved_tensors
        return (unit * grad_logp[:, None]).to(ctx.dtype), None, None, None, None, None


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
