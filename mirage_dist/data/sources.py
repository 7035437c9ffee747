"""Reading data files, in any of `data.formats`, to samples, and checking that their pictures decode.

Records are numbered from 0 in messages. What a reader leaves out is counted: nothing is silently lost.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from mirage_dist.data import pictures, records, tables
from mirage_dist.data.formats import BadRecord, Format, Opened, as_format, recognised
from mirage_dist.data.formats.llava import PICTURE
from mirage_dist.data.pictures import Inspection, Size, shortened
from mirage_dist.data.published import hub
from mirage_dist.data.sample import Sample
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, SourceConfig
from mirage_dist.schema.texts import fault_within

# Sizes of pictures -> why a model's processor refuses those that it refuses (see `Encoder.refusals`).
Refusals = Callable[[Iterable[Size]], Mapping[Size, str]]

Join = Callable[[Sequence[Sample]], list[Sample]]  # the samples of a record -> what becomes of them
EMPTY = "empty answer"  # why a sample is dropped that is for training


def _refuse_none(sizes: Iterable[Size]) -> Mapping[Size, str]:
    return {}


class LeftOut(TypedDict):
    """What reading left out or changed: reason -> dropped samples, renamed ids, bad records that were skipped."""

    dropped: dict[str, int]
    renamed: int
    skipped: int


@dataclass
class Source:
    """The samples of a file, and counts of what was left out.

    dropped: reason -> count of samples that were left out on purpose (a repeat, a missing question). renamed: samples
    whose id another one had. skipped: bad records left out by `on_bad_record: skip`. unchecked: (source, record
    number, picture) for every picture that has not been checked yet. pictures: path -> SHA-256 of each that has.
    commits: dataset of the hub -> the commit that was read.
    """

    samples: list[Sample]
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    renamed: int = 0
    unchecked: list[tuple[Format, int, str]] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)

    def left_out(self) -> LeftOut:
        """The counts as prepare.json has them."""
        return {"dropped": dict(self.dropped), "renamed": self.renamed, "skipped": self.skipped}


def read(
    config: SourceConfig,
    check_images: bool = True,
    refusals: Refusals = _refuse_none,
    answered: bool = False,
    join: Join = list,
) -> Source:
    """Read one file, or all files of a folder if the format has one file a scenario (`limit` then counts in each).

    check_images: decode every picture to its last byte. Without it no picture is opened: they are listed in
    `unchecked`, for `check_pictures`. refusals: a picture of a size for which it gives a reason is a bad record too.
    answered: the samples are for training, so that one with an empty answer is a bad record; left out, it counts as
    `dropped`. join: what becomes of the samples of each record, in the file's order; by default they stay as they are.
    Raises ConfigError naming file, record number, field and expectation, for a file that is not JSON, a record that
    does not conform to the format, or a picture that is missing or broken.
    """
    config = as_format(config)
    if config.pattern() is not None:
        return combined(read(part, check_images, refusals, answered, join) for part in files(config))
    source = Source([])
    if (published := config.published()) is not None:
        source.commits[config.path] = published.commit
    numbered = [(number, sample) for number, _, samples in parsed(config, source, join=join) for sample in samples]
    if answered:
        numbered = [(number, sample) for number, sample in numbered if _is_answered(config, number, sample, source)]
    kept = _without_duplicates(numbered, source)[: config.limit]
    source.samples = [sample for _, sample in kept]
    source.unchecked = [(config, number, sample.image) for number, sample in kept if sample.image]
    if check_images:
        most = unchecked_pictures({"": source})
        _settle(source, inspect(most, refusals, f"pictures of {config.path}"))
    return source


def parsed(
    config: SourceConfig, source: Source, on_bytes: records.OnBytes = lambda size: None, join: Join = list
) -> Iterator[tuple[int, Mapping[str, Any], list[Sample]]]:
    """Number, record and samples, a record at a time; what is left out is counted in `source`. Raises as `read`.

    on_bytes: see `records.read`. join: see `read`. Samples are as in the file: repeats are not dropped, and ids may
    occur twice.
    """
    config = as_format(config)
    for number, (opened, record) in enumerate(_opened(config, on_bytes)):
        try:
            samples = join(_parse(opened, record, number, source.dropped))
        except BadRecord as error:
            _refuse(config, number, f"{error}{_of_another(config, record)}")
            source.skipped += 1
        else:
            yield number, record, samples


def _opened(config: Format, on_bytes: records.OnBytes) -> Iterator[tuple[Opened, Any]]:
    """Each record of all files of a source, in order, with what parses it.

    Raises ConfigError where a dataset of the hub has another number of rows than its card says.
    """
    count = 0
    for part in config.parts():
        opened = part.open()
        for record in records.read(Path(part.path), on_bytes) if opened.records is None else opened.records:
            yield opened, record
            count += 1
    published = config.published()
    if published is not None and published.rows not in (None, count):
        raise ConfigError(
            f"{config.path}: {count} records in the cache, {published.rows} by the dataset's card; "
            f"`mirage data get {config.path}` completes it"
        )


def read_all(
    configs: Sequence[SourceConfig],
    check_images: bool = True,
    refusals: Refusals = _refuse_none,
    answered: bool = False,
) -> Source:
    """Several files as one, in order, their counts added. Raises as `read`."""
    return combined(read(config, check_images, refusals, answered) for config in configs)


def distinct(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of several files as those of one: no exact repeats, and ids of their own (see `Source.renamed`)."""
    first = {replace(sample, source=""): sample for sample in reversed(samples)}
    once = [sample for sample in samples if first[replace(sample, source="")] is sample]
    return [sample for _, sample in _without_duplicates(list(enumerate(once)), Source([]))]


