"""The order of samples: which ones a step sees, as a pure function of (seed, stream, step).

Position p of a stream of n samples is number p mod n of epoch p // n's permutation. Step s takes positions
s·G … (s+1)·G - 1 for a global batch of G, so a batch may span two epochs, nothing is dropped, every sample comes
once an epoch, and a resumed run needs no more than its step. World size and micro-batch only cut the batch up.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mirage_dist.schema import ConfigError

Indices = NDArray[np.int64]


def batch(seed: int, stream: str, size: int, step: int, global_batch: int) -> Indices:
    """Indices of the samples of one step: (global_batch,), each in [0, size).

    Raises ConfigError for an empty stream.
    """
    if size < 1:
        raise ConfigError(f"data.streams.{stream}: no sample")
    positions = np.arange(step * global_batch, (step + 1) * global_batch)
    return np.array([_permutation(seed, stream, size, int(p) // size)[p % size] for p in positions], dtype=np.int64)


def shard(indices: Indices, rank: int, world_size: int, micro_batch: int) -> list[Indices]:
    """One rank's micro-batches of a step: arrays of micro_batch indices, in order.

    The ranks' rows together are `indices` for every world size. Raises ConfigError when they do not come out even.
    """
    if len(indices) % (world_size * micro_batch):
        raise ConfigError(
            f"train.global_batch={len(indices)}: must be a multiple of micro_batch × world size "
            f"({micro_batch} × {world_size})"
        )
    own = indices[rank::world_size]
    return [own[i : i + micro_batch] for i in range(0, len(own), micro_batch)]


def state(size: int, step: int, global_batch: int) -> dict[str, int]:
    """Where a stream stands before `step`, for a manifest: {"epoch", "cursor"}, the cursor within the epoch."""
    epoch, cursor = divmod(step * global_batch, size)
    return {"epoch": epoch, "cursor": cursor}


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from named parts such as (seed, step, sample id); equal on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@lru_cache(maxsize=16)  # a batch touches two epochs at most unless the stream is smaller than it
def _permutation(seed: int, stream: str, size: int, epoch: int) -> Indices:
    order = np.random.default_rng(derived_seed(seed, stream, epoch)).permutation(size)
    order.setflags(write=False)
    return order
