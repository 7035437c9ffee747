"""The data of a step: samples of every stream, collated, with the counts that normalise the loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from mirage_dist.data import pictures, stream
from mirage_dist.data.encoding.collate import IGNORE, Batch, Encoder
from mirage_dist.data.encoding.lengths import measured, unwritable
from mirage_dist.data.sample import Sample, stream_digest
from mirage_dist.data.sources import Source
from mirage_dist.model import load
from mirage_dist.model.reference import SampleKey
from mirage_dist.objectives.base import Needs, Positions
from mirage_dist.ranks import Group, everyones
from mirage_dist.schema import ConfigError, TrainConfig, TrainRecipe
from mirage_dist.schema.limits import STEPS
from mirage_dist.train.caches.samples import Digests, Table
from mirage_dist.train.planning import openers
from mirage_dist.train.planning.openers import Balance
from mirage_dist.train.planning.streams import check_no_picture, check_pairs
from mirage_dist.train.prefetch import made

CHUNK = 1024  # samples whose lengths a worker measures at once


@dataclass(frozen=True)
class MicroBatch:
    """Samples of all streams in one batch, stream after stream.

    rows: stream -> its slice of the samples. samples: (stream, index in the stream) of each. tokens: stream -> number
    of its response tokens. mask_BS: 1.0 at the positions that count for an activation. counts: name -> this
    micro-batch's share of a count that a term may name (see `objectives.base.Term`), known on the host before anything
    is on the device. kl_index_M: flat positions at which `Needs.kl` is computed, stream after stream; None for none.
    kl_sizes: stream -> number of them.
    """

    batch: Batch
    rows: Mapping[str, slice]
    samples: list[SampleKey]
    tokens: Mapping[str, int]
    mask_BS: Tensor
    counts: Mapping[str, float]
    kl_index_M: Tensor | None = None
    kl_sizes: Mapping[str, int] = field(default_factory=dict)

    def index(self, streams: Sequence[str]) -> Tensor | None:
        """Flat positions (N,) of the hidden rows that predict these streams' responses, in batch order.

        None when the batch holds none of these streams.
        """
        return self._chosen(self.batch.index_N, streams)

    def labels(self, streams: Sequence[str]) -> Tensor | None:
        """The tokens (N,) that the rows of `index` predict."""
        return self._chosen(self.batch.labels_N, streams)

    def samples_of(self, streams: Sequence[str]) -> list[SampleKey]:
        """The samples of these streams, in batch order."""
        return [sample for sample in self.samples if sample[0] in streams]

    def span(self, streams: Sequence[str]) -> slice | None:
        """The rows from the first to the last of these streams; None for all rows, and in a packed batch."""
        slices = [rows for name, rows in self.rows.items() if name in streams]
        if not slices or self.batch.edges is not None:
            return None
        span = slice(slices[0].start, slices[-1].stop)
        return None if span == slice(0, len(self.samples)) else span

    def segment(self, stream: str) -> Tensor | None:
        """The sequence of the stream (from 0) that each of its response tokens belongs to: (N,)."""
        segment_N = self._chosen(self.batch.segment_N, [stream])
        return None if segment_N is None else segment_N - self.rows[stream].start

    def sequences(self, stream: str) -> int:
        """Number of the stream's sequences in this batch."""
        return self.rows[stream].stop - self.rows[stream].start

    def of_stream(self, stream: str, values_BS: Tensor, first: int = 0) -> Tensor:
        """The stream's part of a tensor (B, S, …): its rows, or its stretch of the one packed row.

        first: the row of the batch that `values_BS` begins with.
        """
        rows, edges = self.rows[stream], self.batch.edges
        if edges is None:
            return values_BS[rows.start - first : rows.stop - first]
        return values_BS[:, edges[rows.start] : edges[rows.stop]]

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on the device; the host does not wait for the copy when the batch is in pinned memory."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """A copy in pinned memory."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        def mapped(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        tensors = {name: mapped(value) for name, value in vars(self.batch).items()}
        batch = Batch(**{**tensors, "inputs": tree_map(mapped, self.batch.inputs)})
        return replace(self, batch=batch, mask_BS=function(self.mask_BS), kl_index_M=mapped(self.kl_index_M))

    def _chosen(self, values_N: Tensor, streams: Sequence[str]) -> Tensor | None:
        # Sizes are known on the host, so nothing here waits for the device.
        parts = zip(self.rows, values_N.split(list(self.tokens.values())), strict=True)
        chosen = [part for name, part in parts if name in streams]
        return torch.cat(chosen) if chosen else None


