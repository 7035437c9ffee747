"""Reference log-probabilities of whole streams, computed once by the policy while it still is the base model.

    reference/KEY/ranks-00002-width-16-part-003-of-010.npz     while they are computed
    reference/KEY/logps.safetensors                            of all samples, in the end

KEY is the hash of everything that decides the values. A part holds what all ranks computed in BATCHES_A_PART batches;
it exists whole or not at all, and a damaged part is computed again. A run that was stopped computes the missing parts,
cut into the same batches, so that it gets bitwise the same values. A complete set of parts, of any number of ranks, is
merged into one flat file (see `caches.flat`), which every rank maps into memory: `STREAM/starts` (n + 1,) says where in
`STREAM/values` the values of each sample begin. Only then do the parts go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_dist import disk, ranks, signals
from mirage_dist.model import environment, reference
from mirage_dist.model.adapters import quantization
from mirage_dist.model.policy import Outputs, Request, no_grad_forward
from mirage_dist.model.reference import SampleKey
from mirage_dist.progress import Progress, log
from mirage_dist.schema import RunError, TrainRecipe
from mirage_dist.train.caches import flat
from mirage_dist.train.caches.flat import Flat
from mirage_dist.train.context import Run
from mirage_dist.train.feed import Feed, MicroBatch

WHOLE = "logps.safetensors"
BATCHES_A_PART = 16
ATTEMPTS = 4  # at a file that can be read back; a disk that damages what is computed again and again is at fault
# Parts of the first versions hold what one rank computed: rank-00001-of-00002-…
PART = re.compile(r"(?:rank-([0-9]{5})-of|ranks)-([0-9]{5})-width-([0-9]{1,9})-part-([0-9]{3,9})-of-([0-9]{3,9})\.npz")


class Cached(reference.Reference):
    """Log-probabilities of response tokens, read from the flat file as samples need them."""

    def __init__(self, file: Flat) -> None:
        self.file = file

    def outputs(self, inputs: dict[str, Tensor], request: Request, samples: Sequence[SampleKey]) -> Outputs:
        """Log-probabilities only; distributions and activations are not cached."""
        if request.index_N is None:
            return Outputs()
        return Outputs(logp_N=self.rows(samples, request.index_N.device))

    def rows(self, samples: Sequence[SampleKey], device: torch.device) -> Tensor:
        """Log-probabilities of the response tokens of `samples`, in their order: (N,) float32.

        Raises RunError when the file is damaged there.
        """
        rows = [self._row(*sample) for sample in samples]
        return torch.from_numpy(np.concatenate(rows)).to(device, non_blocking=True)

    def _row(self, stream: str, index: int) -> np.ndarray:
        start, stop = self.file.read(f"{stream}/starts", index, index + 2).tolist()
        return self.file.read(f"{stream}/values", start, stop)


def fill(run: Run) -> Cached:
    """The log-probabilities of every sample that needs them; each rank computes its share of the missing parts.

    Every rank calls this. Raises StopRequested between two parts, and RunError when files are damaged again after they
    were computed again.
    """
    feed, group = run.feed, run.group
    samples = feed.stream_digests(feed.needs.ref_logp, group)
    folder = run.root / "reference" / key(run.recipe, feed, run.manifest["base_hash"], samples)
    sizes = {name: len(feed.samples[name]) for name in feed.needs.ref_logp}
    for _ in range(ATTEMPTS):
        file = flat.opened(folder / WHOLE, group)
        if file is not None and all(file.shape(f"{name}/starts") == (size + 1,) for name, size in sizes.items()):
            if group.main:
                _remove_parts(run, folder)
            return Cached(file)
        names = ranks.from_main(group, complete_set(folder) if group.main else None)
        if names is None:
            if group.main:
                folder.mkdir(parents=True, exist_ok=True)
            ranks.barrier(group, "reference cache")
            with signals.at_stop_points():
                names = _compute(run, folder)
        if group.main:
            _merge(run, folder, names, sizes)
        ranks.barrier(group, "the reference cache is merged")
    raise RunError(f"{folder}: what was computed is damaged again; see the warnings above, and check this disk")


def _merge(run: Run, folder: Path, names: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Write the flat file of a complete set of parts. Parts that are damaged are removed instead, to be computed again;
    all, when together they lack a sample, as after one was copied over another.
    """
    rows: dict[str, list[np.ndarray | None]] = {name: [None] * size for name, size in sizes.items()}
    damaged: list[str] = []
    for name in names:
        try:
            for (stream, index), row in reference.saved_rows(folder / name):
                rows[stream][index] = row
        except (ValueError, LookupError) as error:
            log.warning(f"{folder / name}: damaged ({error}), computed again")
            damaged.append(name)
    if not damaged and any(row is None for of_stream in rows.values() for row in of_stream):
        log.warning(f"{folder}: its parts do not hold every sample, all are computed again")
        damaged = list(names)
    for name in damaged:
        disk.remove(folder / name, run.lease.workspace)
    if damaged:
        return
    arrays: dict[str, np.ndarray] = {}
    for stream, of_stream in rows.items():
        whole = [row for row in of_stream if row is not None]
        arrays[f"{stream}/starts"] = np.cumsum([0, *map(len, whole)], dtype=np.int64)
        arrays[f"{stream}/values"] = np.concatenate([np.zeros(0, np.float32), *whole])
    flat.write(folder / WHOLE, arrays, "log-probabilities", run.lease.workspace)


