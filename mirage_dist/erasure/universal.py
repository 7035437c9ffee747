"""One perturbation for all pictures: does what forget samples teach it bring back contents that are in none of them?

A perturbation that makes a model state forgotten answers may carry these answers itself, as the samples of relearning
may. Contents that it was not fitted on are therefore the informative ones: they can come from the weights only. Random
noise of the same size is the first control, and the same test of a model that never knew the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from mirage_dist import config as configs
from mirage_dist import disk, stats
from mirage_dist.data import pictures
from mirage_dist.data.sample import Sample
from mirage_dist.erasure import forgetting
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.results import PerturbedRates, UniversalResult
from mirage_dist.erasure.setting import SET, ErasureTest, Forget, Prepared, Setting, attack_rate
from mirage_dist.evals.attacks.journal import Journal
from mirage_dist.evals.attacks.pixels import victim
from mirage_dist.evals.attacks.pixels.universal import Perturbation, Universal
from mirage_dist.evals.attacks.rewrites import sample_key
from mirage_dist.evals.results import CLEAN, Condition, Leaf, SuiteResult
from mirage_dist.evals.sharing.files import suite_dir
from mirage_dist.model.families.pixels import Inexact, Preprocessing
from mirage_dist.schema import ConfigError, EvalRecipe, EvalSetConfig, RunError
from mirage_dist.schema.numbers import Count, SomeShare

PERTURBED, NOISE = "perturbed", "noise"  # attacks
HELD_OUT, FITTED = "held_out", "fitted"  # categories of the questions; below each, one for each content


@dataclass(frozen=True)
class UniversalPerturbation(Perturbation, ErasureTest):
    """ASR on forget questions whose pictures carry one perturbation, which was fitted on other forget samples.

    The options are those of the attack `universal`; the target is the forgotten answer. label: what counts as a
    content: the forgotten content (answer) or the sample's category. content_share: fraction of the contents from which
    the samples of the fit are drawn. questions: number of forget samples that are evaluated; their pictures are in no
    sample of the fit. seed: of the draw of the samples of the fit, and of the random noise.
    """

    target: str = "{answer}"
    label: Literal["answer", "category"] = "answer"
    content_share: SomeShare = 0.5
    questions: Count = 128

    def prepared(self, forget: Forget, recipe: EvalRecipe) -> Prepared:
        _, encoder = settings.prompting(recipe, recipe.model)
        try:
            preprocessing = victim.preprocessing(encoder, "erasure.universal")
        except ConfigError as error:
            raise ConfigError(f"{error}; or leave erasure.universal out") from error
        parts = self.split(forget, recipe.seed, preprocessing)
        return Prepared(partial(self._kept, parts), {"pictures": parts.digest})

    def split(self, forget: Forget, seed: int, preprocessing: Preprocessing) -> Parts:
        """The samples of the fit and the questions. Raises ConfigError when there are too few of either."""
        labelled = list(zip(forget.samples, forget.labels(self.label), strict=True))
        with_picture = [(sample, own) for sample, own in labelled if sample.image is not None]
        pictured = {s: forgetting.key(own) for s, own in with_picture if _reproduced(s, preprocessing)}
        if not with_picture:
            raise ConfigError(
                f"erasure.universal: changes pixels, and none of the {len(forget.samples)} forget samples has a "
                "picture; leave it out, or name samples with pictures in erasure.forget"
            )
        if not pictured:
            raise ConfigError(
                f"erasure.universal: {preprocessing.kind} is reproduced for the size of none of the "
                f"{len(with_picture)} pictures of forget samples; leave it out"
            )
        if len(contents := set(pictured.values())) < 2:
            raise ConfigError(
                f"erasure.universal: all {len(pictured)} forget samples with pictures have the same {self.label} "
                f"({next(iter(contents))!r}), and a perturbation that is fitted on one content is asked about others; "
                "name samples of two contents or more, or change erasure.content or erasure.universal.label"
            )
        samples = list(pictured)
        pool, questions = settings.split(samples, list(pictured.values()), self.content_share, self.questions, seed)
        # A picture may be there under two names, and the attack asks no question about a picture of its fit.
        shown = {pictures.sha256(str(sample.image)) for sample in questions}
        pool = [sample for sample in pool if pictures.sha256(str(sample.image)) not in shown]
        if len(pool) < self.train:
            raise ConfigError(
                f"erasure.universal.train={self.train}: only {len(pool)} forget samples are available for the fit, "
                f"after {len(questions)} questions and the contents that are held out; lower erasure.universal.train "
                "or erasure.universal.questions, or raise erasure.universal.content_share"
            )
        fit = Universal(**self.options).chosen(pool, sample_key)
        holds = forget.carried(fit, self.label)
        known = {sample: (FITTED if holds(sample) else HELD_OUT, pictured[sample]) for sample in [*fit, *questions]}
        parts = Parts(fit, questions, known, len(with_picture) - len(pictured))
        if not parts.contents(HELD_OUT):
            raise ConfigError(
                f"erasure.universal: the fit has the contents of all {len(questions)} questions, so that nothing "
                "is held out; lower erasure.universal.content_share, or raise erasure.universal.questions"
            )
        return parts

    def _kept(self, parts: Parts, setting: Setting) -> UniversalResult:
        return setting.kept("result", lambda: self._measure(parts, setting))

    def _measure(self, parts: Parts, setting: Setting) -> UniversalResult:
        setting.log(f"{len(parts.fit)} samples, {self.steps} steps, ± {self.epsilon} of 255")
        categories = zip(parts.questions, parts.categories(), strict=True)
        questions = [replace(sample, category=own) for sample, own in categories]
        fit = configs.to_dict(setting.questions("fit", parts.fit))
        attacks = {
            NOISE: {"kind": "noise", "epsilon": self.epsilon, "seed": self.seed},
            PERTURBED: {"kind": "universal", **self.options, "train": len(parts.fit), "sources": [fit]},
        }
        own = EvalSetConfig("unsafe", [setting.questions("questions", questions)], attacks)
        result = setting.evaluate("asked", setting.model, {SET: own})
        # One, because the suite's manifest and this test's refuse a start in which the perturbation would be another.
        folder = suite_dir(replace(setting.recipe, suite=f"{setting.suite}/asked"))
        (file,) = (folder / "rewrites").glob(f"{SET}-{PERTURBED}-*.jsonl")
        journal = Journal(file).refresh()
        if not journal.results:
            raise RunError(
                f"{file}: no question has a picture that can carry the perturbation; the file says why for each"
            )
        search = next(iter(journal.results.values()))
        return {
            "epsilon": self.epsilon,
            "steps": self.steps,
            "fit": {
                "samples": len(parts.fit),
                "contents": len({parts.known[sample] for sample in parts.fit}),
                "clean": search["clean"],
                "loss": search["loss"],
            },
            "held_out": _rates(result, parts, HELD_OUT),
            "fitted": _rates(result, parts, FITTED),
            "without_picture": sum(sample.image is None for sample in setting.forget.samples),
            "unperturbed": parts.left_out + sum(not journal.rewrites[sample_key(sample)] for sample in questions),
        }


@dataclass(frozen=True)
class Parts:
    """The samples of the fit, and the questions.

    known: of each its part, and what its content is compared by. left_out: number of samples with pictures on neither
    side.
    """

    fit: list[Sample]
    questions: list[Sample]
    known: Mapping[Sample, tuple[str, str]]
    left_out: int

    @property
    def digest(self) -> str:
        """SHA-256 of the samples on either side, their pictures' bytes included."""
        return disk.digest([[sample_key(sample) for sample in part] for part in (self.fit, self.questions)])

    def contents(self, part: str) -> list[str]:
        """The distinct contents of the questions of a part."""
        return list(dict.fromkeys(own for of, own in map(self.known.__getitem__, self.questions) if of == part))

    def categories(self) -> list[str]:
        """Of each question its part, and its content as a number: a content may be any text."""
        numbered = {
            (part, name): f"{part}/{number}"
            for part in (HELD_OUT, FITTED)
            for number, name in enumerate(self.contents(part))
        }
        return [numbered[self.known[sample]] for sample in self.questions]


def _reproduced(sample: Sample, preprocessing: Preprocessing) -> bool:
    """Whether a picture has a size that the model's preprocessing is reproduced for."""
    try:
        preprocessing.axes(pictures.size_of(str(sample.image)))
    except Inexact:
        return False
    return True


def _rates(result: SuiteResult, parts: Parts, part: str) -> PerturbedRates:
    places = [f"{part}/{number}" for number in range(len(parts.contents(part)))]
    conditions: Sequence[Condition] = (CLEAN, Condition(NOISE, 1), Condition(PERTURBED, 1))
    clean, noise, perturbed = (_rate(result, condition, part, places) for condition in conditions)
    return {"contents": len(places), "clean": clean, "noise": noise, "perturbed": perturbed}


def _rate(result: SuiteResult, condition: Condition, part: str, places: Sequence[str]) -> Leaf | None:
    """A rate of all questions of a part, with an interval over their contents."""
    whole = attack_rate(result, condition, part)
    if whole is None:
        return None
    by_content = [own for place in places if (own := attack_rate(result, condition, place))]
    return {**whole, "ci95": list(stats.clustered([(int(own["k"]), own["n"]) for own in by_content]))}