def encoder_of(recipe: TrainRecipe, processor: Any) -> Encoder:
    """The encoder of a resolved recipe (see `Feed`). Raises ConfigError as `Encoder` does."""
    data = recipe.data
    return Encoder(
        processor,
        data.max_length,
        data.on_long,
        data.image_aspect,
        data.system_prompt,
        data.packing is True,
        load.picture_token(recipe.model),
        data.template_options,
    )


class Feed:
    """Micro-batches of each step for this rank; a pure function of the recipe, the rank and the step.

    recipe: resolved (see `planning.check.check_batches`); an `auto` that is left in `data.packing` pads.
    streams: as read, or the table of a start that checked them.
    samples: stream -> its samples. lengths: stream -> tokens (n,) of each sample's row after truncation, known after
    `check_lengths`, or from the table. measured: stream -> (2, n), tokens of each row before truncation and of its
    responses after it. Raises ConfigError when paired streams do not match, or a text-only model's have a picture.
    """

    def __init__(
        self, recipe: TrainRecipe, needs: Needs, streams: Mapping[str, Source] | Table, processor: Any
    ) -> None:
        self.recipe, self.needs = recipe, needs
        self.samples: dict[str, Sequence[Sample]]
        self.table = streams if isinstance(streams, Table) else None
        self._pictures: dict[str, str] = {}  # path -> SHA-256 of each picture that was checked
        if isinstance(streams, Table):
            self.samples = {name: streams.rows[name] for name in needs.streams}
        else:
            self.samples = {name: streams[name].samples for name in needs.streams}
            self._pictures = {p: digest for name in needs.streams for p, digest in streams[name].pictures.items()}
        self.lengths: dict[str, stream.Indices] = {}
        self.measured: Mapping[str, NDArray[np.int32]] = {}
        self.unwritable: list[str] = []  # warnings of `check_lengths`
        self.pictured: dict[str, stream.Flags] = {}
        if recipe.data.group_by_modality:
            self.pictured = {name: self.shown(name) for name in self.samples}
        self.encoder = encoder_of(recipe, processor)
        if isinstance(streams, Table):
            if streams.lengths:
                self._take_lengths({name: streams.lengths[name] for name in needs.streams})
            return
        check_pairs(self.samples, needs.paired)
        if self.encoder.text_only:
            check_no_picture(self.samples, recipe.model.path)

    def shown(self, name: str) -> stream.Flags:
        """Whether each sample of a stream has a picture: (n,)."""
        if self.table is not None:
            return self.table.rows[name].pictured()
        return np.array([sample.image is not None for sample in self.samples[name]])

    def picture_digests(self, names: Sequence[str], group: Group) -> Mapping[str, str]:
        """Path -> SHA-256 of each picture of these streams, or of more; ranks share the reading of those not checked.

        Every rank calls this. Raises OSError.
        """
        if self.table is not None:
            return Digests(self.table.pictures)
        paths = (sample.image for name in names for sample in self.samples[name])
        return pictures.digests(paths, group.rank, group.size, lambda own: everyones(group, own), self._pictures)

    def stream_digests(self, names: Sequence[str], group: Group) -> dict[str, str]:
        """`stream_digest` of each of these streams, with each picture named by its SHA-256. Every rank calls this."""
        if self.table is not None:
            return {name: self.table.records()[name]["sha256"] for name in names}
        digests = self.picture_digests(names, group)
        return {
            name: stream_digest(replace(s, image=s.image and digests[s.image]) for s in self.samples[name])
            for name in names
        }

    def check_lengths(self, group: Group) -> int:
        """The number of samples that will be cut. Each rank measures its share; every rank then knows all lengths.

        Nothing is measured where a table has the lengths. `unwritable` then says of which streams the tokenizer cannot
        write every answer. Every rank raises ConfigError when any has a sample that does not fit, or that the chat
        template rewrites.
        """
        if not self.measured:
            whole = self._all_measured(group)
            self._take_lengths({name: rows[:2] for name, rows in whole.items()})
            tokens = self.encoder.tokens
            self.unwritable = [
                w for name, own in self.samples.items() for w in unwritable(tokens, name, own, whole[name][2])
            ]
        return sum(int((rows > self.encoder.max_length).sum()) for rows, _ in self.measured.values())

    def _all_measured(self, group: Group) -> dict[str, NDArray[np.int32]]:
        own, fault = {}, None
        try:
            own = {name: self._measured(name, group) for name in self.samples}
        except ConfigError as error:
            fault = str(error)
        parts = everyones(group, (own, fault))
        for _, fault in parts:
            if fault is not None:
                raise ConfigError(fault)
        whole = {name: np.empty((3, len(samples)), np.int32) for name, samples in self.samples.items()}
        for name, every in whole.items():
            for rank, (lengths, _) in enumerate(parts):
                every[:, rank :: group.size] = lengths[name].T
        return whole

    def _measured(self, name: str, group: Group) -> NDArray[np.int32]:
        """`encoding.lengths.measured` of this rank's share of a stream; by worker processes where it is large."""
        # Threads of the tokenizers do not survive the forks, of these workers or of later ones.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        samples, numbers = self.samples[name], range(group.rank, len(self.samples[name]), group.size)

        def measure(chunk: range) -> NDArray[np.int32]:
            return measured(self.encoder, [samples[number] for number in chunk])

        chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
        # The first one here: what the encoder measures of the processor is then known in every worker.
        parts = [measure(chunk) for chunk in chunks[:1]]
        workers = self.recipe.data.workers if len(chunks) > 2 else 0
        with closing(made(measure, chunks[1:], workers)) as rest:
            parts += [np.asarray(part) for part in rest]
        return np.concatenate(parts) if parts else np.empty((0, 3), np.int32)

    def _take_lengths(self, whole: Mapping[str, NDArray[np.int32]]) -> None:
        """whole: see `measured`."""
        longest = self.encoder.max_length
        self.lengths = {name: np.minimum(rows, longest, dtype=np.int64) for name, (rows, _) in whole.items()}
        self.measured = whole

    @property
    def epoch_stream(self) -> str:
        """The stream that defines an epoch."""
        return self.recipe.train.epoch_stream or self.needs.streams[0]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run (see `steps_of`)."""
        return steps_of(self.recipe.train, len(self.samples[self.epoch_stream]))

    @cached_property
    def balance(self) -> Balance | None:
        """How `data.balance` draws the samples; None in the plain order. Raises ConfigError as `openers.balance`."""
        if self.recipe.data.balance is None:
            return None
        if self.table is not None:
            return openers.balance(openers.read(self.table.folder), self.needs)
        return openers.balance(openers.of(self.samples, self.recipe.data.refusals), self.needs)

    def only(self, rows: Mapping[str, stream.Indices], recipe: TrainRecipe) -> Feed:
        """The feed of these samples alone, each once an epoch, for another resolved recipe of the same data."""
        part = copy(self)
        part.recipe, part.table, part.balance = recipe, None, None
        part.samples = {name: [self.samples[name][int(i)] for i in own] for name, own in rows.items()}
        part.lengths = {name: self.lengths[name][own] for name, own in rows.items()}
        part.pictured = {name: self.pictured[name][own] for name, own in rows.items() if name in self.pictured}
        return part

    def window(self, step: int, group: Group) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        width = self.recipe.train.rows
        parts = {n: stream.shard(self.chosen(n, step), group.rank, group.size, width) for n in self.samples}
        count = len(parts[self.needs.streams[0]])
        return [self.collate({n: part[i] for n, part in parts.items()}) for i in range(count)]

    def windows(self, steps: range, group: Group) -> Generator[list[MicroBatch]]:
        """The windows of these steps, made ahead by `data.workers`; close it after use (see `prefetch.made`)."""
        return made(lambda step: self.window(step, group), steps, self.recipe.data.workers)

    def batches(self, rows: Sequence[Mapping[str, np.ndarray]]) -> Generator[MicroBatch]:
        """`collate` of each, made ahead by `data.workers`; close it after use."""
        return made(self.collate, rows, self.recipe.data.workers)

    def chosen(self, name: str, step: int) -> stream.Indices:
        """Indices of a stream's samples in a step, of all ranks: (global_batch,); equal for paired streams.

        With `data.group_by_length`, call `check_lengths` first.
        """
        seed, batch, paired = self.recipe.seed, self.recipe.train.global_batch, self.needs.paired
        order = paired[0] if name in paired else name  # the stream whose name and lengths decide the order
        pictured = self.pictured.get(name)
        draw = None if self.balance is None else self.balance.draws[order]
        if self.recipe.data.group_by_length:
            same = paired if name in paired else (name,)
            lengths = np.maximum.reduce([self.lengths[other] for other in same])
            return stream.grouped(seed, order, lengths, step, batch, pictured, draw)
        return stream.batch(seed, order, len(self.samples[name]), step, batch, pictured, draw)

    def collate(self, rows: Mapping[str, np.ndarray]) -> MicroBatch:
        """One batch on the CPU of the samples at these indices, by stream."""
        samples = [(name, int(index)) for name, indices in rows.items() for index in indices]
        batch = self.encoder.encode([self.samples[name][index] for name, index in samples])
        slices, start = {}, 0
        for name, indices in rows.items():
            slices[name] = slice(start, start + len(indices))
            start += len(indices)
        sizes = torch.bincount(batch.segment_N, minlength=len(samples))
        tokens = {name: int(sizes[part].sum()) for name, part in slices.items()}
        mask_BS = positions(batch, self.needs.positions)
        real = int(batch.unpadded_BS.sum())
        counts: dict[str, float] = {"cut": batch.cut, "slots": batch.labels_BS.numel(), "input_tokens": real}
        if self.needs.by_micro_batch:  # no other objective may count these
            counts["micro_batches"] = 1
        micro = MicroBatch(batch, slices, samples, tokens, mask_BS, counts)
        for name in slices:
            counts[f"{name}.sequences"] = micro.sequences(name)
            counts[f"{name}.tokens"] = tokens[name]
            counts[f"{name}.positions"] = int(micro.of_stream(name, mask_BS).sum())
            counts[f"{name}.input_tokens"] = int(micro.of_stream(name, batch.unpadded_BS).sum())
        return self._with_kl(micro, counts) if set(slices) & set(self.needs.kl) else micro

    def _with_kl(self, micro: MicroBatch, counts: dict[str, float]) -> MicroBatch:
        """The micro-batch with the positions at which KL is computed, and their counts."""
        streams = [name for name in micro.rows if name in self.needs.kl]
        if self.needs.kl_positions == "response":
            index_M, sizes = micro.index(streams), {name: micro.tokens[name] for name in streams}
        else:
            mask_BS = positions(micro.batch, self.needs.kl_positions).bool()
            place_BS = torch.arange(mask_BS.numel()).view_as(mask_BS)
            parts = {n: micro.of_stream(n, place_BS)[micro.of_stream(n, mask_BS)] for n in streams}
            index_M, sizes = torch.cat(list(parts.values())), {name: len(part) for name, part in parts.items()}
        counts.update({f"{name}.kl_positions": size for name, size in sizes.items()})
        return replace(micro, kl_index_M=index_M, kl_sizes=sizes)

    def every_sample(self, names: tuple[str, ...], group: Group) -> Iterator[dict[str, np.ndarray]]:
        """All samples of these streams, `micro_batch` at a time, split over ranks: stream -> indices, one stream each.

        The last batches may repeat samples, so that all ranks make the same number: ZeRO-3 needs each rank's forward.
        """
        for name in names:
            size, width = len(self.samples[name]), self.recipe.train.rows
            own = np.arange(-(-size // (width * group.size)) * width) * group.size + group.rank
            for start in range(0, len(own), width):
                yield {name: own[start : start + width] % size}

    def counts(self, window: Sequence[MicroBatch]) -> dict[str, float]:
        """This rank's share in a step of every count that a term may name."""
        return {name: sum(micro.counts[name] for micro in window) for name in window[0].counts}


