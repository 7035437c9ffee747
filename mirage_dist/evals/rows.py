"""What is to be answered: the work list, keys, chunks, and the manifest that guards a suite's directory.

A row is one answer under the SHA-256 of everything that decides it (see `evals.files` for where it stands).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mirage_dist.config import differences
from mirage_dist.data import sources
from mirage_dist.data.sample import Sample
from mirage_dist.data.sources import Source
from mirage_dist.evals import attacks
from mirage_dist.evals.attacks import Attack, Coverage
from mirage_dist.evals.results import AppliedAttack
from mirage_dist.evals.sharing.files import Row, create
from mirage_dist.schema import ConfigError, EvalRecipe

# (attack, samples, its name in messages and file names) -> the attack, ready to be called
Ready = Callable[[Attack, Sequence[Sample], str], Attack]


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

    attacks: those on each set. coverage: set -> attack -> what was matched. read: what each set's files gave, and
    what was left out of them.
    """

    asks: list[Ask]
    attacks: dict[str, list[AppliedAttack]]
    coverage: dict[str, dict[str, Coverage]]
    read: dict[str, Source]


def plan(recipe: EvalRecipe, ready: Ready = lambda attack, samples, name: attack) -> Work:
    """Read the sets and rewrite their questions. Loads no weights, unless `ready` does.

    ready: makes what a model has to make for an attack (see `evals.rewrites`), once all that is asked for is known.
    Raises ConfigError for bad data or attack options, an empty set, an id that a set has twice, and an attack
    that has rewrites for too few of the samples.
    """
    if not recipe.sets:
        raise ConfigError("sets is empty: name at least one, such as sets.unsafe")
    work = Work([], {}, {}, {})
    made = {name: _attacks(recipe, name) for name in recipe.sets}
    work.read.update((name, _read(recipe, name)) for name in recipe.sets)
    for name, read in work.read.items():
        kind, samples = recipe.sets[name].kind, read.samples
        work.attacks[name], work.coverage[name] = [], {}
        work.asks.extend(Ask(name, kind, "clean", 0, s, s.question) for s in samples)
        for title, attack in made[name].items():
            attack = ready(attack, samples, f"{name}-{title}")
            rewrites, work.coverage[name][title] = attacks.apply(attack, samples, title)
            if attack.shots:
                work.attacks[name].append(AppliedAttack(title, attack.shots, attack.control))
            for sample, rows in zip(samples, rewrites, strict=True):
                shots = enumerate(rows, start=1)
                work.asks.extend(Ask(name, kind, title, k, row, sample.question) for k, row in shots)
    return work


def _attacks(recipe: EvalRecipe, name: str) -> dict[str, Attack]:
    options = recipe.sets[name]
    if "clean" in options.attacks:
        raise ConfigError(f"sets.{name}.attacks.clean: the clean question is always asked; choose another name")
    return {
        title: attacks.make(fields, "the recipe", f"sets.{name}.attacks.{title}", options.kind)
        for title, fields in options.attacks.items()
    }


def _read(recipe: EvalRecipe, name: str) -> Source:
    read = sources.read_all(recipe.sets[name].sources)
    if not read.samples:
        raise ConfigError(f"sets.{name}: no sample in {[s.path for s in recipe.sets[name].sources]}")
    seen: dict[str, Sample] = {}
    for sample in read.samples:
        if sample.id in seen:
            raise ConfigError(
                f"sets.{name}: id {sample.id!r} twice, in {seen[sample.id].source} and {sample.source}; attacks are "
                "joined by id, so make two sets of them"
            )
        seen[sample.id] = sample
    return read


# ------------------------------------------------------------------------------------------------- keys


def settings(recipe: EvalRecipe, model_hash: str, chat_template_hash: str) -> dict[str, Any]:
    """What every answer depends on beside its question."""
    return {
        "model_hash": model_hash,
        "chat_template_hash": chat_template_hash,
        "dtype": recipe.model.dtype,
        "template": asdict(recipe.template),
        "generation": {
            "decoding": "greedy",
            "max_new_tokens": recipe.generation.max_new_tokens,
            "backend": recipe.generation.backend,
        },
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
    if sample.begun:
        content["begun"] = sample.begun
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_hash(path: str) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def row(identity: str, ask: Ask, response: str) -> Row:
    """What is written of one answer; of one that was begun, what the model went on with."""
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
        **({"references": list(ask.sample.references)} if ask.sample.references else {}),
        **({"begun": ask.sample.begun} if ask.sample.begun else {}),
        "response": response,
    }


# ---------------------------------------------------------------------------------- chunks and the manifest


@dataclass(frozen=True)
class Chunk:
    """What a worker claims at once: keys of questions of like length, under a name that they decide."""

    name: str
    keys: list[str]


def chunks(asks: Mapping[str, Ask], size: int) -> list[Chunk]:
    """The work list in chunks of `size`, the longest questions first.

    Rows of like length waste little padding, and a batch that does not fit into memory fails at the start.
    """
    order = sorted(asks, key=lambda key: -_length(asks[key].sample))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [Chunk(hashlib.sha256("".join(part).encode()).hexdigest()[:16], part) for part in parts]


def _length(sample: Sample) -> int:
    """Characters of the prompt; a picture is about as long in every one."""
    return len(sample.question) + sum(len(text) for turn in sample.history for text in turn)


def by_condition(asks: Iterable[Ask]) -> dict[str, dict[str, int]]:
    """How many there are of each set and attack."""
    table: dict[str, dict[str, int]] = {}
    for ask in asks:
        attacks = table.setdefault(ask.set, {})
        attacks[ask.attack] = attacks.get(ask.attack, 0) + 1
    return table


def claim(suite: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Make `suite` this evaluation's directory, or check that it already is; returns the manifest that stands there.

    Raises ConfigError naming each of `manifest["settings"]` in which the one there differs.
    """
    file = suite / "manifest.json"
    if not file.exists() and create(file, json.dumps(manifest, indent=1) + "\n"):
        return dict(manifest)
    check(suite, manifest["settings"])
    return json.loads(file.read_text(encoding="utf-8"))


def check(suite: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where `suite` is another evaluation's directory, naming each of the settings that differ."""
    file = suite / "manifest.json"
    if not file.exists():
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    if changed := differences(_plain(settings), there["settings"]):
        raise ConfigError(
            f"{suite} holds answers of another evaluation: {'; '.join(changed)}. Choose another `suite` "
            "name, or move that directory away"
        )


def coverage_report(work: Work) -> dict[str, Any]:
    """What the manifest says of the work list: counts, and up to ten ids of each kind of miss."""
    return {
        name: {
            "samples": sum(a.set == name and a.attack == "clean" for a in work.asks),
            "skipped_records": work.read[name].skipped,
            "dropped": dict(work.read[name].dropped),
            "renamed": work.read[name].renamed,
            "attacks": {
                title: {
                    "asked": c.covered,
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
