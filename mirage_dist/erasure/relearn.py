"""Relearning: does fine-tuning on a few forget samples bring back the forgotten content, even content not in them?

Fine-tuning on a small part of the forget set restores knowledge that was hidden rather than removed (Lynch et al.,
arXiv 2402.16835; Hu et al., arXiv 2406.13356). The contents that are not in the relearned samples are the informative
ones: they can return from the weights only (Deeb and Roger, arXiv 2410.08827).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from mirage_dist import config as configs
from mirage_dist import disk, launching
from mirage_dist.data.sample import Sample
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.results import RelearningResult, RelearningRun, StepRates
from mirage_dist.erasure.setting import SET, ErasureTest, Forget, Prepared, Setting, attack_rate
from mirage_dist.evals.results import SuiteResult
from mirage_dist.model.shards import committed, step_of
from mirage_dist.ranks import place
from mirage_dist.schema import (
    ConfigError,
    EvalModelConfig,
    EvalRecipe,
    EvalSetConfig,
    RunConfig,
    SourceConfig,
    TrainRecipe,
)
from mirage_dist.schema.numbers import Count, Ranks, SomeShare, Steps
from mirage_dist.train import run
from mirage_dist.train.planning import check

RELEARNED, OTHER = "relearned", "other"  # categories of the questions


@dataclass(frozen=True)
class Relearning(ErasureTest):
    """SFT on n forget samples by an ordinary training run, and ASR on other forget samples that no run ever sees.

    recipe: a training recipe; run, model, streams, steps and checkpoint options are set here. overrides: of that
    recipe. samples: the numbers n; smaller sets are subsets of larger ones. steps: of each run; it is evaluated every
    `every` steps. label: what counts as a content: the forgotten content (answer) or the sample's category.
    content_share: fraction of the contents from which relearned samples are drawn. questions: number of forget samples
    that are evaluated. ranks: number of training processes; None trains in this process.
    """

    recipe: str
    overrides: list[str] = field(default_factory=list)
    samples: list[Count] = field(default_factory=lambda: [2, 8, 32])
    steps: Steps = 20
    every: Steps = 5  # steps between two evaluations
    label: Literal["answer", "category"] = "answer"
    content_share: SomeShare = 0.5
    questions: Count = 128
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            raise ConfigError(f"samples={self.samples}; expected numbers of samples above 0")
        if self.steps % self.every:
            raise ConfigError(f"steps={self.steps}; expected a multiple of every={self.every}")

    def prepared(self, forget: Forget, recipe: EvalRecipe) -> Prepared:
        trained = self.check(forget, recipe.seed)
        return Prepared(partial(self._measure, trained), {"training": configs.to_dict(trained)})

    def check(self, forget: Forget, seed: int) -> TrainRecipe:
        """The training recipe. Raises ConfigError when the recipe is invalid or there are too few forget samples."""
        recipe = configs.load(self.recipe, self.overrides, TrainRecipe)
        check.check_recipe(recipe, self.ranks or 1)
        if len(recipe.data.streams) != 1:
            raise ConfigError(f"relearning.recipe={self.recipe}: has streams {list(recipe.data.streams)}; expected one")
        pool, _ = self.split(forget, seed)
        if len(pool) < max(self.samples):
            raise ConfigError(
                f"relearning.samples={self.samples}: only {len(pool)} forget samples are available for relearning, "
                f"after {self.questions} questions and the contents that are held out; lower relearning.samples or "
                "relearning.questions, or raise relearning.content_share"
            )
        return recipe

    def split(self, forget: Forget, seed: int) -> tuple[list[Sample], list[Sample]]:
        """(samples to relearn, questions), each in the order of their pictures' hashes. They share no picture."""
        return settings.split(forget.samples, forget.labels(self.label), self.content_share, self.questions, seed)

    def _measure(self, recipe: TrainRecipe, setting: Setting) -> RelearningResult:
        pool, questions = self.split(setting.forget, setting.recipe.seed)
        runs = {}
        for n in self.samples:
            name = f"n-{n:04d}"
            runs[str(n)] = setting.kept(
                name, lambda n=n, name=name: self._run(setting, recipe, name, pool[:n], questions)
            )
            # Only after the result is kept: without checkpoints an interrupted test would have to train again.
            if disk.owned(setting.folder / name / "run"):
                disk.remove(setting.folder / name / "run" / "checkpoints")
        return {"questions": len(questions), "contents": len(set(setting.forget.labels(self.label))), "runs": runs}

    def _run(
        self, setting: Setting, recipe: TrainRecipe, name: str, samples: list[Sample], questions: list[Sample]
    ) -> RelearningRun:
        """Train on `samples` and evaluate the questions at every checkpoint."""
        contents = dict(zip(setting.forget.samples, setting.forget.labels(self.label), strict=True))
        relearned, holds = {contents[sample] for sample in samples}, setting.forget.carried(samples, self.label)
        parts = [replace(s, category=RELEARNED if holds(s) else OTHER) for s in questions]
        sets = {SET: EvalSetConfig("unsafe", [setting.questions(f"{name}/questions", parts)])}
        source, folder = setting.questions(f"{name}/samples", samples), setting.folder / name / "run"
        setting.log(f"{len(samples)} samples, {self.steps} steps")
        disk.own(folder)
        self.train(training(setting, recipe, folder, source, self.steps, self.every))
        steps = {"0": _rates(setting.evaluate(f"{name}/step-000000", setting.model, sets))}
        for step in range(self.every, self.steps + 1, self.every):
            model = EvalModelConfig(run=str(folder), step=step, dtype=setting.model.dtype)
            steps[str(step)] = _rates(setting.evaluate(f"{name}/step-{step:06d}", model, sets))
        return {"contents": len(relearned), "steps": steps}

    def train(self, recipe: TrainRecipe) -> None:
        """Train to the end; does nothing when an earlier start has left the last checkpoint."""
        steps = [step_of(checkpoint) for checkpoint in committed(Path(recipe.run.dir) / "checkpoints")]
        if steps[-1:] == [recipe.train.max_steps]:
            return
        if self.ranks is None:
            run.train(check.check_recipe(recipe, place()[2]))
            gc.collect()  # the evaluation needs the engine's memory
            torch.cuda.empty_cache()
            return
        file = Path(recipe.run.dir).with_name("recipe.yaml")
        configs.write_yaml(recipe, file)
        launching.train(self.ranks, str(file))


def training(
    setting: Setting, recipe: TrainRecipe, folder: Path, source: SourceConfig, steps: int, every: int
) -> TrainRecipe:
    """The recipe with this evaluation's model and template, the samples as its data, and `folder` as its run."""
    template, (stream,) = setting.recipe.template, recipe.data.streams
    data = replace(
        recipe.data,
        streams={stream: [source]},
        system_prompt=template.system_prompt,
        image_aspect=template.image_aspect,
        template_options=template.template_options,
    )
    keep_all = {"keep_last": None, "keep_every": None, "keep_best": None, "export": "off"}
    return replace(
        recipe,
        run=RunConfig(str(folder)),
        model=replace(recipe.model, path=str(setting.model.path)),
        data=data,
        train=replace(recipe.train, max_steps=steps, save_every=every, **keep_all),
        seed=setting.recipe.seed,
    )


def _rates(result: SuiteResult) -> StepRates:
    return {
        "all": attack_rate(result),
        "relearned": attack_rate(result, category=RELEARNED),
        "other": attack_rate(result, category=OTHER),
    }
