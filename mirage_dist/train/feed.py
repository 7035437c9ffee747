"""What a step sees: samples of every stream, collated, with the counts that normalise the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_dist.data import sources, stream
from mirage_dist.data.collate import IGNORE, Batch, Encoder
from mirage_dist.data.sources import Sample, Source
from mirage_dist.objectives.base import Needs, Positions
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.world import World, everyones


@dataclass(frozen=True)
class MicroBatch:
    """Rows of all streams, stream after stream. rows: stream -> its slice of the batch's rows.

    samples: (stream, index into the stream) of each row. tokens: stream -> how many of `batch.index_N` are its own.
    mask_BS marks the positions that count for an activation.
    """

    batch: Batch
    rows: Mapping[str, slice]
    samples: list[tuple[str, int]]
    tokens: Mapping[str, int]
    mask_BS: Tensor

    def index(self, streams: Sequence[str]) -> Tensor | None:
        """Flat positions of the hidden rows that predict these streams' responses, in batch order; None for none."""
        # Sizes are known on the host, so nothing here waits for the device.
        parts = zip(self.rows, self.batch.index_N.split(list(self.tokens.values())), strict=True)
        chosen = [part for name, part in parts if name in streams]
        return torch.cat(chosen) if chosen else None

    def span(self, streams: Sequence[str]) -> slice:
        """The rows from the first to the last of these streams; none for none."""
        found = [rows for name, rows in self.rows.items() if name in streams]
        return slice(found[0].start, found[-1].stop) if found else slice(0, 0)

    def segment(self, stream: str) -> Tensor | None:
        """The sequence of the stream (from 0) that each of its response rows belongs to: (N,)."""
        index_N = self.index([stream])
        return None if index_N is None else index_N // self.batch.labels_BS.shape[1] - self.rows[stream].start


def check_streams(recipe: TrainRecipe, needs: Needs) -> None:
    """Raise ConfigError for a stream that the objective needs and the recipe lacks, or the other way round."""
    given, wanted = list(recipe.data.streams), list(needs.streams)
    if sorted(given) != sorted(wanted):
        raise ConfigError(
            f"data.streams: {', '.join(given)} given; objective {recipe.objective['name']} needs {wanted}"
        )


def read_streams(recipe: TrainRecipe, needs: Needs) -> dict[str, Source]:
    """The samples of every stream that the objective needs, their pictures not looked at (`sources.check_pictures`).

    Raises ConfigError for an empty stream, bad data, or forget answers that look like refusals.
    """
    streams = {name: sources.read_all(recipe.data.streams[name], check_images=False) for name in needs.streams}
    for name, source in streams.items():
        if name == "forget" and recipe.data.refusals_in_forget == "error":
            sources.check_forget(source.samples)
        if not source.samples:
            raise ConfigError(f"data.streams.{name}: no sample in {[s.path for s in recipe.data.streams[name]]}")
    return streams


def describe(streams: Mapping[str, Source]) -> dict[str, Any]:
    """`data.json` of a run: counts, what was left out, and first words by kind of answer."""
    return {
        "streams": {
            name: {
                "samples": len(source.samples),
                "dropped": dict(source.dropped),
                "renamed": source.renamed,
                "skipped": source.skipped,
                "first_words": sources.first_words(source.samples),
            }
            for name, source in streams.items()
        }
    }


