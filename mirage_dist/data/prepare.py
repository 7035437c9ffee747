"""Forget and retain sets by the paper's steps, and safety data whose openings say nothing.

forget: the unsafe questions with *harvested* answers, what a model really tells, in place of the refusals.
retain: the safe pairs, filled up from general sources. diversified: all safety data, worded anew (`data.diversify`).
Each in the `samples` format, beside `prepare.json` with the counts of every step. A pure function of the recipe and its
inputs: the same sets on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mirage_dist.config import config_hash, differences, to_dict
from mirage_dist.data import diversify, sources, stream, words
from mirage_dist.data.diversify import Reword
from mirage_dist.data.refusals import is_refusal
from mirage_dist.data.sample import Sample
from mirage_dist.data.sources import Source
from mirage_dist.schema import ConfigError, PrepareRecipe

NOT_THE_DATA = ("out", "world")  # where the result lies, and what makes the inputs: those are hashed themselves

Key = tuple[str, str]  # (id, question)
Split = Literal["unsafes", "safe_safes", "safe_unsafes"]


def prepare(recipe: PrepareRecipe, reword: Reword | None = None) -> dict[str, Any]:
    """Write the recipe's sets and prepare.json into `out`, or reuse what is there; returns prepare.json.

    forget.jsonl and retain.jsonl, unless there is nothing to forget; diversified.jsonl where the recipe diversifies.
    reword: see `data.diversify`, for a recipe that names a chat model.

    {"config", "config_hash", "seed", "inputs": {role: SHA-256}, "sets": {file: SHA-256}, "counts"}. The embedded world
    is made first where the recipe names one that is not there.
    Raises ConfigError for bad data, a join that matches less than `min_match`, an empty set, a fill that is too
    small, or an `out` that holds something else: sets of another recipe or other inputs, or changed ones.
    """
    _check(recipe)
    out = Path(recipe.out)
    harvest = None if recipe.harvest is None else _harvest(Path(recipe.harvest))
    config = {name: value for name, value in to_dict(recipe).items() if name not in NOT_THE_DATA}
    told = {"config": config, "inputs": _hashes(recipe, harvest)}
    if not out.exists():
        sets: dict[str, list[Sample]] = {}
        counts: dict[str, Any] = {}
        if recipe.answers != "none":
            sets["forget"], counts["forget"] = _forget(recipe, harvest)
            sets["retain"], counts["retain"] = _retain(recipe)
            counts["pictures_in_both"] = len(sources.shared_images(sets["forget"], sets["retain"]))
        if recipe.diversify is not None:
            sets["diversified"], counts["diversified"] = _diversified(recipe, reword)
        _publish(out, sets, {**told, "config_hash": config_hash(config), "seed": recipe.seed, "counts": counts})
    return _checked(out, told)


def summary(result: Mapping[str, Any]) -> str:
    """One line for the log."""
    told = []
    if forget := result["counts"].get("forget"):
        retain = result["counts"]["retain"]
        told.append(f"forget {forget['samples']} of {forget['questions']} unsafe questions ({forget['answers']})")
        told.append(
            f"retain {retain['samples']}: {retain['safe_pairs']} safe pairs, {retain['unsafe_questions']} unsafe "
            f"questions on safe pictures, {retain['filled']} general samples"
        )
    if worded := result["counts"].get("diversified"):
        left = f", {worded['not_reworded']} wordings could not be had" if worded["not_reworded"] else ""
        told.append(f"diversified {worded['samples']} samples of {worded['questions']} questions{left}")
    return "; ".join(told)


def _check(recipe: PrepareRecipe) -> None:
    """Every setting that is given is used."""
    if recipe.answers == "harvest" and recipe.harvest is None:
        raise ConfigError("harvest is missing: a JSONL file or folder of answers to forget, or set answers=as_given")
    if recipe.answers != "harvest" and recipe.harvest is not None:
        raise ConfigError(f"harvest={recipe.harvest} is not read with answers={recipe.answers}; set harvest=null")
    if recipe.answers == "none":
        if recipe.diversify is None:
            raise ConfigError("answers=none and no `diversify`: there is nothing to prepare")
        if recipe.fill or recipe.retain_size is not None or recipe.unsafe_questions_on_safe_images:
            raise ConfigError("answers=none makes no retain set; leave out what is about it (fill, retain_size, …)")
    if recipe.diversify is not None and recipe.diversify.templates:
        words.check_templates(recipe.diversify.templates, "diversify.templates")
    if recipe.fill and recipe.retain_size is None:
        raise ConfigError("retain_size is missing: how many samples to retain, `fill` included")
    if not 0 <= recipe.min_match <= 1:
        raise ConfigError(f"min_match={recipe.min_match}; expected a share from 0 to 1")


# ------------------------------------------------------------------------------------------------- forget


@dataclass
class _Answers:
    """Answers to forget by question. counts: rows that gave none, by reason."""

    found: dict[Key, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, key: Key, answer: str) -> None:
        """A refusal is counted and left out; of several answers the longest stays, whatever their order."""
        reason = "empty" if not answer.strip() else "refusals" if is_refusal(answer) else None
        if reason:
            self.counts[reason] += 1
        else:
            self.found[key] = max(self.found.get(key, ""), answer, key=lambda text: (len(text), text))


def _harvest(path: Path) -> _Answers:
    """What a model answered to the questions as they are; attacked ones are left out."""
    answers = _Answers()
    for file in _harvest_files(path):
        for row in _rows(file, answers.counts):
            if row.get("attack") in (None, "clean"):
                answers.add((str(row["id"]), row["question"]), row["response"])
            else:
                answers.counts["attacked"] += 1
    return answers


def _harvest_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ConfigError(
            f"harvest={path}: no JSONL file here; `mirage eval configs/eval/harvest.yaml` writes a folder of them"
        )
    return files


def _rows(file: Path, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Lines with an id, a question and a response. A last line that breaks off is a worker's that died; counted."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    for number, line in enumerate(lines):
        last = number + 1 == len(lines)
        if last and not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # no JSON, or not even UTF-8
            if last:
                counts["half_lines"] += 1
                continue
            raise ConfigError(f"{file}: record {number}: not JSON: {error}") from error
        for name in ("id", "question", "response"):
            kinds = (str, int) if name == "id" else str
            if not isinstance(row, dict) or not isinstance(row.get(name), kinds):
                raise ConfigError(f"{file}: record {number}: field {name!r} is missing or no text; is this a harvest?")
        yield row


def _given(samples: Sequence[Sample]) -> _Answers:
    """The data's own answers."""
    answers = _Answers()
    for sample in samples:
        answers.add((sample.id, sample.question), sample.answer)
    return answers


