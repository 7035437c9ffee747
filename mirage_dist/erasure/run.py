"""`mirage erasure CONFIG`: is what the model no longer tells erased, or hidden?

    evals/SUITE/erasure.json            every figure: {"relearning", "quantisation", "probe", "completion", …}
    evals/SUITE/erasure/TEST/           what a test keeps: suites of its own (as any other), figures, training runs

Killed and started again it does what is missing. A test is one file with one dataclass, and one field of
`ErasureConfig`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.attribute import Attribution
from mirage_dist.erasure.complete import Completion
from mirage_dist.erasure.probe import Probe
from mirage_dist.erasure.quantise import Quantisation
from mirage_dist.erasure.relearn import Relearning
from mirage_dist.erasure.setting import Forget, Setting
from mirage_dist.evals import rows, runner
from mirage_dist.evals.attacks.prefill import check_pattern
from mirage_dist.evals.models import subject
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import suite_dir, write_atomically
from mirage_dist.ranks import place
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, SourceConfig, TrainRecipe

Test = Relearning | Quantisation | Probe | Completion | Attribution


@dataclass(frozen=True)
class ErasureConfig:
    """`erasure` of an evaluation's recipe; a test that is not named is not made.

    forget: what was to be forgotten, with the answers that tell it. content: a regular expression of the part of such
    an answer that must not be told; without one it is the whole answer.
    """

    forget: list[SourceConfig]
    content: str | None = None
    relearning: Relearning | None = None
    quantisation: Quantisation | None = None
    probe: Probe | None = None
    completion: Completion | None = None
    attribution: Attribution | None = None

    def __post_init__(self) -> None:
        check_pattern("content", self.content)

    def tests(self) -> Iterator[tuple[str, Test]]:
        """Those that are named, in the order above."""
        for field in fields(self):
            if field.name not in ("forget", "content") and (test := getattr(self, field.name)) is not None:
                yield field.name, test


def options(recipe: EvalRecipe) -> ErasureConfig:
    """The recipe's section, checked. Raises ConfigError."""
    if recipe.erasure is None:
        raise ConfigError("erasure is missing: this recipe names no test of erasure (see configs/eval/demo.yaml)")
    return configs.build(ErasureConfig, recipe.erasure, "the recipe", "erasure")


def run(recipe: EvalRecipe) -> dict[str, Any]:
    """Make every test that the recipe names and write erasure.json; returns it.

    {"suite", "model_hash", "judge", "forget": {"samples", "contents", "without_content"}, "seconds": {test: of this
    start}, and each test's result, see its `__call__`}. Every rate is a leaf, see `evals.metrics`.
    Raises ConfigError for a bad recipe or bad data before weights load, RunError when another process makes the tests,
    and what `evals.runner.evaluate` raises.
    """
    if place()[2] > 1:
        raise ConfigError("erasure runs in one process; relearning.ranks says how many train")
    chosen = options(recipe)
    forget = settings.forget(chosen.forget, chosen.content, recipe.seed)
    if not forget.samples:
        raise ConfigError(f"erasure.forget: no sample with the content {chosen.content!r}")
    if chosen.relearning is not None:
        chosen.relearning.check(forget, recipe.seed)
    before = runner.evaluate(recipe)
    if before is None:
        raise RunError(f"{suite_dir(recipe)}: another worker judges the suite; start again when it is done")
    folder = suite_dir(recipe) / "erasure"
    with Claims(folder) as claims:
        if (claim := claims.take("tests")) is None:
            raise RunError(f"{folder}: another process makes these tests")
        try:
            result = _made(recipe, chosen, forget, before, claims)
        finally:
            claims.release(claim)
    write_atomically(suite_dir(recipe) / "erasure.json", json.dumps(result, indent=1) + "\n")
    return result


def _made(
    recipe: EvalRecipe, chosen: ErasureConfig, forget: Forget, before: Mapping[str, Any], claims: Claims
) -> dict[str, Any]:
    folder = suite_dir(recipe) / "erasure"
    found = subject.find(recipe.model, Path(recipe.run.dir))
    model = found.loadable(folder, claims)
    result: dict[str, Any] = {
        "suite": recipe.suite,
        "model_hash": found.model_hash,
        "judge": before["headline"],
        "forget": {
            "samples": len(forget.samples),
            "contents": len(set(forget.contents)),
            "without_content": forget.without,
        },
        "seconds": {},
    }
    for name, test in chosen.tests():
        start = time.monotonic()
        setting = Setting(replace(recipe, follow=None), model, before, forget, name)
        rows.claim(setting.folder, {"settings": _decided_by(recipe, found.model_hash, forget, test)})
        result[name] = test(setting)
        result["seconds"][name] = round(time.monotonic() - start, 1)
        setting.say(f"done in {result['seconds'][name]} s")
    found.check_unchanged()
    found.discard(folder)
    return result


def _decided_by(recipe: EvalRecipe, model_hash: str, forget: Forget, test: Test) -> dict[str, Any]:
    """What the figures that a test keeps depend on: with anything else, its folder is refused."""
    tree = configs.to_dict(recipe)
    trained = configs.load(test.recipe, test.overrides, TrainRecipe) if isinstance(test, Relearning) else None
    return {
        "model_hash": model_hash,
        "forget": forget.digest,
        "test": configs.to_dict(test),
        "training": None if trained is None else configs.to_dict(trained),
        **{name: tree[name] for name in ("sets", "seed", "template", "generation", "judges")},
        "dtype": recipe.model.dtype,
    }
