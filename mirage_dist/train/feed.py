"""The data of a step: samples of every stream, collated, with the counts that normalise the loss."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mirage_dist.data import sources, stream, words
from mirage_dist.data.encoding.collate import IGNORE, Batch, Encoder
from mirage_dist.data.encoding.conversation import called
from mirage_dist.data.refusals import PhraseList, check_forget
from mirage_dist.data.sample import Sample
from mirage_dist.data.sources import Source
from mirage_dist.model import load
from mirage_dist.model.reference import SampleKey
from mirage_dist.objectives.base import Needs, Positions
from mirage_dist.ranks import Group, everyones
from mirage_dist.runs import DataSummary
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.schema.limits import STEPS
from mirage_dist.train.prefetch import made

SHARED = ("id", "image", "question", "history", "shown")  # fields that paired samples have in common


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


def check_streams(recipe: TrainRecipe, needs: Needs) -> None:
    """Raise ConfigError when the recipe's streams are not exactly those that the objective needs, or when the one that
    is to define an epoch is none of them.
    """
    given, needed = list(recipe.data.streams), list(needs.streams)
    if sorted(given) != sorted(needed):
        raise ConfigError(
            f"data.streams: the recipe has {', '.join(given)}; objective {recipe.objective['name']} needs {needed}"
        )
    if (name := recipe.train.epoch_stream) not in (None, *needed):
        raise ConfigError(
            f"train.epoch_stream={name}: no stream of this objective; expected one of {', '.join(needed)}"
        )


def read_streams(recipe: TrainRecipe, needs: Needs) -> dict[str, Source]:
    """The samples of every stream that the objective needs; opens no picture (see `sources.check_pictures`).

    Raises ConfigError for an empty stream, bad data, an empty answer, or answers to unlearn that look like refusals.
    """
    refuses, given = PhraseList.read(recipe.data.refusals), recipe.data.streams
    streams = {name: sources.read_all(given[name], check_images=False, answered=True) for name in needs.streams}
    for name, source in streams.items():
        if name in needs.unlearned and recipe.data.refusals_in_forget == "error":
            check_forget(source.samples, name, refuses)
        if not source.samples:
            raise ConfigError(f"data.streams.{name}: no sample in {[s.path for s in recipe.data.streams[name]]}")
    return streams


def check_pairs(samples: Mapping[str, Sequence[Sample]], paired: Sequence[str]) -> None:
    """Raise ConfigError unless sample i of every paired stream has the same `SHARED` fields."""
    if not paired:
        return
    first, *others = paired
    for name in others:
        mine, partners = samples[first], samples[name]
        place = f"data.streams.{name}: is paired with {first}"
        if len(mine) != len(partners):
            ids = [{sample.id for sample in kept} for kept in (mine, partners)]
            alone = next((s.id for s in (*mine, *partners) if s.id in ids[0] ^ ids[1]), None)
            first_one = "" if alone is None else f" ({alone!r} has none)"
            raise ConfigError(
                f"{place}: {len(partners)} samples for {len(mine)}; every sample needs a partner{first_one}"
            )
        for number, (one, other) in enumerate(zip(mine, partners, strict=True)):
            if any(getattr(one, name) != getattr(other, name) for name in SHARED):
                raise ConfigError(
                    f"{place}: sample {number} is {other.id!r} there and {one.id!r} in {first}; both streams need the "
                    "same ids, pictures and questions in the same order"
                )


def check_no_picture(samples: Mapping[str, Sequence[Sample]], model: str) -> None:
    """Raise ConfigError, naming the first one, when any sample has a picture."""
    for name, kept in samples.items():
        if (sample := next((s for s in kept if s.image is not None), None)) is not None:
            raise ConfigError(
                f"data.streams.{name}: {called(sample)} has a picture, but model.path={model} is a text-only model; "
                "take a vision-language model, or records without pictures"
            )


def describe(streams: Mapping[str, Source], refusals: str | None = None) -> DataSummary:
    """The contents of data.json. refusals: the file of a list of phrases of refusal; None: ours."""
    refuses = PhraseList.read(refusals)
    return {
        "streams": {
            name: {
                "samples": len(source.samples),
                **source.left_out(),
                "commits": source.commits,
                "first_words": words.first_words(source.samples, refuses),
            }
            for name, source in streams.items()
        }
    }


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

    recipe: resolved (see `planning.check.resolved`); an `auto` that is left in it pads.
    samples: stream -> its samples. pictures: path -> SHA-256 of each picture that was checked.
    lengths: stream -> tokens (n,) of each sample's row after truncation, known after
    `check_lengths`. Raises ConfigError when paired streams do not match, or a text-only
    model's have a picture.
    """

    def __init__(self, recipe: TrainRecipe, needs: Needs, streams: Mapping[str, Source], processor: Any) -> None:
        self.recipe, self.needs = recipe, needs
        self.samples: dict[str, list[Sample]] = {name: streams[name].samples for name in needs.streams}
        self.pictures = {path: digest for name in needs.streams for path, digest in streams[name].pictures.items()}
        self.lengths: dict[str, stream.Indices] = {}
        self.pictured: dict[str, stream.Flags] = {}
        if recipe.data.group_by_modality:
            self.pictured = {n: np.array([s.image is not None for s in own]) for n, own in self.samples.items()}
        check_pairs(self.samples, needs.paired)
        self.encoder = encoder_of(recipe, processor)
        if self.encoder.text_only:
            check_no_picture(self.samples, recipe.model.path)

    def check_lengths(self, group: Group) -> int:
        """The number of samples that will be cut. Each rank measures its share; every rank then knows all lengths.

        Every rank raises ConfigError when any has a sample that does not fit, or that the chat template rewrites.
        """
        own, fault = {}, None
        try:
            for name, samples in self.samples.items():
                own[name] = np.array([self.encoder.length(s) for s in samples[group.rank :: group.size]], np.int64)
        except ConfigError as error:
            fault = str(error)
        parts = everyones(group, (own, fault))
        for _, fault in parts:
            if fault is not None:
                raise ConfigError(fault)
        cut, longest = 0, self.encoder.max_length
        for name, samples in self.samples.items():
            whole = np.empty(len(samples), np.int64)
            for rank, (lengths, _) in enumerate(parts):
                whole[rank :: group.size] = lengths[name]
            cut += int((whole > longest).sum())
            self.lengths[name] = np.minimum(whole, longest)
        return cut

    @property
    def epoch_stream(self) -> str:
        """The stream that defines an epoch."""
        return self.recipe.train.epoch_stream or self.needs.streams[0]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: `max_steps`, or `epochs` passes over `epoch_stream`.

        Raises ConfigError for more steps than a run or its schedule may have, and for a schedule without any rate.
        """
        train = self.recipe.train
        size = len(self.samples[self.epoch_stream])
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

    def window(self, step: int, group: Group) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        width = self.recipe.train.micro_batch
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
        if self.recipe.data.group_by_length:
            same = paired if name in paired else (name,)
            lengths = np.maximum.reduce([self.lengths[other] for other in same])
            return stream.grouped(seed, order, lengths, step, batch, pictured)
        return stream.batch(seed, order, len(self.samples[name]), step, batch, pictured)

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
            size, width = len(self.samples[name]), self.recipe.train.micro_batch
            own = np.arange(-(-size // (width * group.size)) * width) * group.size + group.rank
            for start in range(0, len(own), width):
                yield {name: own[start : start + width] % size}

    def counts(self, window: Sequence[MicroBatch]) -> dict[str, float]:
        """This rank's share in a step of every count that a term may name."""
        return {name: sum(micro.counts[name] for micro in window) for name in window[0].counts}


def positions(batch: Batch, which: Positions) -> Tensor:
    """1.0 at the positions that count for an activation: (B, S) float32."""
    mask = {
        "all": torch.ones_like(batch.labels_BS),
        "unpadded": batch.unpadded_BS,
        "response": batch.labels_BS != IGNORE,
        "text": batch.text_BS,
    }[which]
    return mask.float()