def combined(parts: Iterable[Source]) -> Source:
    """Several sources as one, in order, their counts added."""
    total = Source([])
    for part in parts:
        total.samples.extend(part.samples)
        total.unchecked.extend(part.unchecked)
        total.pictures.update(part.pictures)
        total.commits.update(part.commits)
        total.dropped.update(part.dropped)
        total.skipped += part.skipped
        total.renamed += part.renamed
    return total


def check_pictures(
    streams: Mapping[str, Source],
    rank: int = 0,
    size: int = 1,
    exchange: Callable[[dict[str, Inspection]], Iterable[Mapping[str, Inspection]]] = lambda own: [own],
    refusals: Refusals = _refuse_none,
) -> None:
    """Check the pictures of streams that were read without checking them; `size` ranks share the decoding.

    exchange: takes this rank's inspections by path and returns every rank's, so that all ranks raise the same error, or
    leave out and count the same samples. refusals: see `read`.
    Raises ConfigError as `settle`.
    """
    most = unchecked_pictures(streams)
    own = dict(list(most.items())[rank::size])
    inspected: dict[str, Inspection] = {}
    for part in exchange(inspect(own, refusals, quiet=rank > 0)):
        inspected.update(part)
    settle(streams, inspected)


def unchecked_pictures(streams: Mapping[str, Source]) -> dict[str, int]:
    """Path -> pixels that are decoded, of each picture that is not checked yet.

    A picture of several sources has the largest of their limits.
    """
    most: dict[str, int] = {}
    for source in streams.values():
        for config, _, image in source.unchecked:
            most[image] = max(config.max_pixels, most.get(image, 0))
    return most


def inspect(
    most: Mapping[str, int], refusals: Refusals = _refuse_none, what: str = "pictures", quiet: bool = False
) -> dict[str, Inspection]:
    """`pictures.inspections`, in which a picture that is refused for its size has that fault.

    most: path -> pixels that are decoded. what: names the progress, which is shown unless quiet.
    """
    inspected = pictures.inspections(most, what, most=most, quiet=quiet)
    why = refusals(one.size for one in inspected.values() if one.size is not None)
    return {
        path: one if one.size is None or one.size not in why else one._replace(fault=why[one.size])
        for path, one in inspected.items()
    }


def settle(streams: Mapping[str, Source], inspected: Mapping[str, Inspection]) -> None:
    """Leave out the samples whose pictures cannot be used, and count them; then no picture is unchecked.

    Raises ConfigError as `read` does, and for a stream of which no sample is left.
    """
    for name, source in streams.items():
        before = len(source.samples)
        _settle(source, inspected)
        if before and not source.samples:
            raise ConfigError(f"data.streams.{name}: no sample is left; the pictures of all {before} are unusable")


