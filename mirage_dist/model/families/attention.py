"""Attention on a GPU: gradients that have the same bits every time, and packed sequences each by itself.

PyTorch's fused kernels add up a query's gradient in the order in which the GPU's blocks finish, unless deterministic
algorithms are required while they run. Requiring them everywhere would refuse operations that have none, so they are
required within attention alone. What a GPU, its driver and its PyTorch really do is measured before it is relied on
(`gradient_fault`, `flash_fault`).

Shapes: T tokens of a packed row, R sequences in it, H heads, K heads of keys and values, d size of a head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD, MULTIPLE = 256, 8  # sizes of a head that PyTorch's flash-attention has kernels for
OLDEST = (8, 0)  # compute capability, Ampere
LENGTHS = (700, 1, 333)  # of sequences, in what is measured: several blocks of the kernels, and parts of one
# Largest difference, as a share of the norm. In 16 bits a right kernel stays near 3e-3; a sequence that another one
# reaches is off by more than a tenth.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class Heads(NamedTuple):
    """Heads of queries and of keys, and their size."""

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Of a text decoder's configuration; USUAL where it has no heads, or others in some layers."""
        try:
            count = config.num_attention_heads
            size = getattr(config, "head_dim", None) or config.hidden_size // count
            return cls(count, getattr(config, "num_key_value_heads", None) or count, size)
        except Exception:  # of any kind: transformers raises its own for what differs between layers
            return USUAL


USUAL = Heads(8, 2, 128)


# ------------------------------------------------------------------------------------------- repeatable gradients


STRICT = 2  # of torch.set_deterministic_debug_mode


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms are required within the block, and behind it what was required before."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(STRICT)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


class _Backward:
    """Deterministic algorithms, required between the nodes that stand around attention in the graph."""

    def __init__(self) -> None:
        self.before: int | None = None

    def begins(self) -> None:
        if self.before is None:
            self.before = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode(STRICT)

    def ends(self) -> None:
        if self.before is not None:
            torch.set_deterministic_debug_mode(self.before)
            self.before = None


backward = _Backward()


class _BackwardBegins(torch.autograd.Function):
    """Of attention's output, whose backward comes before that of attention."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        backward.begins()
        return grad


class _BackwardEnds(torch.autograd.Function):
    """Of attention's inputs, whose backward comes after that of attention."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        backward.ends()
        return grads


