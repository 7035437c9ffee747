"""Measures of forgetting: how likely the model still finds the forgotten answers, beside wrong and unseen ones.

The measures are `erasure.forgetting`'s, of TOFU (Maini et al., 2024, arXiv 2401.06121) and open-unlearning; the answers
are those of `erasure.scoring.answers`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

import torch

from mirage_dist import stats
from mirage_dist.data import pictures
from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.encoding.conversation import called
from mirage_dist.data.sample import Sample
from mirage_dist.erasure import forgetting
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.results import (
    Difference,
    ForgetQuality,
    ForgettingResult,
    Measured,
    Measures,
    Membership,
    Never,
)
from mirage_dist.erasure.scoring.answers import Part
from mirage_dist.erasure.scoring.likelihood import Answer, Likelihood
from mirage_dist.erasure.setting import ErasureTest, Forget, Prepared, Setting
from mirage_dist.evals.models import reasoning, subject
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.model.families import guard
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe, SourceConfig
from mirage_dist.schema.names import Place
from mirage_dist.schema.numbers import Count, SomeShare
from mirage_dist.stats import two_samples

LARGEST = 690.0  # logarithm; JSON has no infinity


class Values(TypedDict):
    """One answer's measures; `truth` is the logarithm of its truth ratio."""

    id: str
    content: str
    probability: float
    loss: float
    min_k: float
    extraction_strength: float
    rouge_l: float | None
    truth: float | None
    paraphrased: bool


@dataclass(frozen=True)
class Forgetting(ErasureTest):
    """Probability of the forgotten answers, ROUGE-L to them, extraction strength, truth ratio, attack on membership.

    retain: samples to keep, of which the same is measured. unseen: samples like the forget samples that no training
    had, with the answers that state their content: what members are compared with. never: directory of a model that
    never knew the forgotten content, which gets the same template; forget quality compares the two. wrong: number of
    wrong answers to each question. min_k: share of an answer's tokens, the least likely ones, that this score counts.
    samples: most of each set.
    """

    retain: list[SourceConfig] = field(default_factory=list)
    unseen: list[SourceConfig] = field(default_factory=list)
    never: Place | None = None
    wrong: Count = 5
    min_k: SomeShare = 0.2
    samples: Count = 400

    def prepared(self, forget: Forget, recipe: EvalRecipe) -> Prepared:
        parts, without = self._read(forget, recipe.seed)
        self._check(parts, forget, recipe)
        never = None if self.never is None else self._never_subject(recipe).model_hash
        scored = {name: part.digest for name, part in parts.items()}
        return Prepared(partial(self._measure, parts, without), {"scored": scored, "never": never})

    def _check(self, parts: Mapping[str, Part], forget: Forget, recipe: EvalRecipe) -> None:
        """Raise ConfigError for samples that cannot be scored, or a model that cannot score them. Loads no weights."""
        for name, part in parts.items():
            for sample in part.samples:
                if not sample.answer.strip():
                    raise ConfigError(f"erasure.forgetting: {called(sample)} of {name} has no answer to score")
        if "unseen" in parts:
            self._check_unseen(parts["unseen"], forget, recipe.seed)
        self._check_model(recipe, recipe.model, parts, "model")
        if self.never is not None:
            own = {"forget": parts["forget"]}
            try:
                self._check_model(recipe, self._never(recipe), own, "erasure.forgetting.never")
            except ConfigError as error:
                raise ConfigError(f"erasure.forgetting.never={self.never}: {error}") from error

    def _check_unseen(self, unseen: Part, forget: Forget, seed: int) -> None:
        if not unseen.samples:
            raise ConfigError(
                "erasure.forgetting.unseen: erasure.content matches nothing in their answers; name samples whose "
                "answers state such a content, not refusals"
            )
        known = {_place(s): "retain" for s in settings.forget(self.retain, None, seed).samples}
        known |= {_place(s): "forget" for s in forget.samples}
        for sample in unseen.samples:
            if name := known.get(_place(sample)):
                raise ConfigError(f"erasure.forgetting.unseen: {called(sample)} is a {name} sample too; leave it out")

    def _check_model(self, recipe: EvalRecipe, model: EvalModelConfig, parts: Mapping[str, Part], where: str) -> None:
        config, own = settings.prompting(recipe, model)
        for name, part in parts.items():
            pictured = [sample for sample in part.samples if sample.image is not None]
            if pictured and own.text_only:
                raise ConfigError(
                    f"{where}: a text-only model, but {len(pictured)} of {len(part.samples)} samples of {name} have a "
                    f"picture (the first: {called(pictured[0])}); choose sources without pictures"
                )
            for row in _rows(part):
                own.length(row)
        _check_family(config, own, [sample for part in parts.values() for sample in part.samples], where)

    def _read(self, forget: Forget, seed: int) -> tuple[dict[str, Part], int]:
        """The sets to score by name, and the number of unseen samples left out for lack of a content."""
        parts = {"forget": Part.of(forget.samples, forget.pattern, self.wrong, self.samples, seed)}
        without = 0
        if self.retain:
            kept = settings.forget(self.retain, None, seed).samples
            parts["retain"] = Part.of(kept, forget.pattern, self.wrong, self.samples, seed)
        if self.unseen:
            others = settings.forget(self.unseen, forget.pattern, seed)
            parts["unseen"] = Part.of(others.samples, forget.pattern, 0, self.samples, seed)
            without = others.without
        return parts, without

    def _never(self, recipe: EvalRecipe) -> EvalModelConfig:
        return EvalModelConfig(path=self.never, dtype=recipe.model.dtype)

    def _never_subject(self, recipe: EvalRecipe) -> subject.Subject:
        return subject.find(self._never(recipe), Path(recipe.run.dir))

    def _measure(self, parts: Mapping[str, Part], without: int, setting: Setting) -> ForgettingResult:
        tested = _Model(self, setting, setting.model)
        values = {name: tested.values(name, part, answers=name != "unseen") for name, part in parts.items()}
        del tested  # its memory is for the other model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        seen = {name: measures(own) for name, own in values.items()}
        return {
            "forget": seen["forget"],
            "retain": seen.get("retain"),
            "unseen": seen.get("unseen"),
            "membership": membership(values["forget"], values["unseen"]) if "unseen" in values else None,
            "unseen_without_content": without,
            "never": None if self.never is None else self._compared(setting, parts["forget"], values["forget"]),
            "scoring": {
                "wrong": self.wrong,
                "min_k": self.min_k,
                "scored": {name: part.digest for name, part in parts.items()},
            },
        }

    def _compared(self, setting: Setting, part: Part, values: Sequence[Values]) -> Never:
        never = self._never_subject(setting.recipe)
        unknowing = _Model(self, setting, replace(never.model, path=str(never.folder))).values("never", part, True)
        never.check_unchanged()
        return {
            "model_hash": never.model_hash,
            "forget": measures(unknowing),
            "quality": quality(values, unknowing),
        }


