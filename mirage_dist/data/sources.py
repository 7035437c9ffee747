"""Readers: VLGuard, LLaVA, SPA-VL and our own JSONL, each to `Sample`.

Records are numbered from 0 in messages. What a reader leaves out is counted: nothing is silently lost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage_dist.data import pictures
from mirage_dist.data.refusals import is_refusal
from mirage_dist.schema import ConfigError, SourceConfig

VLGUARD_FIELDS = {"unsafes": "instruction", "safe_safes": "safe_instruction", "safe_unsafes": "unsafe_instruction"}
NO_QUESTION = "N/A"  # VLGuard has it where an instruction is missing
PICTURE = "<image>"  # marks the picture's place in LLaVA's records
FIRST_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class Sample:
    """One question about one picture, with the answer to learn or to forget.

    image: path of the picture, None for a text-only record. safe: whether the *pair* should be answered
    (VLGuard's label for the split it comes from). history: earlier (question, answer) turns, oldest first.
    source: the file it was read from, for messages. `id` is unique within a source file and split. begun: what stands
    in the answer's place already when the model is asked (see `evals.prefill`); no file has it.
    """

    id: str
    image: str | None
    question: str
    answer: str
    safe: bool
    category: str
    source: str
    history: tuple[tuple[str, str], ...] = ()
    begun: str = field(default="", repr=False)


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


class _BadRecord(ValueError):
    """A record that is not what the format says; `read` adds the file and the number."""


def read(config: SourceConfig, check_images: bool = True) -> Source:
    """Read one file. Pictures are looked up under `images` and decoded to the last byte.

    Without `check_images` no picture is looked at: they are listed in `unchecked`, for `check_pictures`.
    Raises ConfigError naming file, record number, field and what was expected, for a file that is not JSON, a
    record that is not of the format, or a picture that is missing or broken.
    """
    if config.limit is not None and config.limit < 1:
        raise ConfigError(f"{config.path}: limit={config.limit}; expected a whole number above 0")
    source = Source([])
    found: list[tuple[int, Sample]] = []
    for number, record in enumerate(_records(Path(config.path))):
        try:
            found.extend((number, sample) for sample in _parse(config, record, number, source.dropped))
        except _BadRecord as error:
            _refuse(config, number, str(error))
            source.skipped += 1
    kept = _without_duplicates(found, source)[: config.limit]
    source.samples = [sample for _, sample in kept]
    source.unchecked = [(config, number, sample.image) for number, sample in kept if sample.image]
    if check_images:
        _settle(source, image_faults(source.samples, config.path))
    return source


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


def _records(path: Path) -> Sequence[Any]:
    """A JSON list, or one object a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty")
    if text.lstrip()[:1] == "{":
        return list(_lines(path, text))
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        raise ConfigError(f"{path}: expected a list of records, got {type(records).__name__}")
    return records


def _lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(filter(str.strip, text.split("\n"))):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}: record {number}: not JSON: {error} (expected a list of records, or one object a line)"
            ) from error


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
        kept.append((number, dataclasses.replace(sample, id=identity[0])))
    return kept


# ------------------------------------------------------------------------------------------------ formats


def _parse(config: SourceConfig, record: Any, number: int, dropped: Counter[str]) -> list[Sample]:
    if not isinstance(record, Mapping):
        raise _BadRecord(f"expected an object, got {type(record).__name__}")
    samples = list(_PARSERS[config.format](config, record, number, dropped))
    for sample in samples:
        if any(PICTURE in text for turn in [*sample.history, (sample.question, sample.answer)] for text in turn):
            raise _BadRecord(f"a text holds {PICTURE}, which a processor would take for another picture")
    return samples


