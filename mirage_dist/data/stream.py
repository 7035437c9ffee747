"""The order of samples: which samples a step takes, a pure function of (seed, stream, step), or of their lengths too.

Position p of a stream of n samples is number p mod n of epoch p // n's permutation. Step s takes positions
s·G … (s+1)·G - 1 for a global batch of G, so a batch may span two epochs, nothing is dropped, every sample comes
once an epoch, and a resumed run needs only its step. World size and micro-batch only divide the batch.

Grouped by modality, the samples of an epoch change places so that a step has samples with a picture only, or without
one only; the order then depends on G as well. Grouped by length, they change places within a window of `WINDOW` steps,
so that a step's samples are of similar length. Everything else holds.

With a `Draw`, an epoch of n positions has some samples several times and others not at all; see there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mirage_dist.schema import ConfigError

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]
MIXED, PICTURED, TEXT = 0, 1, 2  # kinds of step
WINDOW = 8  # steps whose samples are sorted together: few enough that every epoch has different batches


@dataclass(frozen=True, eq=False)
class Draw:
    """How often an epoch has the samples of each class.

    classes: (n,), the class of each sample, from 0. counts: (k,), how many positions of an epoch each class has; at
    least one, n in all. The positions of a class are filled by its own passes: epoch e takes numbers e·m … (e+1)·m - 1
    of its samples' permutations one after the other. At the end of any epoch the samples of a class have been drawn
    equally often, or once more.
    """

    classes: Indices
    counts: Indices

    def epoch(self, seed: int, stream: str, epoch: int) -> Indices:
        """The samples (n,) of an epoch, class after class."""
        return _drawn(self, seed, stream, epoch)


def batch(
    seed: int,
    stream: str,
    size: int,
    step: int,
    global_batch: int,
    pictured: Flags | None = None,
    draw: Draw | None = None,
) -> Indices:
    """Indices (global_batch,) of the samples of one step, each in [0, size).

    size: samples in the stream. pictured: (size,), whether each has a picture, to group by modality: in an epoch as
    many steps as possible have samples of one modality, drawn as in the plain order, and what is left of both is in
    the others. Raises ConfigError for an empty stream.
    """
    positions = np.arange(step * global_batch, (step + 1) * global_batch)
    return _samples(seed, stream, size, positions, global_batch, pictured, draw)[0]


def grouped(
    seed: int,
    stream: str,
    lengths: Indices,
    step: int,
    global_batch: int,
    pictured: Flags | None = None,
    draw: Draw | None = None,
) -> Indices:
    """`batch` with the step's samples of similar length, the longest first.

    lengths: (n,), tokens of every sample in the stream. The steps of a window are put in an order drawn by (seed, step)
    alone: the same order for all streams, since the rows of all streams are padded together. Samples change places
    with those of the same modality only, if steps are grouped by it. Raises ConfigError for an empty stream.
    """
    first = step - step % WINDOW
    positions = np.arange(first * global_batch, (first + WINDOW) * global_batch)
    samples, kinds = _samples(seed, stream, len(lengths), positions, global_batch, pictured, draw)
    epochs, steps = positions // len(lengths), positions // global_batch
    drawn = np.array([derived_seed(seed, "length", number) for number in range(first, first + WINDOW)])
    # Both orders keep the positions of an epoch and kind in one block, so that no sample leaves its epoch or modality.
    by_step = np.lexsort((drawn[steps - first], kinds, epochs))
    by_length = np.lexsort((lengths[samples], kinds, epochs))
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


def _samples(
    seed: int,
    stream: str,
    size: int,
    positions: Indices,
    global_batch: int,
    pictured: Flags | None,
    draw: Draw | None,
) -> tuple[Indices, Indices]:
    """The samples at these positions, and of what kind the step of each is: `PICTURED`, `TEXT` or `MIXED`."""
    if size < 1:
        raise ConfigError(f"data.streams.{stream}: no sample")
    samples, kinds = np.empty_like(positions), np.full_like(positions, MIXED)
    epochs, places = positions // size, positions % size
    for epoch in map(int, np.unique(epochs)):
        own = epochs == epoch
        drawn = None if draw is None else draw.epoch(seed, stream, epoch)
        order = _permutation(seed, stream, size, epoch)
        if pictured is not None:
            flags = pictured if drawn is None else pictured[drawn]
            order, kind = _by_modality(seed, stream, epoch, global_batch, flags.tobytes())
            kinds[own] = kind[places[own]]
        chosen = order[places[own]]
        samples[own] = chosen if drawn is None else drawn[chosen]
    return samples, kinds


@lru_cache(maxsize=16)
def _drawn(draw: Draw, seed: int, stream: str, epoch: int) -> Indices:
    parts = []
    for number, count in enumerate(draw.counts.tolist()):
        members = np.flatnonzero(draw.classes == number)
        positions = np.arange(epoch * count, (epoch + 1) * count)
        passes, places = positions // len(members), positions % len(members)
        for turn in range(int(passes[0]), int(passes[-1]) + 1):
            order = np.random.default_rng(derived_seed(seed, stream, "class", number, turn)).permutation(len(members))
            parts.append(members[order[places[passes == turn]]])
    drawn = np.concatenate(parts)
    drawn.setflags(write=False)
    return drawn


@lru_cache(maxsize=16)  # a batch touches two epochs at most unless the stream is smaller than it
def _permutation(seed: int, stream: str, size: int, epoch: int) -> Indices:
    order = np.random.default_rng(derived_seed(seed, stream, epoch)).permutation(size)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=16)
def _by_modality(seed: int, stream: str, epoch: int, global_batch: int, flags: bytes) -> tuple[Indices, Indices]:
    """An epoch's permutation with whole steps of one modality, and the kind of step of each position.

    flags: bytes of `batch`'s `pictured`; of samples of one modality the order is the plain one. The steps that an epoch
    shares with its neighbours are mixed.
    """
    pictured = np.frombuffer(flags, dtype=np.bool_)
    size = len(pictured)
    order, kinds = _permutation(seed, stream, size, epoch), np.full(size, MIXED)
    shown, text = order[pictured[order]], order[~pictured[order]]
    if not (len(shown) and len(text)):
        return order, kinds
    first = min(size, -epoch * size % global_batch)  # positions before the first step that is the epoch's alone
    whole = (size - first) // global_batch
    of_shown, of_text = len(shown) // global_batch, len(text) // global_batch
    if of_shown + of_text > whole:  # by one at most: what two modalities and two shared steps leave is below 2 steps
        of_shown, of_text = (of_shown - 1, of_text) if of_shown >= of_text else (of_shown, of_text - 1)
    steps = np.full(whole, MIXED)
    steps[:of_shown], steps[of_shown : of_shown + of_text] = PICTURED, TEXT
    np.random.default_rng(derived_seed(seed, stream, epoch, "modality")).shuffle(steps)
    kinds[first : first + whole * global_batch] = np.repeat(steps, global_batch)
    alone = np.zeros(size, dtype=np.bool_)  # by sample: whether it is in a step of its modality
    alone[shown[: of_shown * global_batch]] = alone[text[: of_text * global_batch]] = True
    moved = np.empty_like(order)
    moved[kinds == PICTURED], moved[kinds == TEXT] = shown[: of_shown * global_batch], text[: of_text * global_batch]
    moved[kinds == MIXED] = order[~alone[order]]
    for made in (moved, kinds):
        made.setflags(write=False)
    return moved, kinds
