"""Reading data files, in any of `data.formats`, to samples; what is wrong with their pictures; counts over them.

Records are numbered from 0 in messages. What a reader leaves out is counted: nothing is silently lost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mirage_dist.data import formats, pictures, records
from mirage_dist.data.formats import BadRecord, Opened
from mirage_dist.data.formats.llava import PICTURE
from mirage_dist.data.refusals import is_refusal
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError, SourceConfig

FOLDERS = ("mm_safetybench",)  # formats of which `path` may be a folder of files


@dataclass
class Source:
    """What a file gave. dropped: reason -> count of samples that are none (a repeat, a missing question); renamed:
    samples whose id another one had; skipped: bad records left out by `on_bad_record: skip`. unchecked: (file, record
    number, picture) for every picture that nobody has decoded yet.
    """

    samples: list[Sample]
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    renamed: int = 0
    unchecked: list[tuple[SourceConfig, int, str]] = field(default_factory=list)


def read(config: SourceConfig, check_images: bool = True) -> Source:
    """Read one file, or all of a folder where a format has one file a scenario (`limit` then counts in each).

    Pictures are looked up under `images` and decoded to the last byte.

    Without `check_images` no picture is looked at: they are listed in `unchecked`, for `check_pictures`.
    Raises ConfigError naming file, record number, field and what was expected, for a file that is not JSON, a
    record that is not of the format, or a picture that is missing or broken.
    """
    if config.limit is not None and config.limit < 1:
        raise ConfigError(f"{config.path}: limit={config.limit}; expected a whole number above 0")
    if Path(config.path).is_dir():
        if config.format in FOLDERS:
            return read_all(_files(config), check_images)
        raise ConfigError(
            f"{config.path}: a folder; a recipe names files, of a dataset on disk its *.arrow or *.parquet"
        )
    source = Source([])
    found: list[tuple[int, Sample]] = []
    for number, _, samples in parsed(config, source):
        found.extend((number, sample) for sample in samples)
    kept = _without_duplicates(found, source)[: config.limit]
    source.samples = [sample for _, sample in kept]
    source.unchecked = [(config, number, sample.image) for number, sample in kept if sample.image]
    if check_images:
        _settle(source, image_faults(source.samples, config.path))
    return source


def parsed(
    config: SourceConfig, source: Source, seen: records.Seen = lambda size: None
) -> Iterator[tuple[int, Mapping[str, Any], list[Sample]]]:
    """Number, record and samples, a record at a time; what is left out is counted in `source`. Raises as `read`.

    seen: see `records.read`. Samples are as the file has them: repeats are there, ids may be there twice.
    """
    opened = formats.REGISTRY[config.format](config)
    found = records.read(Path(config.path), seen) if opened.records is None else opened.records
    for number, record in enumerate(found):
        try:
            samples = _parse(opened, record, number, source.dropped)
        except BadRecord as error:
            _refuse(config, number, str(error))
            source.skipped += 1
        else:
            yield number, record, samples


def _files(config: SourceConfig) -> list[SourceConfig]:
    """A source for each JSON file of the folder; pictures are looked up under the same folder for all."""
    found = sorted(Path(config.path).glob("*.json"))
    if not found:
        raise ConfigError(f"{config.path}: no *.json in this folder")
    return [replace(config, path=str(file), images=config.images or config.path) for file in found]


def read_all(configs: Sequence[SourceConfig], check_images: bool = True) -> Source:
    """Several files as one, in order, their counts added."""
    total = Source([])
    for config in configs:
        part = read(config, check_images)
        total.samples.extend(part.samples)
        total.unchecked.extend(part.unchecked)
        total.dropped.update(part.dropped)
        total.skipped += part.skipped
        total.renamed += part.renamed
    return total


def check_pictures(
    streams: Mapping[str, Source],
    rank: int = 0,
    size: int = 1,
    exchange: Callable[[dict[str, str]], Iterable[Mapping[str, str]]] = lambda own: [own],
) -> None:
    """Do what `read` does about pictures, for streams that were read without it: `size` ranks share the decoding.

    exchange: from what this rank found (path -> fault) to what every rank found. So all ranks raise the same error,
    or leave the same samples out and count them.
    Raises ConfigError as `read` does, and for a stream of which no sample is left.
    """
    left = [image for source in streams.values() for _, _, image in source.unchecked]
    faults: dict[str, str] = {}
    for found in exchange(pictures.faults(left, "pictures", rank, size)):
        faults.update(found)
    for name, source in streams.items():
        before = len(source.samples)
        _settle(source, faults, told=rank == 0)
        if before and not source.samples:
            raise ConfigError(f"data.streams.{name}: no sample is left; the pictures of all {before} are no good")


def _settle(source: Source, faults: Mapping[str, str], told: bool = True) -> None:
    """Refuse the records of pictures that have a fault, or leave their samples out; nothing is unchecked then."""
    bad = dict.fromkeys(place for place in source.unchecked if place[2] in faults)
    for config, number, image in bad:
        _refuse(config, number, f"image {image}: {faults[image]}", told)
    source.skipped += len(bad)
    source.samples = [sample for sample in source.samples if sample.image not in faults]
    source.unchecked = []


def _refuse(config: SourceConfig, number: int, why: str, told: bool = True) -> None:
    if config.on_bad_record == "error":
        raise ConfigError(f"{config.path}: record {number}: {why} (on_bad_record: skip would leave it out, counted)")
    if told:
        print(f"{config.path}: record {number} skipped: {why}", flush=True)


def _without_duplicates(found: list[tuple[int, Sample]], source: Source) -> list[tuple[int, Sample]]:
    """Drop exact repeats of a sample; one that shares only its id gets another (VLGuard has both), counted."""
    kept: list[tuple[int, Sample]] = []
    seen: set[Sample] = set()
    taken: set[tuple[str, bool]] = set()
    uses: Counter[tuple[str, bool]] = Counter()
    for number, sample in found:
        if sample in seen:
            source.dropped["exact duplicate"] += 1
            continue
        seen.add(sample)
        wanted = identity = (sample.id, sample.safe)
        while identity in taken:
            uses[wanted] += 1
            identity = (f"{sample.id}#{uses[wanted] + 1}", sample.safe)
        taken.add(identity)
        source.renamed += identity != wanted
        kept.append((number, replace(sample, id=identity[0])))
    return kept


def _parse(opened: Opened, record: Any, number: int, dropped: Counter[str]) -> list[Sample]:
    if not isinstance(record, Mapping):
        raise BadRecord(f"expected an object, got {type(record).__name__}")
    samples = list(opened.parse(record, number, dropped))
    for sample in samples:
        if any(PICTURE in text for turn in [*sample.history, (sample.question, sample.answer)] for text in turn):
            raise BadRecord(f"a text holds {PICTURE}, which a processor would take for another picture")
    return samples


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write the `samples` format: one object a line, pictures by absolute path."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            row = dataclasses.asdict(sample)
            if not sample.references:
                del row["references"]
            row["image"] = str(Path(sample.image).resolve()) if sample.image else None
            del row["begun"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def image_faults(samples: Sequence[Sample], what: str) -> dict[str, str]:
    """path -> what is wrong with it, for the pictures of these samples."""
    return pictures.faults((sample.image for sample in samples if sample.image), f"pictures of {what}")


# -------------------------------------------------------------------------------------------------- counts


def shared_images(a: Sequence[Sample], b: Sequence[Sample]) -> set[str]:
    """Pictures of `a` that `b` has too, by their bytes: VLGuard's splits share some, in folders of their own."""
    theirs = set(_digests(b).values())
    return {path for path, digest in _digests(a).items() if digest in theirs}


def _digests(samples: Sequence[Sample]) -> dict[str, bytes]:
    """Picture -> SHA-256 of its file."""
    distinct = {sample.image for sample in samples if sample.image}
    return {path: hashlib.sha256(Path(path).read_bytes()).digest() for path in distinct}


def check_forget(samples: Sequence[Sample], stream: str = "forget") -> None:
    """Raise ConfigError for a stream of answers to unlearn that is empty or would unlearn refusing.

    The second happens when the answers to forget were joined wrongly and the refusals stayed in their place.
    """
    if not samples:
        raise ConfigError(f"data.streams.{stream}: no sample; nothing would be unlearned")
    refused = [sample.id for sample in samples if is_refusal(sample.answer)]
    if refused:
        raise ConfigError(
            f"data.streams.{stream}: {len(refused)} of {len(samples)} answers look like refusals (first ids: "
            f"{', '.join(refused[:3])}); the model would unlearn refusing. Harvest the answers to forget first "
            "(`mirage prepare`), or set data.refusals_in_forget=allow"
        )