class _Model:
    """A model that scores sets of answers; its weights load when a value is missing."""

    def __init__(self, options: Forgetting, setting: Setting, model: EvalModelConfig) -> None:
        self.options, self.setting, self.model = options, setting, model

    @cached_property
    def likelihood(self) -> Likelihood:
        return Likelihood(HuggingFace(self.model, self.setting.recipe.template, self.setting.recipe.generation))

    def values(self, name: str, part: Part, answers: bool) -> list[Values]:
        """The measures of each answer, kept in a file `name`. answers: with ROUGE-L of the model's own answers."""
        return self.setting.kept(name, lambda: {"answers": self._made(name, part, answers)})["answers"]

    def _made(self, name: str, part: Part, answers: bool) -> list[Values]:
        scored = iter(self.likelihood(_rows(part), self.setting.stop_on_signal))
        own = [[next(scored) for _ in texts] for texts in part.rows]
        room = self.setting.recipe.generation.max_new_tokens
        if answers and (long := sum(len(scores[0].logps) - 1 > room for scores in own)):
            self.setting.log(
                f"{name}: {long} of {len(own)} answers have more tokens than generation.max_new_tokens={room}, with "
                "which the model's own answers are cut; their ROUGE-L is too low"
            )
        texts = self._answers(part.samples) if answers else [None] * len(own)
        return [self._values(part, i, scores, text) for i, (scores, text) in enumerate(zip(own, texts, strict=True))]

    def _answers(self, samples: Sequence[Sample]) -> list[str]:
        """The model's own greedy answers."""
        texts: dict[int, str] = {}
        for batch in self.likelihood.generator(samples):
            self.setting.stop_on_signal()
            texts |= dict(batch)
        return [texts[i] for i in range(len(samples))]

    def _values(self, part: Part, number: int, scores: Sequence[Answer], text: str | None) -> Values:
        """text: the model's own answer, perhaps with the reasoning before it, which is no part of the answer."""
        sample, paraphrased = part.samples[number], part.paraphrases[number] is not None
        right, *others = scores
        true, false = (others[0], others[1:]) if paraphrased else (right, others)
        comparable = text is not None and forgetting.words(sample.answer)
        return {
            "id": sample.id,
            "content": part.contents[number],
            "probability": forgetting.probability(right.logps),
            "loss": forgetting.loss(right.logps),
            "min_k": forgetting.min_k(right.logps, self.options.min_k),
            "extraction_strength": forgetting.extraction_strength(right.greedy),
            "rouge_l": forgetting.rouge_l(reasoning.answer(text or ""), sample.answer) if comparable else None,
            "truth": forgetting.log_truth_ratio(true.logps, [wrong.logps for wrong in false]) if false else None,
            "paraphrased": paraphrased and bool(false),
        }


