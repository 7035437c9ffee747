"""What a run holds in memory, in formulas over sizes alone.

Elements of parameters and of optimizer state are exact (tests compare them with a run's shards); activations are an
estimate, whose assumptions `activations` tells.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mirage_dist.kernels.logprob import linear_token_logps

FP32 = 4  # bytes
STATE = 3 * FP32  # bytes of a trained element in an optimizer or a checkpoint: master copy and AdamW's two moments
WORKSPACE = inspect.signature(linear_token_logps).parameters["workspace_mb"].default << 20
# DeepSpeed's defaults for what its JSON leaves out, in elements.
BUCKETS = {"reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 5e7, "stage3_param_persistence_threshold": 1e5}


@dataclass(frozen=True)
class Place:
    """Bytes of something on the device and in host memory."""

    device: int = 0
    host: int = 0

    def __add__(self, other: Place) -> Place:
        return Place(self.device + other.device, self.host + other.host)


def state_elements(sizes: Sequence[int], stage: int, ranks: int) -> list[int]:
    """Trained elements whose master copy and moments each rank holds, without padding; `sizes` is of each parameter.

    Stage 3 cuts every parameter into equal parts, stage 2 one buffer of all of them.
    """
    if stage == 3:
        return [sum(_part(size, -(-size // ranks), rank) for size in sizes) for rank in range(ranks)]
    # The buffer is a multiple of two elements a rank, for the sake of NCCL.
    part = 2 * -(-sum(sizes) // (2 * ranks))
    return [_part(sum(sizes), part, rank) for rank in range(ranks)]


def _part(size: int, part: int, rank: int) -> int:
    return max(0, min(part, size - part * rank))


def weights(sizes: Sequence[int], itemsize: int, zero: Mapping[str, Any], ranks: int, largest: int) -> Place:
    """All parameters, trained or not. Stage 2: whole. Stage 3: a part of each, the small ones whole besides, and what
    is gathered at a time, taken as the largest module (of `largest` elements) and the prefetch bucket.
    """
    if zero["stage"] != 3:
        return Place(sum(sizes) * itemsize)
    shards = Place(sum(-(-size // ranks) for size in sizes) * itemsize)
    small = sum(size for size in sizes if size <= _bucket(zero, "stage3_param_persistence_threshold"))
    gathered = min(largest + _bucket(zero, "stage3_prefetch_bucket_size"), sum(sizes))
    return _offloaded(shards, zero, "offload_param") + Place((small + gathered) * itemsize)


def gradients(sizes: Sequence[int], zero: Mapping[str, Any], ranks: int) -> Place:
    """This rank's part of the gradient, in float32."""
    return _offloaded(Place(max(state_elements(sizes, zero["stage"], ranks)) * FP32), zero, "offload_optimizer")


def optimizer(sizes: Sequence[int], zero: Mapping[str, Any], ranks: int) -> Place:
    """Master copy and AdamW's moments of the rank that has most."""
    return _offloaded(Place(max(state_elements(sizes, zero["stage"], ranks)) * STATE), zero, "offload_optimizer")


def buckets(itemsize: int, zero: Mapping[str, Any]) -> Place:
    """Buffers in which gradients are reduced: a second one where that overlaps with backward (stage 2)."""
    number = 2 if zero["stage"] == 2 and zero.get("overlap_comm") else 1
    return Place(number * _bucket(zero, "reduce_bucket_size") * itemsize)


def _bucket(zero: Mapping[str, Any], name: str) -> int:
    return int(zero.get(name, BUCKETS[name]))


def _offloaded(place: Place, zero: Mapping[str, Any], key: str) -> Place:
    return Place(host=place.device) if zero.get(key, {}).get("device", "none") == "cpu" else place


def activations(text: Any, tokens: int, width: int, depth: int, itemsize: int, eager: bool, checkpointing: bool) -> int:
    """Bytes that a decoder of `depth` layers keeps for backward: an estimate.

    text: the decoder's configuration. tokens: rows times `width`, padding included. For each token a layer like Llama's
    keeps ten vectors of the hidden size and four of the feed-forward in the model's dtype, and one hidden vector more
    in float32 for its norms; eager attention its probabilities, in 16 bits also as float32. With checkpointing every
    layer keeps its input, and one at a time all of that. A vision tower is taken as frozen, to keep nothing.
    """
    layer = itemsize * (10 * text.hidden_size + 4 * text.intermediate_size) + FP32 * text.hidden_size
    if eager:
        layer += width * text.num_attention_heads * (FP32 if itemsize == FP32 else itemsize + FP32)
    inputs = itemsize * text.hidden_size
    return tokens * (depth * inputs + layer if checkpointing else depth * layer)


def loss_head(rows: int, vocabulary: int, hidden: int, itemsize: int, kl: bool, trains: bool) -> int:
    """Bytes of the loss head at its peak: logits of `rows` response rows within the workspace, their hidden rows'
    gradient, and the weight's where it trains. KL keeps three whole float32 matrices of logits.
    """
    logits = rows * vocabulary * FP32
    held = 3 * logits if kl else min(logits, WORKSPACE)
    return held + rows * hidden * FP32 + (vocabulary * hidden * itemsize if trains else 0)
