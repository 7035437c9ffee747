"""Forget and retain sets by the paper's steps, and safety data whose openings do not predict the answer.

forget: the unsafe questions with *harvested* answers, what a model really answers, in place of the refusals.
forget_text: the same with each answer at the end of its question too, as the paper's code steers it in RMU.
idk: the same with answers that claim ignorance, which IdkDPO prefers.
retain: the safe pairs, filled up from general sources. diversified: all safety data, reworded (`data.diversify`), or
else the forget and retain sets are reworded themselves. conversations: the safety data for supervised fine-tuning, a
record a row (`data.sets.turns`); helpful: general samples to go with them.
Each in the `samples` format, beside `prepare.json` with the counts of every step. A pure function of the recipe and its
inputs: the same sets on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from mirage_dist import disk, state
from mirage_dist.config import config_hash, differences, to_dict
from mirage_dist.data import formats, pictures, sources, tables, words
from mirage_dist.data.diversify import Reword
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.harvest import Answers, harvest
from mirage_dist.data.refusals import PhraseList
from mirage_dist.data.sample import Sample
from mirage_dist.data.sets import tuning, unlearning
from mirage_dist.data.sets.counts import Counts
from mirage_dist.data.sources import Source
from mirage_dist.schema import ConfigError, PrepareRecipe, SourceConfig

PREPARED = "prepare.json"
NOT_THE_DATA = ("out", "world")  # where the result lies, and what makes the inputs: those are hashed themselves


class Inputs(TypedDict):
    """What decides the sets. config: the recipe without `out` and `world`. inputs: role -> SHA-256 of a file."""

    config: dict[str, Any]
    inputs: dict[str, str]


class Prepared(Inputs):
    """prepare.json. sets: file -> SHA-256."""

    config_hash: str
    seed: int
    counts: Counts
    sets: NotRequired[dict[str, str]]


def prepare(recipe: PrepareRecipe, reword: Reword | None = None) -> Prepared:
    """Write the recipe's sets and prepare.json into `out`, or reuse those that exist; returns prepare.json.

    forget.jsonl and retain.jsonl, unless there is nothing to forget; diversified.jsonl if the recipe diversifies the
    safety data; forget_text.jsonl, idk.jsonl, conversations.jsonl and helpful.jsonl if it asks for them.
    reword: see `data.diversify`, for a recipe that names a chat model.

    Raises ConfigError for bad data, a join that matches less than `min_match`, an empty set, a fill that is too
    small, or an `out` that holds something else: sets of another recipe or other inputs, or changed ones.
    """
    check(recipe)
    check_place(recipe)
    out = Path(recipe.out)
    refuses = PhraseList.read(recipe.refusals)
    harvested = None if recipe.harvest is None else harvest(Path(recipe.harvest), refuses)
    config = {name: value for name, value in to_dict(recipe).items() if name not in NOT_THE_DATA}
    inputs: Inputs = {"config": config, "inputs": _hashes(recipe, harvested, refuses)}
    disk.remove_leftovers(out)  # also where it is whole, and nothing is written
    if not out.exists():
        sets: dict[str, list[Sample]] = {}
        counts: Counts = {}
        if recipe.answers != "none":
            sets["forget"], counts["forget"] = unlearning.forget(recipe, harvested, refuses)
            sets["retain"], counts["retain"] = unlearning.retain(recipe)
            shown = ([sample.image for sample in sets[name]] for name in ("forget", "retain"))
            counts["pictures_in_both"] = len(pictures.shared(*shown))
        if recipe.diversify is not None and recipe.diversify.rewords == "sets":
            sets, counts["diversified"] = tuning.reworded(recipe, recipe.diversify, sets, reword)
        elif recipe.diversify is not None:
            sets["diversified"], counts["diversified"] = tuning.diversified(recipe, recipe.diversify, reword)
        if recipe.forget_text:
            sets["forget_text"] = unlearning.with_answers(sets["forget"])
        if recipe.idk:
            answers = recipe.ignorance or unlearning.IGNORANT
            sets["idk"] = unlearning.with_ignorance(sets["forget"], recipe.seed, answers)
        if recipe.conversations:
            sets["conversations"], counts["conversations"] = tuning.conversations(recipe)
        if recipe.helpful_size:
            size = recipe.helpful_size
            sets["helpful"], skipped = unlearning.drawn(recipe, size, "helpful", f"helpful_size={size}:")
            counts["helpful"] = {"samples": size, "skipped": skipped}
        _publish(out, sets, {**inputs, "config_hash": config_hash(config), "seed": recipe.seed, "counts": counts})
    return _checked(out, inputs)


def summary(result: Prepared) -> str:
    """One line for the log."""
    parts = []
    counts = result["counts"]
    if "forget" in counts and "retain" in counts:
        forget, retain = counts["forget"], counts["retain"]
        parts.append(f"forget {forget['samples']} of {forget['questions']} unsafe questions ({forget['answers']})")
        parts.append(
            f"retain {retain['samples']}: {retain['safe_pairs']} safe pairs, {retain['unsafe_questions']} unsafe "
            f"questions on safe pictures, {retain['filled']} general samples"
        )
    if "diversified" in counts:
        diversified = counts["diversified"]
        failed = diversified["not_reworded"]
        rest = f", {failed} wordings could not be made" if failed else ""
        parts.append(f"diversified {diversified['samples']} samples of {diversified['questions']} questions{rest}")
    if "conversations" in counts:
        parts.append(f"conversations {counts['conversations']['samples']}, {counts['conversations']['turns']} turns")
    if "helpful" in counts:
        parts.append(f"helpful {counts['helpful']['samples']} samples")
    return "; ".join(parts)


def check(recipe: PrepareRecipe) -> None:
    """Raise ConfigError for a setting that is missing or would not be used. Reads no data."""
    if recipe.answers == "harvest" and recipe.harvest is None:
        raise ConfigError("harvest is missing: a JSONL file or folder of answers to forget, or set answers=as_given")
    if recipe.answers != "harvest" and recipe.harvest is not None:
        raise ConfigError(f"harvest={recipe.harvest} is not read with answers={recipe.answers}; set harvest=null")
    if recipe.answers == "none":
        if recipe.diversify is None and not (recipe.conversations or recipe.helpful_size):
            raise ConfigError(
                "answers=none and no `diversify`, `conversations` or `helpful_size`: there is nothing to prepare"
            )
        if recipe.refusals is not None:
            raise ConfigError(f"refusals={recipe.refusals} is not read with answers=none; leave it out")
        unused = recipe.fill and not recipe.helpful_size
        if unused or recipe.retain_size is not None or recipe.unsafe_questions_on_safe_images:
            raise ConfigError("answers=none makes no retain set; leave out its options (fill, retain_size, …)")
        if recipe.forget_text:
            raise ConfigError("forget_text: answers=none makes no forget set; set it to false")
        if recipe.idk:
            raise ConfigError("idk: answers=none makes no forget set; leave it out")
    if recipe.diversify is not None and recipe.diversify.rewords == "sets" and recipe.answers == "none":
        raise ConfigError("diversify.rewords=sets: answers=none makes no forget and retain sets to reword")
    if recipe.diversify is not None and recipe.diversify.templates:
        words.check_templates(recipe.diversify.templates, "diversify.templates")
    if recipe.ignorance is not None and not recipe.idk:
        raise ConfigError("ignorance: these are the answers of idk.jsonl, which `idk: true` asks for")
    if recipe.ignorance is not None and not (recipe.ignorance and all(map(str.strip, recipe.ignorance))):
        raise ConfigError("ignorance: expected one sentence at least, and none that is empty")
    if recipe.fill and recipe.retain_size is None and not recipe.helpful_size:
        raise ConfigError("retain_size is missing: how many samples to retain, `fill` included")
    if recipe.helpful_size and not recipe.fill:
        raise ConfigError(f"helpful_size={recipe.helpful_size}: `fill` is missing, the sources to draw them from")
    if not 0 <= recipe.min_match <= 1:
        raise ConfigError(f"min_match={recipe.min_match}; expected a share from 0 to 1")


def check_place(recipe: PrepareRecipe) -> None:
    """Raise ConfigError when something else lies at `out`, OSError when `out` cannot be made. Makes nothing."""
    out = Path(recipe.out)
    if not os.path.lexists(out):
        disk.check_place(out)
    elif not os.path.lexists(out / PREPARED):
        raise ConfigError(f"{out} exists and holds no {PREPARED}; choose another `out`, or move it away")


# -------------------------------------------------------------------------------------------------- files


def _publish(out: Path, sets: Mapping[str, Sequence[Sample]], prepared: Prepared) -> None:
    """Write the sets and prepare.json into `out`, which is whole or absent. Another process may be first."""
    with disk.folder(out, shared=True) as folder:
        files = {f"{name}.jsonl": samples for name, samples in sets.items()}
        for name, samples in files.items():
            write_samples(folder / name, samples)
        prepared["sets"] = {name: disk.sha256(folder / name) for name in files}
        (folder / PREPARED).write_text(state.sealed("prepared", prepared, indent=1))


def _checked(out: Path, inputs: Inputs) -> Prepared:
    """prepare.json of `out`, if its sets come from this recipe and these inputs and have not changed since."""
    remedy = f"Move {out} away to prepare it again, or choose another `out`"
    prepared = cast(Prepared, state.read("prepared", out / PREPARED, remedy))
    changed = differences(inputs, {name: prepared.get(name) for name in inputs})
    if changed:
        raise ConfigError(f"{out} holds sets prepared otherwise ({'; '.join(changed)}); choose another `out`")
    for name, digest in prepared.get("sets", {}).items():
        if _sha256(out / name) != digest:
            raise ConfigError(f"{out / name} is not as it was written; move {out} away to prepare it again")
    return prepared


def _hashes(recipe: PrepareRecipe, harvested: Answers | None, refuses: PhraseList) -> dict[str, str]:
    """Role -> SHA-256 of every file that is read; of harvested answers the digest of their content."""
    roles: dict[str, str] = {}
    for key, configs in (("safety", recipe.safety), ("fill", recipe.fill)):
        for number, config in enumerate(configs):
            # A file that is none of its format is named before gigabytes are hashed.
            next(sources.parsed(config, Source([])), None)
            roles |= _files(config, f"{key}[{number}]")
    hashes = {role: _sha256(Path(file)) for role, file in roles.items()}
    if refuses.sha256 is not None:
        hashes["refusals"] = refuses.sha256
    return hashes if harvested is None else {**hashes, "harvest": harvested.digest()}


def _files(config: SourceConfig, role: str) -> dict[str, str]:
    """Role -> path of the files of a source."""
    source = formats.as_format(config)
    parts = [part.path for part in source.parts()]
    own = {role: parts[0]} if len(parts) == 1 else {f"{role}.{number}": part for number, part in enumerate(parts)}
    return {**own, **{f"{role}.{option}": file for option, file in source.other_files().items()}}


def _sha256(file: Path) -> str:
    try:
        return disk.sha256_files(tables.parts(file), file) if file.is_dir() else disk.sha256(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
