"""Relearning: how few samples of what was forgotten bring it back, and does more come back than they tell?

Fine-tuning on a little of the forget set restores what was hidden and not removed (Lynch et al., arXiv 2402.16835; Hu
et al., arXiv 2406.13356). What tells most is what the samples do not: with half of the contents never relearned, those
can come back from the weights only (Deeb and Roger, arXiv 2410.08827).
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mirage_dist import config as configs
from mirage_dist.data.sources import Sample
from mirage_dist.evals.metrics import Leaf
from mirage_dist.model.shards import committed, step_of
from mirage_dist.robustness import setting as settings
from mirage_dist.robustness.setting import SET, Forget, Setting, attack_rate, group
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalSetConfig, RunConfig, RunError, SourceConfig, TrainRecipe
from mirage_dist.train import run

LAUNCHER = configs.REPOSITORY / "launch" / "local.sh"
RELEARNED, OTHER = "relearned", "other"


@dataclass(frozen=True)
class Relearning:
    """SFT on n forget samples by an ordinary training run; ASR on others that no run ever sees.

    recipe: a training recipe; its run, model, streams, steps and what it saves are set here. samples: the numbers n,
    the smaller sets being parts of the larger. steps, every: each run makes so many, and is evaluated every so often.
    content_share: of the contents, those that any sample is taken of. questions: forget samples that are asked.
    """

    recipe: str
    overrides: list[str] = field(default_factory=list)  # of that recipe
    samples: list[int] = field(default_factory=lambda: [2, 8, 32])
    steps: int = 20
    every: int = 5
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
        """The recipe to train by. Raises ConfigError for what can be known of it and the samples before weights load."""
        recipe = configs.load(self.recipe, self.overrides, TrainRecipe)
        run.check_recipe(recipe, self.ranks or 1)
        pool = self.split(forget, seed)[0]
        if len(pool) < max(self.samples):
            raise ConfigError(
                f"relearning.samples={self.samples}: only {len(pool)} forget samples can be relearned, beside "
                f"{self.questions} that are asked and contents that are not touched (content_share)"
            )
        return recipe

    def split(self, forget: Forget, seed: int) -> tuple[list[Sample], list[Sample], set[str]]:
        """(samples to learn from, samples to ask, contents of the former); no picture is in both."""
        names = settings.order(forget.contents, seed)
        taught = set(names[: max(1, round(self.content_share * len(names)))])
        asked = forget.samples[: self.questions]  # they stand in the order of their pictures' hashes
        shown = {group(sample) for sample in asked}
        pairs = zip(forget.samples, forget.contents, strict=True)
        pool = [sample for sample, told in pairs if told in taught and group(sample) not in shown]
        return pool, asked, taught

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """{"questions", "contents", "runs": {n: {"contents": relearned ones, "steps": {step: {"all", "relearned",
        "other": leaf or None}}}}}. relearned: of the questions whose content a run's n samples tell; step 0 is the
        model before.
        """
        recipe = self.check(setting.forget, setting.recipe.seed)
        pool, asked, _ = self.split(setting.forget, setting.recipe.seed)
        runs = {str(n): setting.kept(f"n-{n:04d}", lambda n=n: self._of(setting, recipe, pool[:n])) for n in self.samples}
        return {"questions": len(asked), "contents": len(set(setting.forget.contents)), "runs": runs}

    def _of(self, setting: Setting, recipe: TrainRecipe, learned: list[Sample]) -> dict[str, Any]:
        name = f"n-{len(learned):04d}"
        told_by = {s.id: c for s, c in zip(setting.forget.samples, setting.forget.contents, strict=True)}
        taught = {told_by[sample.id] for sample in learned}
        asked = [
            replace(sample, category=RELEARNED if told_by[sample.id] in taught else OTHER)
            for sample in setting.forget.samples[: self.questions]
        ]
        sets = {SET: EvalSetConfig("unsafe", [setting.questions(f"{name}/questions", asked)])}
        source, folder = setting.questions(f"{name}/samples", learned), setting.folder / name / "run"
        setting.say(f"{len(learned)} samples, {self.steps} steps")
        self._train(_placed(setting, recipe, folder, source, self.steps, self.every))
        steps = {"0": _rates(setting.ask(f"{name}/step-000000", setting.model, sets))}
        for step in range(self.every, self.steps + 1, self.every):
            model = EvalModelConfig(run=str(folder), step=step, dtype=setting.model.dtype)
            steps[str(step)] = _rates(setting.ask(f"{name}/step-{step:06d}", model, sets))
        shutil.rmtree(folder / "checkpoints")
        return {"contents": len(taught), "steps": steps}

    def _train(self, recipe: TrainRecipe) -> None:
        """To the end, unless a run that was killed later than that has left all checkpoints."""
        there = [step_of(checkpoint) for checkpoint in committed(Path(recipe.run.dir) / "checkpoints")]
        if there[-1:] == [recipe.train.max_steps]:
            return
        if self.ranks is None:
            run.train(recipe)
            gc.collect()  # the engine's memory is wanted for the evaluation
            torch.cuda.empty_cache()
            return
        file = Path(recipe.run.dir).with_name("recipe.yaml")
        configs.write_yaml(recipe, file)
        _launch(self.ranks, file)


def _placed(
    setting: Setting, recipe: TrainRecipe, folder: Path, source: SourceConfig, steps: int, every: int
) -> TrainRecipe:
    """The training recipe with the run, the model, the data and the template of this evaluation."""
    template, (stream,) = setting.recipe.template, recipe.data.streams or ("train",)
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


def _launch(ranks: int, file: Path) -> None:
    """Raises RunError when the run ends with an error."""
    command = [str(LAUNCHER), str(ranks), "train", str(file)]
    done = subprocess.run(command, env={**os.environ, "MIRAGE_PYTHON": sys.executable}, check=False)
    if done.returncode:
        raise RunError(f"relearning stopped with status {done.returncode} (see above): {' '.join(command)}")
