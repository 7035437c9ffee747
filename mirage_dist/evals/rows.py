"""Rows on disk: the work list, keys, files that only grow, and the manifest that guards them.

    evals/SUITE/config.yaml  manifest.json  rows/worker-*.jsonl  verdicts/JUDGE.jsonl  metrics.json

A row is one answer, one whole JSONL line, under the SHA-256 of everything that decides it. Each worker writes
a file of its own and may die at any time; what it left unfinished is found again by key.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mirage_dist.config import differences
from mirage_dist.data import sources
from mirage_dist.data.sources import Sample
from mirage_dist.evals import attacks
from mirage_dist.evals.attacks import Coverage
from mirage_dist.evals.metrics import Condition
from mirage_dist.schema import ConfigError, EvalRecipe

Row = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """One question to put: `sample` holds it as asked, `original` as the data has it. Shot 0 is clean."""

    set: str
    kind: str
    attack: str
    shot: int
    sample: Sample
    original: str


@dataclass(frozen=True)
class Work:
    """Everything a suite asks, in recipe order.

    conditions: each set's attacks. coverage: set -> attack -> what was matched. skipped: set -> bad records left
    out by `on_bad_record: skip`.
    """

    asks: list[Ask]
    conditions: dict[str, list[Condition]]
    coverage: dict[str, dict[str, Coverage]]
    skipped: dict[str, int]


def plan(recipe: EvalRecipe) -> Work:
    """Read the sets and rewrite their questions; loads no weights.

    Raises ConfigError for bad data or attack options, an empty set, an id that a set has twice, and an attack
    file that matches too little.
    """
    if not recipe.sets:
        raise ConfigError("sets is empty: name at least one, such as sets.unsafe")
    work = Work([], {}, {}, {})
    for name, options in recipe.sets.items():
        samples, work.skipped[name] = _samples(recipe, name)
        work.conditions[name], work.coverage[name] = [], {}
        work.asks.extend(Ask(name, options.kind, "clean", 0, s, s.question) for s in samples)
        for title, fields in options.attacks.items():
            if title == "clean":
                raise ConfigError(f"sets.{name}.attacks.clean: the clean question is always asked; choose another name")
            attack = attacks.make(fields, "the recipe", f"sets.{name}.attacks.{title}")
            rewrites, work.coverage[name][title] = attacks.apply(attack, samples, title)
            work.conditions[name].append(Condition(title, attack.shots, attack.control))
            for sample, rows in zip(samples, rewrites, strict=True):
                shots = enumerate(rows, start=1)
                work.asks.extend(Ask(name, options.kind, title, k, row, sample.question) for k, row in shots)
    return work


def _samples(recipe: EvalRecipe, name: str) -> tuple[list[Sample], int]:
    read = [sources.read(source) for source in recipe.sets[name].sources]
    samples = [sample for part in read for sample in part.samples]
    if not samples:
        raise ConfigError(f"sets.{name}: no sample in {[s.path for s in recipe.sets[name].sources]}")
    seen: dict[str, Sample] = {}
    for sample in samples:
        if sample.id in seen:
            raise ConfigError(
                f"sets.{name}: id {sample.id!r} twice, in {seen[sample.id].source} and {sample.source}; attacks are "
                "joined by id, so make two sets of them"
            )
        seen[sample.id] = sample
    return samples, sum(part.skipped for part in read)


# ------------------------------------------------------------------------------------------------- keys


def settings(recipe: EvalRecipe, model_hash: str, chat_template_hash: str) -> dict[str, Any]:
    """What every answer depends on beside its question."""
    return {
        "model_hash": model_hash,
        "chat_template_hash": chat_template_hash,
        "dtype": recipe.model.dtype,
        "template": asdict(recipe.template),
        "generation": {"decoding": "greedy", "max_new_tokens": recipe.generation.max_new_tokens},
    }


def keyed(asks: Iterable[Ask], decided_by: Mapping[str, Any]) -> dict[str, Ask]:
    """Asks by the SHA-256 of the settings, the question as asked, its picture's bytes, and where it stands."""
    image_hash = cache(_file_hash)  # for this call only: a picture may be another one next time
    return {_key(ask, decided_by, image_hash): ask for ask in asks}


