"""Forget and retain sets by the paper's steps, and safety data whose openings do not predict the answer.

forget: the unsafe questions with *harvested* answers, what a model really answers, in place of the refusals.
retain: the safe pairs, filled up from general sources. diversified: all safety data, reworded (`data.diversify`), or
else the forget and retain sets are reworded themselves.
Each in the `samples` format, beside `prepare.json` with the counts of every step. A pure function of the recipe and its
inputs: the same sets on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from mirage_dist import disk, state
from mirage_dist.config import config_hash, differences, to_dict
from mirage_dist.data import diversify, formats, pictures, sources, stream, tables, words
from mirage_dist.data.diversify import Reword
from mirage_dist.data.formats import Split
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.harvest import Answers, as_given, harvest
from mirage_dist.data.refusals import FEW, PhraseList
from mirage_dist.data.sample import Sample
from mirage_dist.data.sources import LeftOut, Source
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, DiversifyConfig, PrepareRecipe, SourceConfig

PREPARED = "prepare.json"
NOT_THE_DATA = ("out", "world")  # where the result lies, and what makes the inputs: those are hashed themselves


class ForgetCounts(TypedDict):
    """questions: unsafe ones. unmatched: those without an answer. left_out: reason -> answers that were not taken."""

    samples: int
    questions: int
    answers: str
    unmatched: int
    left_out: dict[str, int]
    read: LeftOut


class RetainCounts(TypedDict):
    """unsafe_questions: refusals about safe pictures. fill_skipped: drawn samples without a whole picture or answer."""

    samples: int
    safe_pairs: int
    unsafe_questions: int
    filled: int
    fill_skipped: int
    read: LeftOut


class DiversifiedCounts(TypedDict):
    """samples: what came of the questions. read: of safety data that were read for this; absent of reworded sets."""

    samples: int
    questions: int
    not_reworded: int
    read: NotRequired[LeftOut]


class Counts(TypedDict, total=False):
    """forget, retain: before they are reworded. pictures_in_both: pictures, by their bytes, that are in both sets."""

    forget: ForgetCounts
    retain: RetainCounts
    pictures_in_both: int
    diversified: DiversifiedCounts


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
    safety data.
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
            sets["forget"], counts["forget"] = _forget(recipe, harvested, refuses)
            sets["retain"], counts["retain"] = _retain(recipe)
            shown = ([sample.image for sample in sets[name]] for name in ("forget", "retain"))
            counts["pictures_in_both"] = len(pictures.shared(*shown))
        if recipe.diversify is not None and recipe.diversify.rewords == "sets":
            sets, counts["diversified"] = _reworded(recipe, recipe.diversify, sets, reword)
        elif recipe.diversify is not None:
            sets["diversified"], counts["diversified"] = _diversified(recipe, recipe.diversify, reword)
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
    return "; ".join(parts)


def check(recipe: PrepareRecipe) -> None:
    """Raise ConfigError for a setting that is missing or would not be used. Reads no data."""
    if recipe.answers == "harvest" and recipe.harvest is None:
        raise ConfigError("harvest is missing: a JSONL file or folder of answers to forget, or set answers=as_given")
    if recipe.answers != "harvest" and recipe.harvest is not None:
        raise ConfigError(f"harvest={recipe.harvest} is not read with answers={recipe.answers}; set harvest=null")
    if recipe.answers == "none":
        if recipe.diversify is None:
            raise ConfigError("answers=none and no `diversify`: there is nothing to prepare")
        if recipe.refusals is not None:
            raise ConfigError(f"refusals={recipe.refusals} is not read with answers=none; leave it out")
        if recipe.fill or recipe.retain_size is not None or recipe.unsafe_questions_on_safe_images:
            raise ConfigError("answers=none makes no retain set; leave out its options (fill, retain_size, …)")
    if recipe.diversify is not None and recipe.diversify.rewords == "sets" and recipe.answers == "none":
        raise ConfigError("diversify.rewords=sets: answers=none makes no forget and retain sets to reword")
    if recipe.diversify is not None and recipe.diversify.templates:
        words.check_templates(recipe.diversify.templates, "diversify.templates")
    if recipe.fill and recipe.retain_size is None:
        raise ConfigError("retain_size is missing: how many samples to retain, `fill` included")
    if not 0 <= recipe.min_match <= 1:
        raise ConfigError(f"min_match={recipe.min_match}; expected a share from 0 to 1")


def check_place(recipe: PrepareRecipe) -> None:
    """Raise ConfigError when something else lies at `out`, OSError when `out` cannot be made. Makes nothing."""
    out = Path(recipe.out)
    if not os.path.lexists(out):
        disk.check_place(out)
    elif not os.path.lexists(out / PREPARED):
        raise ConfigError(f"{out} exists and holds no {PREPARED}; choose another `out`, or move it away")


# -------------------------------------------------------------------------------------------------- sets


def _forget(recipe: PrepareRecipe, harvested: Answers | None, refuses: PhraseList) -> tuple[list[Sample], ForgetCounts]:
    unsafe = _safety(recipe, "unsafes")
    questions = unsafe.samples
    if not questions:
        raise ConfigError(f"safety: no unsafe question in {[s.path for s in recipe.safety]}; nothing to forget")
    answers = as_given(questions, refuses) if harvested is None else harvested
    if answers.unread > FEW * answers.count:
        log.warning(
            f"{recipe.harvest or 'safety'}: {answers.unread} answers to forget are in a script of which the list of "
            "refusals has no phrase, so that a refusal among them is not recognised; name a list with `refusals`"
        )
    pairs, left_out = list(zip(questions, answers.of(questions), strict=True)), dict(answers.left_out)
    forget = [replace(sample, answer=answer) for sample, answer in pairs if answer is not None]
    if not forget or len(forget) / len(questions) < recipe.min_match:
        of_data = {(sample.id, sample.question) for sample in questions}
        unanswered = next((sample.id, sample.question) for sample, answer in pairs if answer is None)
        unused = next((key for key in answers.by_question if key not in of_data), next(iter(answers.by_name), None))
        joined = "picture or id" if answers.by_name else "(id, question)"
        raise ConfigError(
            f"{recipe.harvest or 'safety'}: answers to forget for {len(forget)} of {len(questions)} unsafe questions; "
            f"min_match={recipe.min_match} (answers: {answers.count}; left out: {left_out or 'none'}). They are "
            f"joined by {joined}: {unanswered} has no answer, {unused or 'no answer'} matches no question"
        )
    counts: ForgetCounts = {
        "samples": len(forget),
        "questions": len(questions),
        "answers": recipe.answers,
        "unmatched": len(questions) - len(forget),
        "left_out": left_out,
        "read": unsafe.left_out(),
    }
    return forget, counts


def _retain(recipe: PrepareRecipe) -> tuple[list[Sample], RetainCounts]:
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
    counts: RetainCounts = {
        "samples": len(kept) + len(general),
        "safe_pairs": len(safe.samples),
        "unsafe_questions": len(others.samples),
        "filled": len(general),
        "fill_skipped": skipped,
        "read": safe.left_out(),
    }
    return [*kept, *general], counts


def _draw(recipe: PrepareRecipe, count: int, own: int) -> tuple[list[Sample], int]:
    """`count` general samples, drawn by the seed, in file order; and how many had no whole picture, or no answer.

    Only the pictures of drawn samples are decoded: a general source may have hundreds of thousands.
    """
    strict = {s.path for s in recipe.fill if s.on_bad_record == "error"}
    pool: list[Sample] = []
    most: dict[str, int] = {}
    for config in recipe.fill:
        pool += (samples := sources.read(config, check_images=False).samples)
        most |= {s.image: max(config.max_pixels, most.get(s.image, 0)) for s in samples if s.image}
    order = np.random.default_rng(stream.derived_seed(recipe.seed, "fill")).permutation(len(pool)).tolist()
    drawn: list[int] = []
    tried = 0
    while len(drawn) < count and tried < len(order):
        candidates = order[tried : tried + count - len(drawn)]
        tried += len(candidates)
        paths = (image for i in candidates if (image := pool[i].image))
        faults = pictures.faults(paths, "pictures of the fill", most=most)
        for i in candidates:
            fault = faults.get(pool[i].image or "")
            fault = f"image {pool[i].image}: {fault}" if fault else "" if pool[i].answer.strip() else sources.EMPTY
            if fault and pool[i].source in strict:
                raise ConfigError(f"{pool[i].source}: sample {pool[i].id!r}: {fault}")
            drawn += [] if fault else [i]
    if len(drawn) < count:
        raise ConfigError(
            f"retain_size={recipe.retain_size}: {own} pairs of the safety data and {len(drawn)} usable samples of "
            f"{len(pool)} in fill are {count - len(drawn)} too few"
        )
    return [pool[i] for i in sorted(drawn)], tried - count


def _safety(recipe: PrepareRecipe, split: Split) -> Source:
    """The samples of one split, read as an evaluation reads them, so that ids agree; those to retain with an answer."""
    own = [part for config in recipe.safety if (part := formats.as_format(config).of_split(split)) is not None]
    source = sources.read_all(own, answered=split != "unsafes")
    return replace(source, samples=[s for s in source.samples if s.safe == (split == "safe_safes")])


def _diversified(
    recipe: PrepareRecipe, config: DiversifyConfig, reword: Reword | None
) -> tuple[list[Sample], DiversifiedCounts]:
    safety = sources.read_all(recipe.safety, answered=True)
    samples, failed = diversify.diversify(safety.samples, config, recipe.seed, reword)
    return samples, {
        "samples": len(samples),
        "questions": len(safety.samples),
        "not_reworded": failed,
        "read": safety.left_out(),
    }


def _reworded(
    recipe: PrepareRecipe, config: DiversifyConfig, sets: Mapping[str, list[Sample]], reword: Reword | None
) -> tuple[dict[str, list[Sample]], DiversifiedCounts]:
    """The forget and retain sets with every wording equally often in each."""
    forget, retain = sets["forget"], sets["retain"]
    kept = [False] * len(forget) + [True] * len(retain)
    reworded, failed = diversify.wordings_of([*forget, *retain], kept, config, recipe.seed, reword)
    parts = {"forget": reworded[: len(forget)], "retain": reworded[len(forget) :]}
    new = {name: [sample for wordings in part for sample in wordings] for name, part in parts.items()}
    samples = sum(map(len, new.values()))
    return new, {"samples": samples, "questions": len(kept), "not_reworded": failed}


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