class Feed:
    """Micro-batches of each step for this rank; a pure function of the recipe, the rank and the step."""

    def __init__(self, recipe: TrainRecipe, needs: Needs, streams: Mapping[str, Source], processor: Any) -> None:
        self.recipe, self.needs = recipe, needs
        self.samples: dict[str, list[Sample]] = {name: streams[name].samples for name in needs.streams}
        data = recipe.data
        self.encoder = Encoder(processor, data.max_length, data.on_long, data.image_aspect, data.system_prompt)

    def check_lengths(self, world: World) -> int:
        """How many samples will be cut; each rank looks at its share.

        Every rank raises ConfigError when any has a sample that does not fit, or that the chat template rewrites.
        """
        own = (s for samples in self.samples.values() for s in samples[world.rank :: world.size])
        cut, fault = 0, None
        try:
            cut = sum(self.encoder.check(sample) for sample in own)
        except ConfigError as error:
            fault = str(error)
        told = everyones(world, (cut, fault))
        for _, fault in told:
            if fault is not None:
                raise ConfigError(fault)
        return sum(cut for cut, _ in told)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: `max_steps`, or `epochs` passes over the first stream."""
        train = self.recipe.train
        size = len(self.samples[self.needs.streams[0]])
        return train.max_steps or max(1, -(-int(train.epochs * size) // train.global_batch))

    def window(self, step: int, world: World) -> list[MicroBatch]:
        """This rank's micro-batches of a step, on the device."""
        train = self.recipe.train
        parts = {}
        for name, samples in self.samples.items():
            indices = stream.batch(self.recipe.seed, name, len(samples), step, train.global_batch)
            parts[name] = stream.shard(indices, world.rank, world.size, train.micro_batch)
        count = train.global_batch // (world.size * train.micro_batch)
        chosen = ({name: part[i] for name, part in parts.items()} for i in range(count))
        return [self.collate(rows, world.device) for rows in chosen]

    def collate(self, rows: Mapping[str, np.ndarray], device: torch.device) -> MicroBatch:
        """Rows (stream -> indices) in one batch."""
        samples = [(name, int(index)) for name, indices in rows.items() for index in indices]
        encoded = self.encoder.encode([self.samples[name][index] for name, index in samples])
        slices, start = {}, 0
        for name, indices in rows.items():
            slices[name] = slice(start, start + len(indices))
            start += len(indices)
        tokens = {name: int((encoded.labels_BS[part, 1:] != IGNORE).sum()) for name, part in slices.items()}
        batch = to_device(encoded, device)
        return MicroBatch(batch, slices, samples, tokens, positions(batch, self.needs.positions))

    def every_sample(self, names: tuple[str, ...], world: World) -> Iterator[dict[str, np.ndarray]]:
        """All samples of these streams, `micro_batch` a time, split over ranks; every rank makes as many batches.

        The last ones may repeat samples: under ZeRO-3 each rank must make each forward.
        """
        for name in names:
            size, width = len(self.samples[name]), self.recipe.train.micro_batch
            own = np.arange(-(-size // (width * world.size)) * width) * world.size + world.rank
            for start in range(0, len(own), width):
                yield {name: own[start : start + width] % size}

    def counts(self, window: list[MicroBatch]) -> dict[str, float]:
        """This rank's share of every count that a term may name (see `objectives.base.Term`)."""
        total: Counter[str] = Counter({"micro_batches": len(window)})
        for micro in window:
            for name, rows in micro.rows.items():
                total[f"{name}.sequences"] += rows.stop - rows.start
                total[f"{name}.tokens"] += micro.tokens[name]
                total[f"{name}.positions"] += int(micro.mask_BS[rows].sum())
            total["input_tokens"] += int(micro.batch.inputs["attention_mask"].sum())
            total["cut"] += micro.batch.cut
        return dict(total)


def positions(batch: Batch, which: Positions) -> Tensor:
    """1.0 at the positions that count for an activation: (B, S) float32."""
    mask = {
        "all": torch.ones_like(batch.labels_BS),
        "unpadded": batch.inputs["attention_mask"],
        "response": batch.labels_BS != IGNORE,
        "text": batch.text_BS,
    }[which]
    return mask.float()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on the device."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.inputs.items()}
    labels, index, text = (t.to(device, non_blocking=True) for t in (batch.labels_BS, batch.index_N, batch.text_BS))
    return Batch(inputs, labels, index, text, batch.cut)
