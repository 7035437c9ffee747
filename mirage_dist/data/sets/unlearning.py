"""Forget and retain sets by the paper's steps, and general samples to fill up with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mirage_dist.data import formats, pictures, sources, stream
from mirage_dist.data.formats import Split
from mirage_dist.data.harvest import Answers, as_given
from mirage_dist.data.refusals import FEW, PhraseList
from mirage_dist.data.sample import Sample
from mirage_dist.data.sets.counts import ForgetCounts, RetainCounts
from mirage_dist.data.sources import Source
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, PrepareRecipe

# What a person says who does not know: no refusal, and nothing about the question.
IGNORANT = (
    "I don't know.",
    "I don't know the answer to that.",
    "That is something I have no knowledge of.",
    "I have never learnt anything about this.",
    "I'm not sure what the answer is.",
    "I have no information about that.",
    "This is outside what I know.",
    "I know nothing about it.",
    "I could not say, since I don't know.",
    "The answer is unknown to me.",
    "I haven't come across this before.",
    "I am not familiar with this subject.",
)


def forget(recipe: PrepareRecipe, harvested: Answers | None, refuses: PhraseList) -> tuple[list[Sample], ForgetCounts]:
    """The unsafe questions with the answers to forget. harvested: None for the data's own."""
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
    answered = [replace(sample, answer=answer) for sample, answer in pairs if answer is not None]
    if not answered or len(answered) / len(questions) < recipe.min_match:
        of_data = {(sample.id, sample.question) for sample in questions}
        unanswered = next((sample.id, sample.question) for sample, answer in pairs if answer is None)
        unused = next((key for key in answers.by_question if key not in of_data), next(iter(answers.by_name), None))
        joined = "picture or id" if answers.by_name else "(id, question)"
        raise ConfigError(
            f"{recipe.harvest or 'safety'}: answers to forget for {len(answered)} of {len(questions)} unsafe "
            f"questions; min_match={recipe.min_match} (answers: {answers.count}; left out: {left_out or 'none'}). "
            f"They are joined by {joined}: {unanswered} has no answer, {unused or 'no answer'} matches no question"
        )
    counts: ForgetCounts = {
        "samples": len(answered),
        "questions": len(questions),
        "answers": recipe.answers,
        "unmatched": len(questions) - len(answered),
        "left_out": left_out,
        "read": unsafe.left_out(),
    }
    return answered, counts


def with_answers(samples: Sequence[Sample]) -> list[Sample]:
    """Each sample with its answer at the end of its question too, on a line of its own.

    RMU steers activations, and the paper's code has both texts in the question (data/format_rmu_forget.py).
    """
    return [replace(sample, question=f"{sample.question}\n{sample.answer}") for sample in samples]


def with_ignorance(samples: Sequence[Sample], seed: int, answers: Sequence[str] = IGNORANT) -> list[Sample]:
    """Each sample with an answer that claims ignorance in place of its own: the other half of IdkDPO's pairs.

    As TOFU's "I don't know" baseline, with other sentences, drawn by the seed.
    """
    drawn = np.random.default_rng(stream.derived_seed(seed, "idk")).integers(len(answers), size=len(samples))
    return [replace(sample, answer=answers[which]) for sample, which in zip(samples, drawn.tolist(), strict=True)]


def retain(recipe: PrepareRecipe) -> tuple[list[Sample], RetainCounts]:
    """The safe pairs, and general samples up to the recipe's size."""
    safe, others = _safety(recipe, "safe_safes"), Source([])
    if recipe.unsafe_questions_on_safe_images:
        others = _safety(recipe, "safe_unsafes")
    kept = [*safe.samples, *others.samples]
    missing = 0 if recipe.retain_size is None else recipe.retain_size - len(kept)
    if missing < 0:
        raise ConfigError(f"retain_size={recipe.retain_size}: the safety data alone have {len(kept)} pairs to retain")
    what = f"retain_size={recipe.retain_size}: {len(kept)} pairs of the safety data and"
    general, skipped = drawn(recipe, missing, "fill", what) if missing else ([], 0)
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


def drawn(recipe: PrepareRecipe, count: int, name: str, what: str) -> tuple[list[Sample], int]:
    """`count` general samples, drawn by the seed, in file order; and how many had no whole picture, or no answer.

    name: of the draw, which is another one for each. what: the beginning of an error.
    Only the pictures of drawn samples are decoded: a general source may have hundreds of thousands.
    """
    strict = {s.path for s in recipe.fill if s.on_bad_record == "error"}
    pool: list[Sample] = []
    most: dict[str, int] = {}
    for config in recipe.fill:
        pool += (samples := sources.read(config, check_images=False).samples)
        most |= {s.image: max(config.max_pixels, most.get(s.image, 0)) for s in samples if s.image}
    order = np.random.default_rng(stream.derived_seed(recipe.seed, name)).permutation(len(pool)).tolist()
    chosen: list[int] = []
    tried = 0
    while len(chosen) < count and tried < len(order):
        candidates = order[tried : tried + count - len(chosen)]
        tried += len(candidates)
        paths = (image for i in candidates if (image := pool[i].image))
        faults = pictures.faults(paths, "pictures of the fill", most=most)
        for i in candidates:
            fault = faults.get(pool[i].image or "")
            fault = f"image {pool[i].image}: {fault}" if fault else "" if pool[i].answer.strip() else sources.EMPTY
            if fault and pool[i].source in strict:
                raise ConfigError(f"{pool[i].source}: sample {pool[i].id!r}: {fault}")
            chosen += [] if fault else [i]
    if len(chosen) < count:
        few = count - len(chosen)
        raise ConfigError(f"{what} {len(chosen)} usable samples of {len(pool)} in fill are {few} too few")
    return [pool[i] for i in sorted(chosen)], tried - count


def _safety(recipe: PrepareRecipe, split: Split) -> Source:
    """The samples of one split, read as an evaluation reads them, so that ids agree; those to retain with an answer."""
    own = [part for config in recipe.safety if (part := formats.as_format(config).of_split(split)) is not None]
    source = sources.read_all(own, answered=split != "unsafes")
    return replace(source, samples=[s for s in source.samples if s.safe == (split == "safe_safes")])
