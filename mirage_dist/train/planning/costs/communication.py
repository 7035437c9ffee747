"""What the ranks exchange in a step, and how long it takes on given links.

A ring moves (n − 1)/n of the payload through each rank in an all-gather or a reduce-scatter, twice that in an
all-reduce. ZeRO-3 gathers weights for the forward and again for the backward pass of every micro-batch, and
reduce-scatters gradients; ZeRO-2 all-reduces gradients (DeepSpeed 0.19.8 does so by default although
each rank keeps a part only) and gathers updated weights once a step. With hpZ (see `planning.sharding`) only a step's
first forward gathers from all ranks, and frozen weights never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mirage_dist.train.planning.costs import memory
from mirage_dist.train.planning.costs.facts import Facts
from mirage_dist.train.planning.costs.hardware import Hardware
from mirage_dist.train.planning.setting import Setting


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step. payload: bytes of the whole tensors, of all calls. calls: their number.

    ranks: that take part together. overlaps: whether it runs beside forward and backward.
    """

    name: str
    kind: str  # all_gather, reduce_scatter or all_reduce
    payload: int
    calls: int
    ranks: int
    overlaps: bool

    @property
    def volume(self) -> int:
        """Bytes that each rank sends, and receives."""
        moved = self.payload * (self.ranks - 1) // self.ranks
        return 2 * moved if self.kind == "all_reduce" else moved

    def seconds(self, on: Hardware, gpus: int) -> float:
        if self.ranks < 2:
            return 0.0
        hops = 2 if self.kind == "all_reduce" else 1
        return self.volume / on.link(self.ranks, gpus) + self.calls * hops * on.latency(self.ranks, gpus)


def transfers(facts: Facts, at: Setting) -> list[Transfer]:
    """All collectives of one optimizer step."""
    zero, item, times = at.zero, facts.item, at.accumulation
    trained = facts.trained.elements
    bucket = memory.bucket(zero, "reduce_bucket_size")

    def made(name: str, kind: str, elements: int, each: int, repeat: int, ranks: int, overlaps: bool) -> Transfer:
        calls = repeat * -(-elements // max(1, each)) if elements else 0
        return Transfer(name, kind, repeat * elements * item, calls, ranks, overlaps)

    overlap = bool(zero.get("overlap_comm"))
    if zero["stage"] != 3:
        reduced = made("gradients", "all_reduce", trained, bucket, times, at.ranks, overlap)
        each = memory.bucket(zero, "allgather_bucket_size")
        return [reduced, made("updated weights", "all_gather", trained, each, 1, at.ranks, False)]
    threshold = memory.bucket(zero, "stage3_param_persistence_threshold")
    prefetch = memory.bucket(zero, "stage3_prefetch_bucket_size")
    large = [size for size in facts.sizes if size > threshold]
    again = min(sum(large), facts.differentiable)
    collectives = []
    if at.partition > 1:  # a step's first forward gathers what trains from all ranks, all else stays in the group
        first = min(trained, sum(large))
        rest = times * (sum(large) + again) - first
        collectives.append(made("weights, first forward", "all_gather", first, prefetch, 1, at.ranks, True))
        collectives.append(made("weights, in the node", "all_gather", rest, prefetch, 1, at.partition, True))
    else:
        collectives.append(made("weights, forward", "all_gather", sum(large), prefetch, times, at.ranks, True))
        collectives.append(made("weights, backward", "all_gather", again, prefetch, times, at.ranks, True))
    collectives += [
        made("gradients", "reduce_scatter", trained, bucket, times, at.ranks, overlap),
        made("small weights", "all_gather", _small(facts.sizes, threshold), bucket, 1, at.ranks, False),
    ]
    near = at.partition if at.partition > 1 else at.ranks  # frozen weights are gathered within a group of hpZ
    if at.reference == "engine":
        other = [size for size in facts.reference if size > threshold]
        collectives.append(made("weights, reference", "all_gather", sum(other), prefetch, times, near, True))
    if at.reference == "adapters_off":
        collectives.append(made("weights, reference", "all_gather", sum(large), prefetch, times, near, True))
    return [one for one in collectives if one.payload]


def _small(sizes: Sequence[int], threshold: int) -> int:
    return sum(size for size in sizes if size <= threshold)
