"""Relearning: how few samples of what was forgotten bring it back, and does more come back than they tell?

Fine-tuning on a little of the forget set restores what was hidden and not removed (Lynch et al., arXiv 2402.16835; Hu
et al., arXiv 2406.13356). What tells most is what the samples do not: with half of the contents never relearned, those
can come back from the weights only (Deeb and Roger, arXiv 2410.08827).
"""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mirage_dist import config as configs
from mirage_dist import launching
from mirage_dist.data.sample import Sample
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.setting import SET, Forget, Setting, attack_rate, group
from mirage_dist.evals.metrics import Leaf
from mirage_dist.model.shards import committed, step_of
from mirage_dist.ranks import place
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalSetConfig, RunConfig, SourceConfig, TrainRecipe
from mirage_dist.train import run
from mirage_dist.train.planning import check

RELEARNED, OTHER = "relearned", "other"


@dataclass(frozen=True)
class Relearning:
    """SFT on n forget samples by an ordinary training run; ASR on others that no run ever sees.

    recipe: a training recipe; its run, model, streams, steps and what it saves are set here. samples: the numbers n,
    the smaller sets being parts of the larger. steps, every: each run makes so many, and is evaluated every so often.
    label: what a content is; answer is the forgotten content, category the sample's own. content_share: of the
    contents, those that any sample is taken of. questions: forget samples that are asked.
    """

    recipe: str
    overrides: list[str] = field(default_factory=list)  # of that recipe
    samples: list[int] = field(default_factory=lambda: [2, 8, 32])
    steps: int = 20
    every: int = 5
    label: Literal["answer", "category"] = "answer"
    content_share: float = 0.5
    questions: int = 128
    ranks: int | None = None  # processes that train; null trains in this one

    def __post_init__(self) -> None:
        for name in ("steps", "every", "questions", "ranks"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value}; expected a whole number above 0")
        if not self.samples or min(self.samples) < 1:
            raise ConfigError(f"samples={self.samples}; expected numbers of samples above 0")
        if self.steps % self.every:
            raise ConfigError(f"steps={self.steps}; expected a multiple of every={self.every}")
        if not 0 < self.content_share <= 1:
            raise ConfigError(f"content_share={self.content_share}; expected a share above 0, at most 1")

    def check(self, forget: Forget, seed: int) -> TrainRecipe:
        """The recipe to train by. Raises ConfigError for what can be known of it and of the samples beforehand."""
        recipe = configs.load(self.recipe, self.overrides, TrainRecipe)
        check.check_recipe(recipe, self.ranks or 1)
        if len(recipe.data.streams) != 1:
            raise ConfigError(f"relearning.recipe={self.recipe}: has streams {list(recipe.data.streams)}; expected one")
        pool, _ = self.split(forget, seed)
        if len(pool) < max(self.samples):
            raise ConfigError(
                f"relearning.samples={self.samples}: only {len(pool)} forget samples can be relearned, beside "
                f"{self.questions} that are asked and contents that are not touched (content_share)"
            )
        return recipe

    def split(self, forget: Forget, seed: int) -> tuple[list[Sample], list[Sample]]:
        """(samples to learn from, samples to ask), each in the order of their pictures' hashes. They share none."""
        contents = forget.labels(self.label)
        names = settings.order(contents, seed)
        taught = set(names[: max(1, round(self.content_share * len(names)))])
        asked = forget.samples[: self.questions]
        shown = {group(sample) for sample in asked}
        pairs = zip(forget.samples, contents, strict=True)
        pool = [sample for sample, told in pairs if told in taught and group(sample) not in shown]
        return pool, asked

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """{"questions", "contents", "runs": {n: {"contents": relearned ones, "steps": {step: {"all", "relearned",
        "other": leaf or None}}}}}. relearned: of the questions whose content a run's n samples tell; step 0 is the
        model before.
        """
        recipe = self.check(setting.forget, setting.recipe.seed)
        pool, asked = self.split(setting.forget, setting.recipe.seed)
        runs = {}
        for n in self.samples:
            name = f"n-{n:04d}"
            runs[str(n)] = setting.kept(name, lambda n=n, name=name: self._of(setting, recipe, name, pool[:n], asked))
            # Only now: without them the run would have to be made again.
            shutil.rmtree(setting.folder / name / "run" / "checkpoints", ignore_errors=True)
        return {"questions": len(asked), "contents": len(set(setting.forget.labels(self.label))), "runs": runs}

    def _of(
        self, setting: Setting, recipe: TrainRecipe, name: str, learned: list[Sample], asked: list[Sample]
    ) -> dict[str, Any]:
        contents = dict(zip(setting.forget.samples, setting.forget.labels(self.label), strict=True))
        taught = {contents[sample] for sample in learned}
        asked = [replace(s, category=RELEARNED if contents[s] in taught else OTHER) for s in asked]
        sets = {SET: EvalSetConfig("unsafe", [setting.questions(f"{name}/questions", asked)])}
        source, folder = setting.questions(f"{name}/samples", learned), setting.folder / name / "run"
        setting.say(f"{len(learned)} samples, {self.steps} steps")
        self._train(_placed(setting, recipe, folder, source, self.steps, self.every))
        steps = {"0": _rates(setting.ask(f"{name}/step-000000", setting.model, sets))}
        for step in range(self.every, self.steps + 1, self.every):
            model = EvalModelConfig(run=str(folder), step=step, dtype=setting.model.dtype)
            steps[str(step)] = _rates(setting.ask(f"{name}/step-{step:06d}", model, sets))
        return {"contents": len(taught), "steps": steps}

    def _train(self, recipe: TrainRecipe) -> None:
        """To the end, unless a run that was killed later than that has left all checkpoints."""
        there = [step_of(checkpoint) for checkpoint in committed(Path(recipe.run.dir) / "checkpoints")]
        if there[-1:] == [recipe.train.max_steps]:
            return
        if self.ranks is None:
            run.train(check.check_recipe(recipe, place()[2]))
            gc.collect()  # the engine's memory is wanted for the evaluation
            torch.cuda.empty_cache()
            return
        file = Path(recipe.run.dir).with_name("recipe.yaml")
        configs.write_yaml(recipe, file)
        launching.train(self.ranks, str(file))


def _placed(
    setting: Setting, recipe: TrainRecipe, folder: Path, source: SourceConfig, steps: int, every: int
) -> TrainRecipe:
    """The training recipe with the run, the model, the data and the template of this evaluation."""
    template, (stream,) = setting.recipe.template, recipe.data.streams
    data = replace(
        recipe.data,
        streams={stream: [source]},
        system_prompt=template.system_prompt,
        image_aspect=template.image_aspect,
    )
    kept = {"keep_last": None, "keep_every": None, "keep_best": None, "export": False}
    return replace(
        recipe,
        run=RunConfig(str(folder)),
        model=replace(recipe.model, path=str(setting.model.path)),
        data=data,
        train=replace(recipe.train, max_steps=steps, save_every=every, **kept),
        seed=setting.recipe.seed,
    )


def _rates(result: dict[str, Any]) -> dict[str, Leaf | None]:
    return {"all": attack_rate(result), **{part: attack_rate(result, category=part) for part in (RELEARNED, OTHER)}}
