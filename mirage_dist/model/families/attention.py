"""Attention on a GPU: gradients that have the same bits every time, and packed sequences each by itself.

PyTorch's fused kernels add up a query's gradient in the order in which the GPU's blocks finish, unless deterministic
algorithms are required while they run. Requiring them everywhere would refuse operations that have none, so they are
required for the backward of attention alone.

Shapes: T tokens of a packed row, R sequences in it, H heads, K heads of keys and values, d size of a head.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD, MULTIPLE = 256, 8  # sizes of a head that PyTorch's flash-attention has kernels for
OLDEST = (8, 0)  # compute capability, Ampere

# ------------------------------------------------------------------------------------------- repeatable gradients


class _Required:
    """Deterministic algorithms, required between `begin` and `end`."""

    before: int | None = None

    def begin(self) -> None:
        if self.before is None:
            self.before = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")

    def end(self) -> None:
        if self.before is not None:
            torch.set_deterministic_debug_mode(self.before)
            self.before = None


required = _Required()


class _BackwardBegins(torch.autograd.Function):
    """Of attention's output, whose backward comes before that of attention."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        required.begin()
        return grad


class _BackwardEnds(torch.autograd.Function):
    """Of attention's inputs, whose backward comes after that of attention."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        required.end()
        return grads


def repeatable(attend: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    """A transformers attention function with the same values, whose gradients on a GPU are repeatable bit by bit."""

    def attended(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *positional: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        if query.device.type != "cuda" or not torch.is_grad_enabled():
            return attend(module, query, key, value, mask, *positional, **given)
        query, key, value = _BackwardEnds.apply(query, key, value)  # type: ignore[misc]
        out, weights = attend(module, query, key, value, mask, *positional, **given)
        return _BackwardBegins.apply(out), weights  # type: ignore[return-value]

    return attended


def make_repeatable() -> None:
    """Make the gradients of every model's attention repeatable on a GPU, in this process."""
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # of flash-attn, by transformers
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it matrix products are refused there

    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa", repeatable(sdpa_attention_forward))


# --------------------------------------------------------------------------------------------- packed sequences


def flashes(config: Any, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own flash-attention computes the packed sequences of this decoder one by one on this GPU.

    config: of the text decoder.
    """
    if dtype not in HALF or not torch.cuda.is_available() or torch.cuda.get_device_capability() < OLDEST:
        return False
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size <= LARGEST_HEAD and size % MULTIPLE == 0


class _Flash(torch.autograd.Function):
    """Causal attention within borders, by PyTorch's flash-attention: (T, H, d) of (T, H, d) and twice (T, K, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        borders: Tensor,
        longest: int,
        dropout: float,
        scale: float | None,
    ) -> Tensor:
        sizes = (borders, borders, longest, longest, dropout, True)
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *sizes, False, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, lse, borders, state, unused)
        ctx.longest, ctx.dropout, ctx.scale = longest, dropout, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse, borders, state, unused = ctx.saved_tensors
        sizes = (borders, borders, ctx.longest, ctx.longest, ctx.dropout, True)
        required.begin()
        try:
            grads = torch.ops.aten._flash_attention_backward(
                grad.contiguous(), query, key, value, out, lse, *sizes, state, unused, scale=ctx.scale
            )
        finally:
            required.end()
        return *grads, None, None, None, None


def flash(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, **options: Any) -> Tensor:
    """Causal attention of packed sequences, each by itself: (1, T, H, d), with repeatable gradients.

    query (1, H, T, d); key, value (1, K, T, d), H a multiple of K; half precision on a GPU. borders (R + 1,) int32: the
    position where each sequence begins, followed by T. longest: tokens of the longest. options: dropout, scale.
    """
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _Flash.apply(*rows, borders, longest, options.get("dropout", 0.0), options.get("scale"))[None]  # type: ignore[index]
