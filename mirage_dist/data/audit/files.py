"""Reading the files of a corpus once, in any format, and counting their pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from mirage_dist.data import formats, records, sources, tables
from mirage_dist.data.audit.corpus import Corpus, Measured, Options
from mirage_dist.data.audit.verdict import Verdict, verdict
from mirage_dist.data.formats import Format
from mirage_dist.data.published import hub
from mirage_dist.data.refusals import is_refusal_as_published
from mirage_dist.data.sample import Sample
from mirage_dist.progress import Progress
from mirage_dist.schema import ConfigError

PAUSE_SECONDS = 30.0  # between progress lines when there is no terminal


class FileCounts(TypedDict):
    """pairs: questions with their responses. dropped: reason -> samples left out on purpose. skipped: bad records."""

    path: str
    format: str
    records: int
    pairs: int
    dropped: dict[str, int]
    skipped: int


class Audit(Measured):
    """audit.json."""

    files: list[FileCounts]
    verdict: Verdict


def audit(
    paths: Sequence[Path | str],
    options: Options,
    format: str | None = None,
    on_bad_record: str = "error",
    config: str | None = None,
    split: str | None = None,
) -> Audit:
    """Read the files once and return the content of audit.json.

    config, split: of every path that is a dataset of the hub. format: of all files, a name or module:Class; without it
    each file's first record decides. Samples that `sources.read` leaves out are left out here, exact repeats too.
    Raises ConfigError as `sources.read` does, for an unknown format, and for a file whose format cannot be recognised
    or has no answers.
    """
    if format is not None:
        formats.load(format, "mirage audit", "--format")  # before any file is read
    corpus = Corpus(options)
    files: list[FileCounts] = []
    places = [(str(path), _files(str(path), config, split)) for path in paths]
    total = sum(records.size(file) for _, files in places for file in files)
    bar = Progress(total, "audit", "B", delay=2.0, pause=PAUSE_SECONDS, leave=False, on_stderr=True)
    with bar:
        for path, local in places:
            name = format or recognise(local[0])
            chosen = {"format": name, "path": path, "on_bad_record": on_bad_record}
            if hub.address(path) is not None:
                chosen |= {"config": config, formats.load(name, "mirage audit", "--format").split_key: split}
            files.append(_read(corpus, formats.make(chosen, f"mirage audit: {path}", "--format"), bar.update))
    measured = corpus.measured()
    return {"files": files, **measured, "verdict": verdict(measured)}


def _files(path: str, config: str | None, split: str | None) -> Sequence[Path]:
    return [Path(path)] if (where := hub.address(path)) is None else hub.split(where, config, split).files


def recognise(path: Path) -> str:
    """The name of the format whose fields the first record has. Raises ConfigError unless it is exactly one."""
    first = next(iter(records.read(path)), None)
    record = first if isinstance(first, Mapping) else {}
    matches = formats.recognised(record)
    if len(matches) != 1:
        expected = (f"{' and '.join(sorted(fields))} ({name})" for name, fields in formats.signatures().items())
        raise ConfigError(
            f"{path}: record 0: fields {sorted(record)} are those of {' and '.join(matches) or 'no format'}; expected "
            f"{', '.join(expected)}; or name the format with --format"
        )
    return matches[0]


def _read(corpus: Corpus, config: Format, on_bytes: records.OnBytes) -> FileCounts:
    """Count a file's pairs; its entry in audit.json."""
    rule = corpus.options.response_kind
    if not config.answered:
        raise ConfigError(f"{config.path}: {config.format} records have no answers; there is nothing to audit")
    if rule == "label" and not config.labelled:
        raise ConfigError(
            f"{config.path}: --response-kind label: {config.format} records have no label; use list or FIELD=VALUE"
        )
    source, number, before, hashes = sources.Source([]), -1, corpus.pairs, set[int]()
    for number, record, samples in sources.parsed(config, source, on_bytes):
        for sample in samples:
            if not sample.answer.strip():
                source.dropped[sources.EMPTY] += 1
                continue
            # 64 bits a sample in place of the samples: a chance of 1e-7 that one of a million is taken for a repeat.
            if (sample_hash := hash(sample)) in hashes:
                source.dropped["exact duplicate"] += 1
                continue
            hashes.add(sample_hash)
            corpus.add_sample(
                sample, _picture(record.get("image")), _refuses(corpus, config.path, number, record, sample)
            )
    return {
        "path": config.path,
        "format": config.format,
        "records": number + 1,
        "pairs": corpus.pairs - before,
        "dropped": dict(source.dropped),
        "skipped": source.skipped,
    }


def _picture(value: object) -> str | None:
    """A record's picture, as `Corpus.add` takes it."""
    value = value.reference if isinstance(value, tables.Binary) else value
    return value if isinstance(value, str) else None


def _refuses(
    corpus: Corpus, path: str, number: int, record: Mapping[str, Any], sample: Sample
) -> Callable[[str], bool] | bool:
    """The test of an answer, or the label of the sample's last turn."""
    rule = corpus.options.response_kind
    if rule == "published":
        return is_refusal_as_published
    if corpus.phrases is not None:
        return corpus.phrases
    if rule == "label":
        return not sample.safe
    name, _, refusing = rule.partition("=")
    if name not in record:
        raise ConfigError(f"{path}: record {number}: field {name!r} is missing (--response-kind {rule})")
    value = record[name]
    return (value if isinstance(value, str) else json.dumps(value, default=str)) == refusing