def _vlguard(config: SourceConfig, record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
    identity, safe = _text(record, "id"), _get(record, "safe", bool)
    image = _image_path(config, _text(record, "image"))
    pairs = _get(record, "instr-resp", list)
    if not all(isinstance(pair, Mapping) for pair in pairs):
        raise _BadRecord("field 'instr-resp': expected a list of objects")
    category = "" if safe else f"{_text(record, 'harmful_category')}/{_text(record, 'harmful_subcategory')}"
    for split in ("safe_safes", "safe_unsafes") if safe else ("unsafes",):
        if config.split not in ("all", split):
            continue
        name = VLGUARD_FIELDS[split]
        own = [pair for pair in pairs if name in pair]
        if not own:
            raise _BadRecord(f"field 'instr-resp': no pair with {name!r} in a record with safe={safe}")
        for pair in own:
            question, response = _text(pair, name), _text(pair, "response")
            if question.strip() == NO_QUESTION:
                dropped[f"{name} is {NO_QUESTION}"] += 1
                continue
            yield Sample(identity, image, question, response, split == "safe_safes", category, config.path)


def _llava(config: SourceConfig, record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
    turns = _get(record, "conversations", list)
    if not turns or len(turns) % 2:
        raise _BadRecord("field 'conversations': expected human and gpt turns in pairs")
    texts = []
    for place, turn in enumerate(turns):
        speaker = ("human", "gpt")[place % 2]
        if not isinstance(turn, Mapping) or turn.get("from") != speaker:
            raise _BadRecord(f"field 'conversations[{place}].from': expected {speaker!r}")
        texts.append(_text(turn, "value"))
    image = record.get("image")
    if image is not None and not isinstance(image, str):
        raise _BadRecord("field 'image': expected one path; records of several pictures are not supported")
    markers = sum(text.count(PICTURE) for text in texts)
    if markers > 1 or (markers and not image):
        raise _BadRecord(f"field 'conversations': {markers} {PICTURE} markers for {1 if image else 0} picture")
    cleaned = [text.replace(PICTURE, "").strip() for text in texts]
    pairs = tuple(zip(cleaned[::2], cleaned[1::2], strict=True))
    question, answer = pairs[-1]
    identity = _text(record, "id") if record.get("id") is not None else str(number)
    path = _image_path(config, image) if image else None
    yield Sample(identity, path, question, answer, True, str(record.get("category", "")), config.path, pairs[:-1])


def _spa_vl(config: SourceConfig, record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
    """`safe` is whether the chosen answer answers: a preference record has no label of its own."""
    category = "/".join(_text(record, name) for name in ("class1", "class2", "class3"))
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    yield Sample(
        _text(record, "id") if record.get("id") is not None else str(number),
        _image_path(config, _text(record, "image")),
        _text(record, "question"),
        chosen if config.response == "chosen" else rejected,
        not is_refusal(chosen),
        category,
        config.path,
    )


def _samples(config: SourceConfig, record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
    history = _get(record, "history", list)
    if not all(isinstance(t, list) and len(t) == 2 and all(isinstance(x, str) for x in t) for t in history):
        raise _BadRecord("field 'history': expected a list of [question, answer]")
    image = record.get("image")
    yield Sample(
        _text(record, "id"),
        _image_path(config, _text(record, "image")) if image is not None else None,
        _text(record, "question"),
        _text(record, "answer"),
        _get(record, "safe", bool),
        str(record.get("category", "")),
        config.path,
        tuple((q, a) for q, a in history),
    )


_PARSERS: Mapping[str, Callable[[SourceConfig, Mapping, int, Counter[str]], Iterator[Sample]]] = {
    "vlguard": _vlguard,
    "llava": _llava,
    "spa_vl": _spa_vl,
    "samples": _samples,
}


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write the `samples` format: one object a line, pictures by absolute path."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            row = dataclasses.asdict(sample)
            row["image"] = str(Path(sample.image).resolve()) if sample.image else None
            del row["begun"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _get(record: Mapping, name: str, kind: type) -> Any:
    if name not in record:
        raise _BadRecord(f"field {name!r} is missing")
    if not isinstance(record[name], kind):
        raise _BadRecord(f"field {name!r}: expected {kind.__name__}, got {record[name]!r:.80}")
    return record[name]


def _text(record: Mapping, name: str) -> str:
    value = record.get(name)
    if name == "id" and isinstance(value, int):
        return str(value)
    return _get(record, name, str)


# ----------------------------------------------------------------------------------------------- pictures


def _image_path(config: SourceConfig, name: str) -> str:
    """Under `images`; the file's own folder by default. An absolute path stays."""
    return str(Path(config.images or Path(config.path).parent) / name)


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


def first_words(samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Lower-cased first word -> {"refusal": n, "answer": n} answers, most frequent first (the paper's Fig. 3).

    A question without a word counts under "".
    """
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        word = FIRST_WORD.search(sample.question)
        count = counts.setdefault(word[0].lower() if word else "", Counter())
        count["refusal" if is_refusal(sample.answer) else "answer"] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    return {word: {"refusal": count["refusal"], "answer": count["answer"]} for word, count in ordered}


def check_forget(samples: Sequence[Sample]) -> None:
    """Raise ConfigError for a forget set that is empty or would unlearn refusing.

    The second happens when the answers to forget were joined wrongly and the refusals stayed in their place.
    """
    if not samples:
        raise ConfigError("data.streams.forget: no sample; nothing would be unlearned")
    refused = [sample.id for sample in samples if is_refusal(sample.answer)]
    if refused:
        raise ConfigError(
            f"data.streams.forget: {len(refused)} of {len(samples)} answers look like refusals (first ids: "
            f"{', '.join(refused[:3])}); the model would unlearn refusing. Harvest the answers to forget first "
            "(`mirage prepare`), or set data.refusals_in_forget=allow"
        )
