"""The order of samples: which samples a step takes, a pure function of (seed, stream, step), or of their lengths too.

Position p of a stream of n samples is number p mod n of epoch p // n's permutation. Step s takes positions
s·G … (s+1)·G - 1 for a global batch of G, so a batch may span two epochs, nothing is dropped, every sample comes
once an epoch, and a resumed run needs only its step. World size and micro-batch only divide the batch.

Grouped by length, the samples of an epoch change places within a window of `WINDOW` steps, so that a step's samples
are of similar length; everything else holds.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mirage_dist.schema import ConfigError

Indices = NDArray[np.int64]
WINDOW = 8  # steps whose samples are sorted together: few enough that every epoch has different batches


def batch(seed: int, stream: str, size: int, step: int, global_batch: int) -> Indices:
    """Indices (global_batch,) of the samples of one step, each in [0, size).

    size: samples in the stream. Raises ConfigError for an empty stream.
    """
    return _samples(seed, stream, size, np.arange(step * global_batch, (step + 1) * global_batch))


def grouped(seed: int, stream: str, lengths: Indices, step: int, global_batch: int) -> Indices:
    """`batch` with the step's samples of similar length, the longest first.

    lengths: (n,), tokens of every sample in the stream. The steps of a window are put in an order drawn by (seed, step)
    alone: the same order for all streams, since the rows of all streams are padded together. Raises ConfigError for an
    empty stream.
    """
    first = step - step % WINDOW
    positions = np.arange(first * global_batch, (first + WINDOW) * global_batch)
    samples = _samples(seed, stream, len(lengths), positions)
    epochs, steps = positions // len(lengths), positions // global_batch
    drawn = np.array([derived_seed(seed, "length", number) for number in range(first, first + WINDOW)])
    # Both orders keep each epoch's positions in one block, so that no sample leaves its epoch.
    by_step, by_length = np.lexsort((drawn[steps - first], epochs)), np.lexsort((lengths[samples], epochs))
    moved = np.empty_like(samples)
    moved[by_step] = samples[by_length]
    own = moved[steps == step]
    return own[np.argsort(-lengths[own], kind="stable")]


def shard(indices: Indices, rank: int, world_size: int, micro_batch: int) -> list[Indices]:
    """One rank's micro-batches of a step: arrays (micro_batch,) of indices, in order.

    indices: (global_batch,), from `batch` or `grouped`. They are divided into consecutive micro-batches, which the
    ranks get in turn: the micro-batches are the same for every world size, and if `indices` are sorted by length all
    ranks work on rows of similar length at the same time. Raises ConfigError when the batch does not divide evenly.
    """
    if len(indices) % (world_size * micro_batch):
        raise ConfigError(
            f"train.global_batch={len(indices)}: must be a multiple of micro_batch × world size "
            f"({micro_batch} × {world_size})"
        )
    return list(indices.reshape(-1, micro_batch)[rank::world_size])


def state(size: int, step: int, global_batch: int) -> dict[str, int]:
    """A stream's position before `step`, for a manifest: {"epoch", "cursor"}; the cursor is a sample of the epoch."""
    epoch, cursor = divmod(step * global_batch, size)
    return {"epoch": epoch, "cursor": cursor}


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from named parts such as (seed, step, sample id); equal on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _samples(seed: int, stream: str, size: int, positions: Indices) -> Indices:
    if size < 1:
        raise ConfigError(f"data.streams.{stream}: no sample")
    return np.array([_permutation(seed, stream, size, int(p) // size)[p % size] for p in positions], dtype=np.int64)


@lru_cache(maxsize=16)  # a batch touches two epochs at most unless the stream is smaller than it
def _permutation(seed: int, stream: str, size: int, epoch: int) -> Indices:
    order = np.random.default_rng(derived_seed(seed, stream, epoch)).permutation(size)
    order.setflags(write=False)
    return order