def _key(ask: Ask, decided_by: Mapping[str, Any], image_hash: Callable[[str], str]) -> str:
    sample = ask.sample
    content = {
        "settings": decided_by,
        "set": [ask.set, ask.kind],
        "attack": [ask.attack, ask.shot],
        "sample": [sample.id, sample.question, sample.history, ask.original],
        "image": image_hash(sample.image) if sample.image else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_hash(path: str) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def row(identity: str, ask: Ask, response: str) -> Row:
    """What is written of one answer."""
    return {
        "key": identity,
        "set": ask.set,
        "kind": ask.kind,
        "id": ask.sample.id,
        "category": ask.sample.category,
        "image": ask.sample.image,
        "attack": ask.attack,
        "shot": ask.shot,
        "question": ask.sample.question,
        "original_question": ask.original,
        "expected": ask.sample.answer,
        "response": response,
    }


# ------------------------------------------------------------------------------------------------- files


class Writer:
    """Appends whole lines to a file that no other worker writes."""

    def __init__(self, suite: Path) -> None:
        folder = suite / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        # The time first, so that sorted files are in the order in which their workers started.
        self.file = (folder / f"worker-{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl").open("x", encoding="utf-8")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, rows: Iterable[Row]) -> None:
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())


def read_rows(suite: Path) -> tuple[dict[str, Row], int]:
    """Every whole row by key, the first one where a key was answered twice; and how many half lines there were."""
    found: dict[str, Row] = {}
    half = 0
    for file in sorted((suite / "rows").glob("worker-*.jsonl")):
        rows, broken = read_lines(file)
        half += broken
        for line in rows:
            found.setdefault(line["key"], line)
    return found, half


def read_lines(file: Path) -> tuple[list[Row], int]:
    """The whole lines of a JSONL file that a dying process may have left half written, and how many are not."""
    if not file.exists():
        return [], 0
    rows, half = [], 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
            rows.append(json.loads(line))
        except ValueError:
            half += 1
    return rows, half


def write_atomically(file: Path, text: str) -> None:
    """Beside, fsynced, renamed: a reader sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    with beside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(beside, file)


def claim(suite: Path, manifest: dict[str, Any]) -> None:
    """Make `suite` this evaluation's directory, or check that it already is.

    Raises ConfigError naming each of `manifest["settings"]` in which the one there differs.
    """
    file = suite / "manifest.json"
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))["settings"]
        changed = differences(_plain(manifest["settings"]), there)
        if changed:
            raise ConfigError(
                f"{suite} holds answers of another evaluation: {'; '.join(changed)}. Choose another `suite` "
                "name, or move that directory away"
            )
        return
    write_atomically(file, json.dumps(manifest, indent=1) + "\n")


def coverage_report(work: Work) -> dict[str, Any]:
    """What the manifest says of the work list: counts, and up to ten ids of each kind of miss."""
    return {
        name: {
            "samples": sum(a.set == name and a.attack == "clean" for a in work.asks),
            "skipped_records": work.skipped[name],
            "attacks": {
                title: {
                    "asked": c.asked,
                    "unchanged_rewrites": c.unchanged,
                    "samples_without_rewrites": _sample_of(c.without),
                    "unknown_ids_in_file": _sample_of(c.unknown),
                }
                for title, c in found.items()
            },
        }
        for name, found in work.coverage.items()
    }


def _sample_of(ids: Sequence[str]) -> dict[str, Any]:
    return {"count": len(ids), "first": list(ids[:10])}


def _plain(tree: Any) -> Any:
    """As JSON reads it back: tuples are lists."""
    return json.loads(json.dumps(tree))
