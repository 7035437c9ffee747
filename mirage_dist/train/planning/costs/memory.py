"""What a run holds in memory, in formulas over sizes alone.

Elements of parameters and of optimizer state are exact (tests compare them with a run's shards); activations are an
estimate, whose assumptions the docstring of `activations` states. What DeepSpeed 0.19.8 holds beside the model states
follows its source; benchmarks/plan_memory.py compares the sums with real runs (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mirage_dist.kernels.logprob import WORKSPACE_MB
from mirage_dist.train.optimizers.whole import owners

FP32 = 4  # bytes
WORKSPACE = WORKSPACE_MB["cuda"] << 20
# Bytes of an element in NF4 with quantised constants: a half, one byte for 64 of them, and float32 for 256 of these
# (Dettmers et al., 2023, section 3).
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# DeepSpeed's defaults for what its JSON leaves out, in elements.
BUCKETS = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "sub_group_size": 1e9,
    "allgather_bucket_size": 5e8,
}


@dataclass(frozen=True)
class Place:
    """Bytes of something on the device, in host memory, and on NVMe disks of the node."""

    device: int = 0
    host: int = 0
    nvme: int = 0

    def __add__(self, other: Place) -> Place:
        return Place(self.device + other.device, self.host + other.host, self.nvme + other.nvme)


def state_elements(groups: Sequence[Sequence[int]], stage: int, ranks: int) -> list[int]:
    """Trained elements whose master copy each rank holds, without padding.

    groups: the sizes of the parameters of each parameter group. Stage 3 cuts every parameter into equal parts, stage 2
    one buffer of all parameters of a group.
    """
    held = [0] * ranks
    for sizes in groups:
        # A buffer is a multiple of two elements a rank, for the sake of NCCL.
        buffer = [(sum(sizes), 2 * -(-sum(sizes) // (2 * ranks)))]
        pieces = [(size, -(-size // ranks)) for size in sizes] if stage == 3 else buffer
        for rank in range(ranks):
            held[rank] += sum(_part(size, part, rank) for size, part in pieces)
    return held


def largest_share(groups: Sequence[Sequence[int]], stage: int, ranks: int) -> int:
    """The first of `state_elements`, which no rank's exceeds; without a loop over ranks."""
    if stage == 3:
        return sum(-(-size // ranks) for sizes in groups for size in sizes)
    return sum(min(sum(sizes), 2 * -(-sum(sizes) // (2 * ranks))) for sizes in groups)


def _part(size: int, part: int, rank: int) -> int:
    return max(0, min(part, size - part * rank))


def weights(sizes: Sequence[int], itemsize: int, zero: Mapping[str, Any], ranks: int, quantized: int = 0) -> Place:
    """All parameters, trained or not: stage 2 holds them whole, stage 3 a part of each (see `gathered`).

    quantized: elements among them that are in 4 bits, whole on every rank.
    """
    if zero["stage"] != 3:
        return Place((sum(sizes) - quantized) * itemsize + int(quantized * NF4))
    return _offloaded(Place(sum(-(-size // ranks) for size in sizes) * itemsize), zero, "offload_param")


def gathered(sizes: Sequence[int], itemsize: int, zero: Mapping[str, Any], ranks: int, largest: int) -> Place:
    """Whole parameters of stage 3: small ones, those of the module that runs, and what is fetched ahead of it.

    DeepSpeed's trace ends with the forward pass, so that a module's weights are released after it, and gathered again
    for the backward pass. A single rank uses its own part, which is whole, unless that is in host memory. largest:
    elements of the largest module.
    """
    if zero["stage"] != 3 or (ranks == 1 and place_of(zero, "offload_param") == "none"):
        return Place()
    small = sum(size for size in sizes if size <= bucket(zero, "stage3_param_persistence_threshold"))
    live = largest + bucket(zero, "stage3_prefetch_bucket_size")
    return Place(min(sum(sizes), small + live) * itemsize)


def secondary(sizes: Sequence[int], itemsize: int, partition: int) -> Place:
    """hpZ's second copy of the weights, cut among the ranks of a node (Wang et al., 2023, ZeRO++)."""
    return Place(sum(-(-size // partition) for size in sizes) * itemsize if partition > 1 else 0)


def gradients(
    groups: Sequence[Sequence[int]],
    zero: Mapping[str, Any],
    ranks: int,
    itemsize: int = FP32,
    accumulates: bool = False,
) -> Place:
    """This rank's part of the gradient; groups: see `state_elements`.

    It is in float32, whatever the model's dtype (`grad_accum_dtype`). Only stage 2 of a float32 model has it twice
    where micro-batches accumulate: the sum, and what the next one adds.
    """
    own = largest_share(groups, zero["stage"], ranks)
    twice = accumulates and itemsize == FP32 and zero["stage"] != 3
    offloaded = place_of(zero, "offload_optimizer") != "none"
    return _offloaded(Place(own * FP32 * (2 if twice and not offloaded else 1)), zero, "offload_optimizer")


def optimizer(
    groups: Sequence[Sequence[int]], states: Sequence[int], elementwise: bool, zero: Mapping[str, Any], ranks: int
) -> Place:
    """Master copy and optimizer state of the rank that has most (see `optimizer_bytes`)."""
    if elementwise:  # no rank has more elements than the first, and each element as many bytes
        elements = largest_share(groups, zero["stage"], ranks)
        most = elements * FP32 + elements * sum(states) // sum(map(sum, groups))
    else:
        most = max(optimizer_bytes(groups, states, elementwise, zero["stage"], ranks))
    return _offloaded(Place(most), zero, "offload_optimizer")


def optimizer_bytes(
    groups: Sequence[Sequence[int]], states: Sequence[int], elementwise: bool, stage: int, ranks: int
) -> list[int]:
    """Bytes of each rank's part of the master copy and the optimizer state, without padding.

    groups: see `state_elements`. states: bytes of the state of each parameter, in the order of `groups`. The state of
    an elementwise optimizer is cut as the parameters are, that of another is whole, on the rank that `owners` names.
    """
    elements = state_elements(groups, stage, ranks)
    sizes = [size for group in groups for size in group]
    if elementwise:  # every element has as many bytes of state as any other
        return [count * FP32 + count * sum(states) // sum(sizes) for count in elements]
    held = [count * FP32 for count in elements]
    for owner, size in zip(owners(sizes, ranks), states, strict=True):
        held[owner] += size
    return held


def exchange(groups: Sequence[Sequence[int]], stage: int, ranks: int) -> Place:
    """Buffers of an update of whole parameters (see `optimizers.whole`) on the rank that has most.

    These are values and gradients of a group's own parameters, received and assembled, beside those that are sent.
    """
    chosen, most, end = owners([size for group in groups for size in group], ranks), 0, 0
    for group in groups:
        updated = [0] * ranks
        for owner, size in zip(chosen[end : end + len(group)], group, strict=True):
            updated[owner] += size
        end += len(group)
        most = max(most, *(4 * u + 2 * s for u, s in zip(updated, state_elements([group], stage, ranks), strict=True)))
    return Place(most * FP32)


def update(groups: Sequence[Sequence[int]], zero: Mapping[str, Any], ranks: int, itemsize: int) -> Place:
    """What an update holds beside the states: the gradient once more, flat and in float32.

    Stage 3 updates `sub_group_size` elements at a time, stage 2 one parameter group; of a 16-bit model stage 2 has it
    flat already. Fused AdamW makes no further copy.
    """
    if place_of(zero, "offload_optimizer") != "none":
        return Place()  # the host's gradient is flat already
    if zero["stage"] == 3:
        own = largest_share(groups, 3, ranks)
        return Place(min(own, max(bucket(zero, "sub_group_size"), 1)) * FP32)
    return Place(max(largest_share([group], 2, ranks) for group in groups) * FP32 if itemsize == FP32 else 0)


def buckets(itemsize: int, zero: Mapping[str, Any]) -> Place:
    """Buffers in which gradients are reduced: a second one where that overlaps with backward (stage 2)."""
    number = 2 if zero["stage"] == 2 and zero.get("overlap_comm") else 1
    return Place(number * bucket(zero, "reduce_bucket_size") * itemsize)


def reduction(
    size: int, itemsize: int, zero: Mapping[str, Any], ranks: int, alone: bool = False, on_cpu: bool = False
) -> Place:
    """What reducing `size` elements of gradients takes beside the buckets.

    Stage 3 copies them into the order of the ranks, and this rank's part into float32; stage 2 copies them where
    several ranks have parts, and into float32. alone: one parameter that is larger than a bucket, whose gradient is
    beside it. on_cpu: pages of stage 2's part of the gradient count as they are written, which is after the copies.
    """
    whole = size if alone else 0
    if zero["stage"] == 3:
        own = -(-size // ranks) * FP32 if itemsize != FP32 else 0
        return Place((whole + size) * itemsize + own)
    copies = (size if ranks > 1 else 0) * itemsize + (size * FP32 if itemsize != FP32 else 0)
    return Place(whole * itemsize + (max(copies, size * FP32) if on_cpu else copies))


def backward(text: Any, tokens: int, itemsize: int) -> int:
    """Estimated bytes of the gradients within a layer while its backward pass runs: three of the feed-forward size."""
    return 3 * tokens * feed_forward(text) * itemsize


def bucket(zero: Mapping[str, Any], name: str) -> int:
    """Elements of a size that the JSON gives, or DeepSpeed's own."""
    return int(zero.get(name, BUCKETS[name]))


def place_of(zero: Mapping[str, Any], key: str) -> str:
    """Where `offload_optimizer` or `offload_param` puts something: none (the GPU), cpu or nvme."""
    return (zero.get(key) or {}).get("device", "none")


def _offloaded(place: Place, zero: Mapping[str, Any], key: str) -> Place:
    device = place_of(zero, key)
    if device == "none":
        return place
    return Place(host=place.device) if device == "cpu" else Place(nvme=place.device)


@dataclass(frozen=True)
class Adapters:
    """Adapters of one layer: the inputs and the ranks of its adapted linear layers, summed. mask: bytes of an element
    of dropout's mask; 0 without dropout.
    """

    inputs: int
    ranks: int
    mask: int


def activations(
    text: Any,
    tokens: int,
    width: int,
    depth: int,
    itemsize: int,
    eager: bool,
    checkpointing: bool,
    adapters: Adapters | None = None,
) -> int:
    """Estimated bytes that a decoder of `depth` layers keeps for the backward pass.

    text: the decoder's configuration. tokens: rows times `width`, padding included. For each token a layer like Llama's
    keeps ten vectors of the hidden size and four of the feed-forward size in the model's dtype, and one hidden vector
    in float32 for its norms; eager attention also keeps its probabilities, in 16-bit dtypes a second time in float32.
    A frozen layer with adapters keeps no input of its own matrices and norms (five hidden vectors, one of the
    feed-forward size), but those of the adapters: with dropout one for each adapted matrix, and its mask.
    With checkpointing each layer keeps its input only, and one layer at a time everything. The vision tower is assumed
    to be frozen and to keep nothing.
    """
    hidden, wide = 10, 4
    if adapters is not None:
        hidden, wide = (5, 3) if adapters.mask else (8, 4)
    layer = itemsize * (hidden * text.hidden_size + wide * feed_forward(text)) + FP32 * text.hidden_size
    if adapters is not None:
        layer += itemsize * adapters.ranks + (adapters.inputs * (itemsize + adapters.mask) if adapters.mask else 0)
    if eager:
        heads = getattr(text, "num_attention_heads", 0)  # models without attention have none
        layer += width * heads * (FP32 if itemsize == FP32 else itemsize + FP32)
    inputs = itemsize * text.hidden_size
    return tokens * (depth * inputs + layer if checkpointing else depth * layer)


def around(text: Any, tokens: int, pictures: int, connector: int, itemsize: int) -> int:
    """Estimated bytes kept outside the decoder's layers: the last norm's input and output, and the connector's layers.

    pictures: tokens of pictures. connector: see `facts.Facts`.
    """
    return tokens * text.hidden_size * (itemsize + FP32) + pictures * connector * itemsize


def feed_forward(text: Any) -> int:
    """The number of feed-forward features that a token goes through in the widest layer.

    With experts these are the features of those that a token is sent to and of the shared ones.
    """
    names = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok")
    dense, expert, shared, chosen = (getattr(text, name, None) or 0 for name in names)
    if isinstance(dense, (list, tuple)):  # one value a layer
        dense = max(dense)
    if chosen and not expert:  # Mixtral's experts have the size that dense models' layers have
        dense, expert = 0, dense
    shared = shared or expert * (getattr(text, "n_shared_experts", None) or 0)
    return max(dense, chosen * expert + shared) or 4 * text.hidden_size


def loss_head(
    rows: int, vocabulary: int, hidden: int, itemsize: int, kl: bool, trains: bool, workspace: int = WORKSPACE
) -> int:
    """Bytes of the loss head at its peak, for `rows` response rows.

    These are logits within the workspace, the gradient of the hidden rows, and that of the weight where it trains. KL
    keeps three whole float32 matrices of logits.
    """
    logits = rows * vocabulary * FP32
    held = 3 * logits if kl else min(logits, workspace)
    return held + rows * hidden * FP32 + (vocabulary * hidden * itemsize if trains else 0)
