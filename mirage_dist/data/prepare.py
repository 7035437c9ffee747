"""Forget and retain sets by the paper's steps.

forget: the unsafe questions with *harvested* answers, what a model really tells, in place of the refusals.
retain: the safe pairs, filled up from a general source. Both in the `samples` format, beside `prepare.json` with the
counts of every step. The same bytes on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mirage_dist.config import ConfigError, PrepareRecipe, config_hash, differences
from mirage_dist.data import sources, stream
from mirage_dist.data.refusals import is_refusal
from mirage_dist.data.sources import Sample

NOT_THE_DATA = ("out", "world")  # where the result lies, and what makes the inputs: those are hashed themselves


def prepare(recipe: PrepareRecipe) -> dict[str, Any]:
    """Write `out`/forget.jsonl, retain.jsonl and prepare.json, or reuse what is there; returns prepare.json.

    Raises ConfigError for bad data, a join that matches less than `min_match`, an empty set, a fill that is too
    small, or an `out` that holds sets of another recipe or of other inputs.
    """
    out = Path(recipe.out)
    told: dict[str, Any] = {"config_hash": config_hash(recipe, NOT_THE_DATA), "inputs": _hashes(recipe)}
    file = out / "prepare.json"
    if file.is_file():
        there = json.loads(file.read_text())
        changed = differences(told, {name: there[name] for name in told})
        if changed:
            raise ConfigError(f"{out} holds sets prepared otherwise ({'; '.join(changed)}); choose another `out`")
        return there
    if out.exists():
        raise ConfigError(f"{out} exists and holds no prepare.json; choose another `out`")
    safety = sources.read_all(recipe.safety)
    forget, harvest_counts = _forget(recipe, [s for s in safety.samples if is_forget(s)])
    retain, retain_counts = _retain(recipe, safety.samples)
    counts = {"left_out": dict(safety.dropped), "skipped": safety.skipped, **harvest_counts, **retain_counts}
    result = {**told, "seed": recipe.seed, "counts": {**counts, "forget": len(forget), "retain": len(retain)}}
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sources.write_samples(partial / "forget.jsonl", forget)
    sources.write_samples(partial / "retain.jsonl", retain)
    (partial / "prepare.json").write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(out)
    return result


def is_forget(sample: Sample) -> bool:
    """An unsafe question about an unsafe picture; VLGuard names a category for these only."""
    return not sample.safe and bool(sample.category)


def _forget(recipe: PrepareRecipe, unsafe: Sequence[Sample]) -> tuple[list[Sample], dict[str, int]]:
    if not unsafe:
        raise ConfigError(f"safety: no unsafe question in {[s.path for s in recipe.safety]}; nothing to forget")
    if recipe.answers == "as_given":
        sources.check_forget(unsafe)
        return list(unsafe), {"asked": len(unsafe)}
    if recipe.harvest is None:
        raise ConfigError("harvest is missing: a JSONL file or folder of answers to forget, or set answers=as_given")
    harvested, refusals = _harvest(Path(recipe.harvest))
    forget = [
        dataclasses.replace(sample, answer=harvested[sample.id, sample.question])
        for sample in unsafe
        if (sample.id, sample.question) in harvested
    ]
    if not forget or len(forget) < recipe.min_match * len(unsafe):
        wanted, example = (unsafe[0].id, unsafe[0].question), next(iter(harvested), None)
        raise ConfigError(
            f"{recipe.harvest}: answers for {len(forget)} of {len(unsafe)} unsafe questions (min_match "
            f"{recipe.min_match:.0%}; {refusals} harvested answers were refusals). Joined by (id, question): the data "
            f"have {wanted}, the harvest has {example}"
        )
    return forget, {"asked": len(unsafe), "harvested_refusals": refusals, "unmatched": len(unsafe) - len(forget)}


def _harvest(path: Path) -> tuple[dict[tuple[str, str], str], int]:
    """(id, question) -> answer, the longest where there are several; and how many were refusals, left out."""
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    found: dict[tuple[str, str], str] = {}
    refusals = 0
    for file in files:
        for row in _rows(file):
            if row.get("attack", "clean") != "clean":
                continue
            if is_refusal(row["response"]):
                refusals += 1
                continue
            key = (str(row["id"]), row["question"])
            found[key] = max(found.get(key, ""), row["response"], key=len)
    return found, refusals


def _rows(file: Path) -> list[dict[str, Any]]:
    """Lines with an id, a question and a response; a last line without an end is a worker's that died."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines[:-1]):
        try:
            row = json.loads(line)
            missing = [name for name in ("id", "question", "response") if name not in row]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file}: record {number}: not a JSON object: {error}") from error
        if missing:
            raise ConfigError(f"{file}: record {number}: field {missing[0]!r} is missing")
        rows.append(row)
    return rows


def _retain(recipe: PrepareRecipe, safety: Sequence[Sample]) -> tuple[list[Sample], dict[str, int]]:
    kept = [s for s in safety if s.safe]
    if recipe.unsafe_questions_on_safe_images:
        kept += [s for s in safety if not s.safe and not is_forget(s)]
    own = len(kept)
    missing = 0 if recipe.retain_size is None else recipe.retain_size - own
    if missing < 0:
        raise ConfigError(f"retain_size={recipe.retain_size}: the safety data alone have {own} pairs to retain")
    if missing:
        general = sources.read_all(recipe.fill).samples
        if len(general) < missing:
            raise ConfigError(
                f"retain_size={recipe.retain_size}: {own} safe pairs and {len(general)} general samples are too few"
            )
        order = np.random.default_rng(stream.derived_seed(recipe.seed, "fill")).permutation(len(general))
        kept += [general[i] for i in sorted(order[:missing])]
    if not kept:
        raise ConfigError("retain: no safe pair and nothing to fill up with")
    return kept, {"safe_pairs": own, "filled": missing}


def _hashes(recipe: PrepareRecipe) -> dict[str, str]:
    """SHA-256 of every file that is read, by its role; answers by content, whichever worker wrote them."""
    named = {f"{role}[{i}]": Path(s.path) for role in ("safety", "fill") for i, s in enumerate(getattr(recipe, role))}
    found = {name: _sha256(path) for name, path in named.items()}
    if recipe.harvest is not None:
        pairs, _ = _harvest(Path(recipe.harvest))
        found["harvest"] = hashlib.sha256(json.dumps(sorted(pairs.items())).encode()).hexdigest()
    return found


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def summary(result: dict[str, Any]) -> str:
    """One line for the log."""
    return ", ".join(f"{name} {value}" for name, value in result["counts"].items())