def _remove_parts(run: Run, folder: Path) -> None:
    """Remove the parts that were merged; also those that a killed process has left after it had merged them."""
    for file in folder.glob("rank*.npz"):
        if PART.fullmatch(file.name) and file.is_file():
            disk.remove(file, run.lease.workspace)


def _compute(run: Run, folder: Path) -> list[str]:
    """Compute the parts that are missing; returns the names of the complete set."""
    feed, group = run.feed, run.group
    width = run.recipe.train.rows
    every = feed.every_sample(feed.needs.ref_logp, group)
    parts = list(iter(lambda: list(islice(every, BATCHES_A_PART)), []))  # ends at the first empty one

    def file(number: int) -> Path:
        return folder / f"ranks-{group.size:05d}-width-{width}-part-{number:03d}-of-{len(parts):03d}.npz"

    # Rank 0 looks for all: a network file system may show other ranks a part later.
    own = [number for number in range(len(parts)) if not file(number).is_file()] if group.main else []
    missing = ranks.from_main(group, own)
    task = f"{run.root.name}: reference log-probabilities"
    with (
        closing(feed.batches([rows for number in missing for rows in parts[number]])) as batches,
        Progress(len(parts), task, "part", initial=len(parts) - len(missing)) as progress,
    ):
        for number in missing:
            cache = reference.LogProbs()
            for rows in parts[number]:
                add(cache, run.engine, next(batches).to(group.device), next(iter(rows)))
            computed = ranks.everyones(group, {key: row.numpy() for key, row in cache.table.items()})
            if group.rank == number % group.size:
                whole = reference.LogProbs()
                for table in computed:
                    whole.table.update({key: torch.from_numpy(row) for key, row in table.items()})
                with disk.writing(file(number), workspace=run.lease.workspace) as handle:
                    whole.save(handle)
            progress.update()
            ranks.stop_here(group, f"part {number} of the reference cache is written")
    return [file(number).name for number in range(len(parts))]


def add(cache: reference.LogProbs, engine: Any, micro: MicroBatch, stream: str) -> None:
    """Compute the log-probabilities of a micro-batch that holds samples of `stream` only, and put them in the cache."""
    segment_N = micro.segment(stream)
    assert segment_N is not None
    out = no_grad_forward(engine, micro.batch.inputs, Request(micro.index([stream]), micro.labels([stream])))
    assert out.logp_N is not None
    cache.add(micro.samples, out.logp_N, segment_N)


def key(recipe: TrainRecipe, feed: Feed, base_hash: str, samples: Mapping[str, str]) -> str:
    """Hash of everything that decides the values: weights, their dtype, the samples with their pictures, how samples
    become tokens, and the classes and libraries that compute with them.

    samples: of each stream that needs it, see `Feed.stream_digests`.
    """
    data, processor, tokenizer = recipe.data, feed.encoder.processor, feed.encoder.tokenizer
    decided_by = {
        "base": base_hash,
        "dtype": recipe.train.dtype,
        "encoding": [data.max_length, data.on_long, feed.encoder.image_aspect, data.system_prompt, data.packing],
        "template": processor.chat_template,
        "vocabulary": tokenizer.get_vocab(),
        "transform": None if feed.encoder.text_only else processor.image_processor.to_dict(),
        "environment": asdict(environment.of(processor)),
        "samples": dict(samples),
        **({"load_in_4bit": True} if quantization.wanted(recipe.model) else {}),
        **({"template_options": data.template_options} if data.template_options else {}),
    }
    return disk.digest(decided_by, default=str)[:16]


def complete_set(folder: Path) -> list[str] | None:
    """The names of the parts of one complete set, whatever number of ranks wrote it; None where no set is complete.

    What has another name, or is no file, is passed over.
    """
    sets: dict[tuple[int, ...], dict[tuple[int, int], str]] = {}
    for file in sorted(folder.glob("rank*.npz")):
        if (match := PART.fullmatch(file.name)) and file.is_file():
            size, width, part, parts = map(int, match.groups()[1:])
            rank, files = (0, parts) if match[1] is None else (int(match[1]), size * parts)
            if rank < size and part < parts:
                sets.setdefault((size, width, parts, files), {})[part, rank] = file.name
    complete = ([names[key] for key in sorted(names)] for (*_, files), names in sets.items() if len(names) == files)
    return next(complete, None)