def repeatable(attend: Callable[..., tuple[Tensor, Any]], device: str = "cuda") -> Callable[..., tuple[Tensor, Any]]:
    """A transformers attention function whose gradients on such a device are repeatable bit by bit.

    Its kernel is one that can be, in evaluation as in training.
    """

    def attended(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *more: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        if query.device.type != device:
            return attend(module, query, key, value, attention_mask, *more, **given)
        query, key, value = _BackwardEnds.apply(query, key, value)  # type: ignore[misc]
        with deterministic():
            out, weights = attend(module, query, key, value, attention_mask, *more, **given)
        return _BackwardBegins.apply(out), weights  # type: ignore[return-value]

    return attended


def make_repeatable() -> None:
    """Make the gradients of every model's sdpa and flash-attention repeatable on a GPU, in this process."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _settings()
    AttentionInterface.register("sdpa", repeatable(sdpa_attention_forward))


def _settings() -> None:
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # of flash-attn, by transformers
    filling: Any = torch.utils.deterministic  # memory that is about to be written
    filling.fill_uninitialized_memory = False


@contextmanager
def measuring() -> Iterator[None]:
    """A verdict is that of training, wherever it is needed first."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@cache
@measuring()
def gradient_fault(heads: Heads, dtype: torch.dtype, device: str = "cuda") -> str | None:
    """Why the gradients of such attention are not repeatable on this device; None where they are."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _settings()
    tensors, upstream, _ = _sample(heads, dtype, device)
    module = SimpleNamespace(is_causal=True, training=True, num_key_value_groups=heads.queries // heads.keys)
    tokens = sum(LENGTHS)
    block = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None]

    def attend(mask: Tensor | None, repeated: bool) -> list[Tensor]:
        function: Any = repeatable(sdpa_attention_forward, device) if repeated else sdpa_attention_forward
        out, _ = function(module, *tensors, mask, is_causal=mask is None)
        return [out, *torch.autograd.grad(out, tensors, upstream)]

    try:
        for mask in (None, block):
            first, *others = (attend(mask, True) for _ in range(3))
            if any(not torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
                return "two backward passes differ"
            if (off := _difference(first, attend(mask, False))) > TOLERANCES[dtype]:
                return f"deterministic algorithms give other values ({off:.1e} of their size)"
    except Exception as error:  # of any kind: what this PyTorch has no deterministic kernel for
        return _refused(error)
    finally:
        backward.ends()
    return None


# --------------------------------------------------------------------------------------------- packed sequences


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
        with deterministic():
            grads = torch.ops.aten._flash_attention_backward(
                grad.contiguous(), query, key, value, out, lse, *sizes, state, unused, scale=ctx.scale
            )
        return *grads, None, None, None, None


def flash(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, **options: Any) -> Tensor:
    """Causal attention of packed sequences, each by itself: (1, T, H, d), with repeatable gradients.

    query (1, H, T, d); key, value (1, K, T, d), H a multiple of K; half precision on a GPU. borders (R + 1,) int32: the
    position where each sequence begins, followed by T. longest: tokens of the longest. options: dropout, scale.
    """
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _Flash.apply(*rows, borders, longest, options.get("dropout", 0.0), options.get("scale"))[None]  # type: ignore[index]


def within_borders(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], **options: Any) -> Tensor:
    """As `flash`, by sdpa on any device, with lengths that the host knows. options: dropout_p, scale."""
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    own = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True, **options) for part in parts]
    return torch.cat(own, dim=2).transpose(1, 2)


def suits(heads: Heads, dtype: torch.dtype) -> bool:
    """Whether PyTorch's flash-attention has kernels for such heads."""
    return dtype in HALF and heads.size <= LARGEST_HEAD and heads.size % MULTIPLE == 0


def flashes(heads: Heads, dtype: torch.dtype) -> bool:
    """Whether the kernels that suit such heads are there on this GPU, and right (`flash_fault`)."""
    return torch.cuda.get_device_capability() >= OLDEST and flash_fault(heads, dtype) is None


@cache
@measuring()
def flash_fault(heads: Heads, dtype: torch.dtype, device: str = "cuda") -> str | None:
    """Why `flash` cannot stand for `within_borders` on this device; None where it can."""
    tensors, upstream, borders = _sample(heads, dtype, device)

    def run(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]

    try:
        first, again = (run(lambda q, k, v: flash(q, k, v, borders, max(LENGTHS)), tensors) for _ in range(2))
        if any(not torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return "two backward passes differ"
        exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
        off = _difference(first, run(lambda q, k, v: within_borders(q, k, v, list(LENGTHS)), exact))
        return None if off <= TOLERANCES[dtype] else f"packed sequences differ by {off:.1e} from those alone"
    except Exception as error:  # of any kind: the operation is PyTorch's own, and not all of its builds have it
        return _refused(error)


def _refused(error: Exception) -> str:
    """What an operation raised, in one line. Raises it where the GPU cannot go on or has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _sample(heads: Heads, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Queries, keys and values of a packed row, a gradient of its attention's output, and the borders."""
    generator, tokens = torch.Generator().manual_seed(0), sum(LENGTHS)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tensors = [drawn(1, count, tokens, heads.size).requires_grad_() for count in (heads.queries, *[heads.keys] * 2)]
    borders = torch.tensor([*accumulate(LENGTHS, initial=0)], dtype=torch.int32, device=device)
    return tensors, drawn(1, tokens, heads.queries, heads.size), borders


def _difference(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of two tensors, as a share of the norm; infinite where one is no number."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(mine, theirs, strict=True)]
    shares = [float((a - b).norm() / b.norm()) for a, b in pairs]
    return max(share if share == share else float("inf") for share in shares)
