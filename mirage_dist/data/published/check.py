"""Whether the published files that are here are as published: which are missing, and what differs, in words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mirage_dist import disk
from mirage_dist.data import formats, records, sources
from mirage_dist.data.pictures import Reference
from mirage_dist.data.published import hub
from mirage_dist.data.published.catalogue import Dataset, File
from mirage_dist.schema import ConfigError

State = Literal["right", "differs", "missing", "optional"]


@dataclass(frozen=True)
class Finding:
    """What was seen of one file, folder or split. detail: counts, or what differs and what was expected."""

    place: str
    state: State
    detail: str


def findings(dataset: Dataset, root: Path) -> Iterator[Finding]:
    """One for each file, folder of pictures and split of a dataset, those of `root` and of the hub's cache."""
    for file in dataset.files:
        yield _file(file, root)
    for folder, content in dataset.pictures.items():
        if not (root / folder).is_dir():
            yield Finding(str(root / folder), "missing", f"a folder for {content}")
    for split in dataset.splits:
        place = f"{dataset.hub} {split.config}/{split.split}"
        try:
            where = hub.address(str(dataset.hub))
            assert where is not None
            has = hub.split(where, split.config, split.split)
            count = sum(1 for file in has.files for _ in records.read(file))
        except ConfigError as error:
            absent = "not in the cache" in str(error)
            yield Finding(place, "missing" if absent else "differs", str(error))
        else:
            state: State = "right" if count == split.rows else "differs"
            yield Finding(place, state, f"{_counted(count, split.rows, 'rows')} (commit {has.commit[:12]})")


def whole(seen: list[Finding]) -> bool:
    """Whether nothing that a suite needs is missing or differs."""
    return all(one.state in ("right", "optional") for one in seen)


def _file(file: File, root: Path) -> Finding:
    path = root / file.path
    if not path.exists():
        return Finding(str(path), "optional" if file.optional else "missing", file.holds)
    try:
        details = list(_differences(file, path, root))
    except (ConfigError, OSError) as error:
        return Finding(str(path), "differs", str(error))
    wrong = [text for text, right in details if not right]
    return Finding(str(path), "differs" if wrong else "right", "; ".join(wrong or [text for text, _ in details]))


def _differences(file: File, path: Path, root: Path) -> Iterator[tuple[str, bool]]:
    """What was compared, and whether it is as published."""
    if file.sha256 is not None:
        digest = disk.sha256(path)
        yield (
            (f"SHA-256 {digest[:12]}", True)
            if digest == file.sha256
            else (
                f"SHA-256 {digest}, published {file.sha256}",
                False,
            )
        )
    if file.source is None:
        if file.records is not None:
            count = sum(1 for _ in records.read(path))
            yield _counted(count, file.records, "records"), count == file.records
        elif file.sha256 is None:
            yield "there; nothing to compare it with", True
        return
    options = {
        name: str(root / value) if name in ("images", "annotations") else value for name, value in file.source.items()
    }
    config = formats.make({**options, "path": str(path)}, str(path), "source")
    count, pairs, shown = 0, Counter[str](), set[str]()
    for part in sources.files(config):
        for split in file.counts or [""]:
            source = sources.Source([])
            own = part if not split else replace(part, **{"split": split})
            for _, _, samples in sources.parsed(own, source):
                pairs[split] += len(samples)
                shown |= {
                    sample.image for sample in samples if sample.image and not isinstance(sample.image, Reference)
                }
            pairs[split] += sum(source.dropped.values())
        count += sum(1 for _ in sources.parsed(part, sources.Source([])))
    if file.records is not None:
        yield _counted(count, file.records, "records"), count == file.records
    else:
        yield f"{count} records", True
    for split, expected in file.counts.items():
        yield _counted(pairs[split], expected, split), pairs[split] == expected
    absent = sorted(image for image in shown if not os.path.exists(image))
    if absent:
        yield f"{len(absent)} of {len(shown)} pictures are not there, such as {absent[0]}", False
    elif shown:
        yield f"{len(shown)} pictures", True


def _counted(count: int, expected: int, what: str) -> str:
    return f"{count} {what}" if count == expected else f"{count} {what}, published {expected}"