def inputs(config: SourceConfig) -> list[Path]:
    """The files that decide the samples of a source, beside its pictures; some may not exist.

    Raises ConfigError as `read`, for a dataset of the hub that is not in the cache, or a folder without data.
    """
    config = as_format(config)
    others = [Path(file) for file in config.other_files().values()]
    if not type(config).__module__.startswith("mirage_dist."):
        module = sys.modules.get(type(config).__module__)
        others += [Path(file)] if (file := getattr(module, "__file__", None)) else []
    if (where := hub.address(config.path)) is not None:
        return [*sorted(file for file in hub.snapshot(where).rglob("*") if file.is_file()), *others]
    if config.pattern() is not None:
        own = [Path(part.path) for part in files(config)]
    elif (folder := Path(config.path)).is_dir():
        own = sorted(file for file in folder.iterdir() if file.suffix in (*tables.TABLES, ".json"))
    else:
        own = [folder]
    return [*own, *others]


def check_present(config: SourceConfig) -> None:
    """Raise ConfigError as `read` where the path of one of this package's formats leads nowhere; reads no other source.

    A format from outside the package may read from elsewhere.
    """
    config = as_format(config)
    ours = type(config).__module__.startswith("mirage_dist.")
    if ours and hub.address(config.path) is None and not os.path.exists(config.path):
        read(config, check_images=False)


def files(config: Format) -> list[Format]:
    """A source for each file where `path` is a folder of them, with one folder of pictures for all; else itself."""
    if (pattern := config.pattern()) is None:
        return [config]
    own = sorted(Path(config.path).glob(pattern))
    if not own:
        raise ConfigError(f"{config.path}: no {pattern} in this folder")
    return [replace(config, path=str(file), images=config.images or config.path) for file in own]


def _parse(opened: Opened, record: Any, number: int, dropped: Counter[str]) -> list[Sample]:
    if not isinstance(record, Mapping):
        raise BadRecord(f"expected an object, got {type(record).__name__}")
    if (why := fault_within(record)) is not None:
        raise BadRecord(why)
    samples = list(opened.parse(record, number, dropped))
    for sample in samples:
        if "\0" in (sample.image or ""):
            raise BadRecord(f"image {sample.image!r:.100}: a path cannot hold a NUL character")
        if any(PICTURE in text for turn in [*sample.history, (sample.question, sample.answer)] for text in turn):
            raise BadRecord(f"a text holds {PICTURE}, which a processor would take for another picture")
    return samples


def _settle(source: Source, inspected: Mapping[str, Inspection]) -> None:
    """Refuse the records whose pictures have a fault, or leave their samples out; then no picture is unchecked."""
    bad = dict.fromkeys(place for place in source.unchecked if inspected[place[2]].fault)
    for config, number, image in bad:
        _refuse(config, number, f"image {shortened(image, 300)}: {inspected[image].fault}")
    source.skipped += len(bad)
    faulty = {image for _, _, image in bad}
    source.samples = [sample for sample in source.samples if sample.image not in faulty]
    source.pictures |= {image: inspected[image].sha256 for _, _, image in source.unchecked if image not in faulty}
    source.unchecked = []


def _refuse(config: SourceConfig, number: int, why: str) -> None:
    if config.on_bad_record == "error":
        raise ConfigError(f"{config.path}: record {number}: {why} (on_bad_record: skip would leave it out, counted)")
    log.info(f"{config.path}: record {number} skipped: {why}")


def _is_answered(config: SourceConfig, number: int, sample: Sample, source: Source) -> bool:
    if sample.answer.strip():
        return True
    _refuse(config, number, f"the answer to {sample.id!r} is empty; there is nothing to train on")
    source.dropped[EMPTY] += 1
    return False


def _of_another(config: Format, record: Any) -> str:
    """What to add to a fault of a record that has the fields of another format: several suites have a test.json."""
    names = [name for name in recognised(record) if name != config.format] if isinstance(record, Mapping) else []
    return f"; its fields are those of {' or '.join(names)}, not of {config.format}" if names else ""


def _without_duplicates(numbered: list[tuple[int, Sample]], source: Source) -> list[tuple[int, Sample]]:
    """Drop exact repeats of a sample; one that shares only its id gets another (VLGuard has both), counted."""
    kept: list[tuple[int, Sample]] = []
    seen: set[Sample] = set()
    taken: set[tuple[str, bool]] = set()
    uses: Counter[tuple[str, bool]] = Counter()
    for number, sample in numbered:
        if sample in seen:
            source.dropped["exact duplicate"] += 1
            continue
        seen.add(sample)
        original = identity = (sample.id, sample.safe)
        while identity in taken:
            uses[original] += 1
            identity = (f"{sample.id}#{uses[original] + 1}", sample.safe)
        taken.add(identity)
        source.renamed += identity != original
        kept.append((number, replace(sample, id=identity[0])))
    return kept