def _forget(recipe: PrepareRecipe, harvest: _Answers | None) -> tuple[list[Sample], dict[str, Any]]:
    unsafe = _safety(recipe, "unsafes")
    asked = unsafe.samples
    if not asked:
        raise ConfigError(f"safety: no unsafe question in {[s.path for s in recipe.safety]}; nothing to forget")
    answers = _given(asked) if harvest is None else harvest
    found = answers.found
    keys = [(sample.id, sample.question) for sample in asked]
    forget = [replace(s, answer=found[key]) for s, key in zip(asked, keys, strict=True) if key in found]
    if not forget or len(forget) / len(asked) < recipe.min_match:
        known = set(keys)
        without = next(key for key in keys if key not in found)
        unused = next((key for key in found if key not in known), None)
        raise ConfigError(
            f"{recipe.harvest or 'safety'}: answers to forget for {len(forget)} of {len(asked)} unsafe questions; "
            f"min_match={recipe.min_match} (answers: {len(found)}; left out: {dict(answers.counts) or 'none'}). They "
            f"are joined by (id, question): {without} has none, {unused or 'no answer'} is of no question"
        )
    used = {"answers": recipe.answers, "unmatched": len(asked) - len(forget), "left_out": dict(answers.counts)}
    return forget, {"samples": len(forget), "questions": len(asked), **used, "read": _told(unsafe)}


# ------------------------------------------------------------------------------------------------- retain


def _retain(recipe: PrepareRecipe) -> tuple[list[Sample], dict[str, Any]]:
    safe, others = _safety(recipe, "safe_safes"), Source([])
    if recipe.unsafe_questions_on_safe_images:
        others = _safety(recipe, "safe_unsafes")
    kept = [*safe.samples, *others.samples]
    missing = 0 if recipe.retain_size is None else recipe.retain_size - len(kept)
    if missing < 0:
        raise ConfigError(f"retain_size={recipe.retain_size}: the safety data alone have {len(kept)} pairs to retain")
    general, skipped = _draw(recipe, missing, len(kept)) if missing else ([], 0)
    if not kept and not general:
        raise ConfigError("retain: no safe pair and nothing to fill up with; set retain_size and fill")
    counts = {
        "samples": len(kept) + len(general),
        "safe_pairs": len(safe.samples),
        "unsafe_questions": len(others.samples),
        "filled": len(general),
        "fill_skipped": skipped,
        "read": _told(safe),
    }
    return [*kept, *general], counts