def steps_of(train: TrainConfig, size: int) -> int:
    """Optimizer steps of a run: `max_steps`, or `epochs` passes over the `size` samples of `epoch_stream`.

    Raises ConfigError for more steps than a run or its schedule may have, and for a schedule without any rate.
    """
    steps = train.max_steps or max(1, -(-int(train.epochs * size) // train.global_batch))
    if steps > STEPS.value:
        raise ConfigError(
            f"train.epochs={train.epochs}: with {size} samples that is {steps:,} steps; at most {STEPS}. Lower it, "
            "or give train.max_steps"
        )
    if train.schedule_steps is not None and steps > train.schedule_steps:
        raise ConfigError(
            f"train.schedule_steps={train.schedule_steps}: this run has {steps} steps, and a schedule has at least "
            "as many as its run; raise it, or leave it out"
        )
    if train.warmup_from_zero and train.warmup and steps == 1:
        raise ConfigError(
            "train.warmup_from_zero: the only step of this run would have rate 0; set it to false, or train longer"
        )
    return steps


def positions(batch: Batch, which: Positions) -> Tensor:
    """1.0 at the positions that count for an activation: (B, S) float32."""
    mask = {
        "all": torch.ones_like(batch.labels_BS),
        "unpadded": batch.unpadded_BS,
        "response": batch.labels_BS != IGNORE,
        "text": batch.text_BS,
    }[which]
    return mask.float()
