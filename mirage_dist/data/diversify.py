"""Safety data whose openings do not predict the answer: each question reworded, every wording equally in both classes.

A paraphrase-diversified SFT, the remedy on the data side that reviewers of "Safety Mirage" (arXiv 2503.11832) proposed:
if every opening leads to refusals and answers alike, no first word can stand for either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mirage_dist.data import stream, words
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError, DiversifyConfig

# (samples, first word) -> each question reworded to begin with that word, None for a question that could not be.
Reword = Callable[[Sequence[Sample], str], list[str | None]]


def diversify(
    samples: Sequence[Sample], config: DiversifyConfig, seed: int, reword: Reword | None = None
) -> tuple[list[Sample], int]:
    """The wordings of every sample, its class being whether it is safe, and the number that could not be made.

    In the order of the samples. See `wordings_of`.
    """
    wordings, failed = wordings_of(samples, [sample.safe for sample in samples], config, seed, reword)
    return [wording for own in wordings for wording in own], failed


def wordings_of(
    samples: Sequence[Sample],
    classes: Sequence[bool],
    config: DiversifyConfig,
    seed: int,
    reword: Reword | None = None,
) -> tuple[list[list[Sample]], int]:
    """`config.copies` wordings of each sample, and the number that could not be made.

    classes: of each sample, whether its answer is kept, and not refused or forgotten. Answers do not change. In each
    class every template, or opener, is used equally often, up to one if the numbers do not divide. The seed decides
    which sample gets which. With `config.keep` the original question comes first. reword: rewords by the chat model if
    `config.chat` is given (see `evals.attacks.paraphrase`).
    Raises ConfigError when one class is missing, since there is then nothing to balance, and when templates fit fewer
    than `config.min_match` of the questions.
    """
    chosen = _chosen(classes, config, seed)
    by_wording: dict[str, list[int]] = {}
    for i, wordings in enumerate(chosen):
        for wording in wordings:
            by_wording.setdefault(wording, []).append(i)
    questions: dict[tuple[int, str], str | None] = {}
    for wording, members in by_wording.items():
        own = [samples[i] for i in members]
        reworded = (
            reword(own, wording)
            if reword
            else [words.fill_template(wording, sample, config.openings) for sample in own]
        )
        questions.update(zip(((i, wording) for i in members), reworded, strict=True))
    without = [i for (i, _), question in questions.items() if question is None]
    if reword is None and len(questions) - len(without) < config.min_match * len(questions):
        first = samples[without[0]]
        raise ConfigError(
            f"diversify.templates: {len(without)} of {len(questions)} wordings could not be made, and "
            f"min_match={config.min_match}: {{rest}} needs a first word, which questions in scripts without spaces "
            f"between words do not have, such as sample {first.id!r} of {first.source}. Use templates with "
            "{question}, or openers and a chat model"
        )
    diversified: list[list[Sample]] = []
    for i, sample in enumerate(samples):
        made = [(number, questions[i, wording]) for number, wording in enumerate(chosen[i], start=1)]
        new = [replace(sample, id=f"{sample.id}~{number}", question=q) for number, q in made if q is not None]
        diversified.append([sample, *new] if config.keep else new)
    return diversified, sum(question is None for question in questions.values())


def _chosen(classes: Sequence[bool], config: DiversifyConfig, seed: int) -> list[list[str]]:
    """Each sample's templates or openers."""
    chosen: list[list[str]] = [[] for _ in classes]
    for safe in (True, False):
        members = [i for i, own in enumerate(classes) if own == safe]
        if not members:
            kind = "answer" if safe else "refusal"
            raise ConfigError(f"diversify: the safety data have no {kind} among {len(classes)} samples")
        rng = np.random.default_rng(stream.derived_seed(seed, f"diversify {safe}"))
        # Round after round of all wordings, in one order: a sample's copies differ, and uses are even.
        order = [config.wordings[i] for i in rng.permutation(len(config.wordings))]
        for place, member in enumerate(rng.permutation(members).tolist()):
            start = place * config.copies
            chosen[member] = [order[(start + copy) % len(order)] for copy in range(config.copies)]
    return chosen