# ---------------------------------------------------------------------------------------------- what is scored


def _check_family(config: Any, own: Encoder, samples: Sequence[Sample], where: str) -> None:
    """Raise ConfigError where a token's log-probability is not of the tokens before it alone (see `families.guard`)."""
    shortest = sorted(samples, key=lambda sample: len(sample.question) + len(sample.answer))
    pictured, text = ([s for s in shortest if (s.image is None) == bare][:2] for bare in (False, True))
    if (fault := guard.fault(config, own, pictured, text)) is not None:
        raise ConfigError(
            f"{where}: {fault}. Its answers cannot be scored; leave erasure.forgetting out, or measure another model"
        )


def _place(sample: Sample) -> tuple[str | None, str]:
    """The picture's bytes and the question."""
    return None if sample.image is None else pictures.sha256(sample.image), sample.question


def _rows(part: Part) -> list[Sample]:
    """A row for each text to score, in the order of `Part.rows`."""
    return [
        replace(sample, answer=text) for sample, texts in zip(part.samples, part.rows, strict=True) for text in texts
    ]


# --------------------------------------------------------------------------------------------------- over answers


def measures(values: Sequence[Values]) -> Measures:
    """Means over answers, with intervals over contents."""
    contents = [own["content"] for own in values]
    truths = [(own["content"], own["truth"]) for own in values if own["truth"] is not None]
    words = [(own["content"], own["rouge_l"]) for own in values if own["rouge_l"] is not None]
    close = [(name, forgetting.closeness(truth)) for name, truth in truths]
    return {
        "probability": scored(zip(contents, (own["probability"] for own in values), strict=True)),
        "extraction_strength": scored(zip(contents, (own["extraction_strength"] for own in values), strict=True)),
        "rouge_l": scored(words) if words else None,
        "truth_ratio": geometric(truths) if truths else None,
        "closeness": scored(close) if close else None,
        "without_wrong": sum(own["truth"] is None for own in values),
        "paraphrased": sum(own["paraphrased"] for own in values),
    }


def scored(values: Iterable[tuple[str, float]]) -> Measured:
    """The mean of values from 0 to 1, each with its content, and its interval (see `stats.scored`)."""
    clusters = _clusters(values)
    n = sum(n for _, n in clusters)
    mean = math.fsum(total for total, _ in clusters) / n
    return {"mean": mean, "ci95": list(stats.scored(clusters)), "n": n, "contents": len(clusters)}


def geometric(logs: Iterable[tuple[str, float]]) -> Measured:
    """The geometric mean of values that are given as logarithms, each with its content, and its interval."""
    clusters = _clusters(logs)
    mean, bounds = stats.mean_of_clusters(clusters)
    ci95 = None if bounds is None else [math.exp(min(LARGEST, bound)) for bound in bounds]
    n = sum(n for _, n in clusters)
    return {"mean": math.exp(min(LARGEST, mean)), "ci95": ci95, "n": n, "contents": len(clusters)}


def _clusters(values: Iterable[tuple[str, float]]) -> list[tuple[float, int]]:
    """Sum and number of each content's values."""
    by_content: dict[str, list[float]] = {}
    for name, value in values:
        by_content.setdefault(forgetting.key(name), []).append(value)
    return [(math.fsum(own), len(own)) for own in by_content.values()]


def membership(members: Sequence[Values], others: Sequence[Values]) -> dict[str, Membership]:
    """Attacks on membership by each score: low for what was trained on (Yeom et al., 2018; Shi et al., 2024)."""
    groups = [forgetting.key(own["content"]) for own in members], [forgetting.key(own["content"]) for own in others]
    made: dict[str, Membership] = {}
    for score in ("loss", "min_k"):
        scores = [own[score] for own in members], [own[score] for own in others]
        area, ci95 = two_samples.auc(*scores, groups)
        made[score] = {"auc": area, "ci95": list(ci95), "members": len(members), "others": len(others)}
    return made


def quality(values: Sequence[Values], never: Sequence[Values]) -> ForgetQuality | None:
    """TOFU's forget quality: p of a Kolmogorov-Smirnov test of the truth ratios of two models; None without any."""
    truths = [[(v["content"], v["truth"]) for v in own if v["truth"] is not None] for own in (values, never)]
    if not all(truths):
        return None
    means = [[total / n for total, n in _clusters(own)] for own in truths]
    return {
        "answers": _difference(*([truth for _, truth in own] for own in truths)),
        "contents": _difference(*means),
    }


def _difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    distance, p = two_samples.kolmogorov_smirnov(first, second)
    return {"distance": distance, "p": p, "n": len(first)}