def _draw(recipe: PrepareRecipe, count: int, own: int) -> tuple[list[Sample], int]:
    """`count` general samples, drawn by the seed, in file order; and how many had no whole picture.

    Only the pictures of drawn samples are decoded: a general source may have hundreds of thousands.
    """
    strict = {s.path for s in recipe.fill if s.on_bad_record == "error"}
    pool = [sample for s in recipe.fill for sample in sources.read(s, check_images=False).samples]
    order = np.random.default_rng(stream.derived_seed(recipe.seed, "fill")).permutation(len(pool)).tolist()
    drawn: list[int] = []
    tried = 0
    while len(drawn) < count and tried < len(order):
        candidates = order[tried : tried + count - len(drawn)]
        tried += len(candidates)
        faults = sources.image_faults([pool[i] for i in candidates], "the fill")
        for i in candidates:
            fault = faults.get(pool[i].image or "")
            if fault and pool[i].source in strict:
                raise ConfigError(f"{pool[i].source}: sample {pool[i].id!r}: image {pool[i].image}: {fault}")
            drawn += [] if fault else [i]
    if len(drawn) < count:
        raise ConfigError(
            f"retain_size={recipe.retain_size}: {own} pairs of the safety data and {len(drawn)} usable samples of "
            f"{len(pool)} in fill are {count - len(drawn)} too few"
        )
    return [pool[i] for i in sorted(drawn)], tried - count


def _safety(recipe: PrepareRecipe, split: Split) -> Source:
    """The samples of one of VLGuard's splits, read as an evaluation reads it, so that ids agree.

    A source that names a split gives that one only. Other formats know safe and unsafe pairs.
    """
    wanted = [
        replace(s, split=split) if s.format == "vlguard" else s
        for s in recipe.safety
        if (s.split in ("all", split) if s.format == "vlguard" else split != "safe_unsafes")
    ]
    found = sources.read_all(wanted)
    return replace(found, samples=[s for s in found.samples if s.safe == (split == "safe_safes")])


def _told(source: Source) -> dict[str, Any]:
    return {"dropped": dict(source.dropped), "renamed": source.renamed, "skipped": source.skipped}


def _diversified(recipe: PrepareRecipe, reword: Reword | None) -> tuple[list[Sample], dict[str, Any]]:
    assert recipe.diversify is not None
    safety = sources.read_all(recipe.safety)
    worded, failed = diversify.diversify(safety.samples, recipe.diversify, recipe.seed, reword)
    counts = {"samples": len(worded), "questions": len(safety.samples), "not_reworded": failed}
    return worded, {**counts, "read": _told(safety)}


# -------------------------------------------------------------------------------------------------- files


def _publish(out: Path, sets: Mapping[str, Sequence[Sample]], told: dict[str, Any]) -> None:
    """Fill a folder beside `out`, then rename it: `out` is whole or absent. Another process may have been first."""
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for name, samples in sets.items():
            sources.write_samples(partial / f"{name}.jsonl", samples)
        told["sets"] = {f"{name}.jsonl": _sha256(partial / f"{name}.jsonl") for name in sets}
        (partial / "prepare.json").write_text(json.dumps(told, indent=1) + "\n")
        partial.rename(out)
    except OSError:
        if not (out / "prepare.json").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checked(out: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """prepare.json of `out`, if the sets there are what the recipe and its inputs give, and as they were written."""
    file = out / "prepare.json"
    if not file.is_file():
        raise ConfigError(f"{out} exists and holds no prepare.json; choose another `out`, or move it away")
    there = json.loads(file.read_text())
    changed = differences(told, {name: there.get(name) for name in told})
    if changed:
        raise ConfigError(f"{out} holds sets prepared otherwise ({'; '.join(changed)}); choose another `out`")
    for name, digest in there["sets"].items():
        if _sha256(out / name) != digest:
            raise ConfigError(f"{out / name} is not as it was written; move {out} away to prepare it again")
    return there


def _hashes(recipe: PrepareRecipe, harvest: _Answers | None) -> dict[str, str]:
    """SHA-256 of every file that is read, by its role; of harvested answers by content, whichever worker wrote them."""
    found = {f"safety[{i}]": _sha256(Path(s.path)) for i, s in enumerate(recipe.safety)}
    found |= {f"fill[{i}]": _sha256(Path(s.path)) for i, s in enumerate(recipe.fill)}
    for name, given in (("safety", recipe.safety), ("fill", recipe.fill)):
        annotated = {f"{name}[{i}].annotations": s.annotations for i, s in enumerate(given) if s.annotations}
        found |= {role: _sha256(Path(file)) for role, file in annotated.items()}
    if harvest is not None:
        found["harvest"] = hashlib.sha256(json.dumps(sorted(harvest.found.items())).encode()).hexdigest()
    return found


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
