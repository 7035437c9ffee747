"""`mirage erasure CONFIG`: tests that tell erased knowledge from hidden knowledge.

    evals/SUITE/erasure.json            all results (see `erasure.results`)
    evals/SUITE/erasure/TEST/           files of one test: ordinary suites and training runs, and its result

A start after an interruption makes what is missing. A test is one module with one dataclass, an `ErasureTest`, one
field of `ErasureConfig` and one type in `erasure.results`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from mirage_dist import config as configs
from mirage_dist import disk, signals, state
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.attribute import Attribution
from mirage_dist.erasure.complete import Completion
from mirage_dist.erasure.measure import Forgetting
from mirage_dist.erasure.probe import Probe
from mirage_dist.erasure.quantise import Quantisation
from mirage_dist.erasure.relearn import Relearning
from mirage_dist.erasure.results import ErasureResult
from mirage_dist.erasure.setting import ErasureTest, Forget, Prepared, Setting
from mirage_dist.erasure.universal import UniversalPerturbation
from mirage_dist.evals import manifest, runner
from mirage_dist.evals.attacks.prefill import check_pattern
from mirage_dist.evals.models import subject
from mirage_dist.evals.results import SuiteResult
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import suite_dir
from mirage_dist.ranks import place
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, SourceConfig


@dataclass(frozen=True)
class ErasureConfig:
    """The section `erasure` of an evaluation's recipe. A test that it does not name is not made.

    forget: the samples that the model should have forgotten, with the answers that state the forgotten content.
    content: a regular expression that matches the forgotten content in such an answer; default: the whole answer.
    """

    forget: list[SourceConfig]
    content: str | None = None
    relearning: Relearning | None = None
    quantisation: Quantisation | None = None
    probe: Probe | None = None
    completion: Completion | None = None
    universal: UniversalPerturbation | None = None
    forgetting: Forgetting | None = None
    attribution: Attribution | None = None

    def __post_init__(self) -> None:
        check_pattern("content", self.content)

    def tests(self) -> Iterator[tuple[str, ErasureTest]]:
        """Name and options of the tests to make, in the order of the fields."""
        for field in fields(self):
            if isinstance(test := getattr(self, field.name), ErasureTest):
                yield field.name, test


def options(recipe: EvalRecipe) -> ErasureConfig:
    """The recipe's section, checked. Raises ConfigError when it is missing, invalid, or names no test."""
    if recipe.erasure is None:
        raise ConfigError("erasure is missing: add a section with the tests to make (see configs/eval/demo.yaml)")
    chosen = configs.build(ErasureConfig, recipe.erasure, "the recipe", "erasure")
    if not any(chosen.tests()):
        names = ", ".join(field.name for field in fields(chosen) if field.name not in ("forget", "content"))
        raise ConfigError(f"erasure: names no test to make; expected some of {names}")
    return chosen


def check(recipe: EvalRecipe) -> ErasureConfig:
    """`options`, for a model whose weights can be tested. Raises ConfigError for one behind an endpoint, and as it."""
    if recipe.model.url is not None:
        raise ConfigError(
            f"model.url names an endpoint ({recipe.model.model}), and the tests of erasure need a model's weights; "
            "give its directory as model.path, or ask the endpoint by `mirage eval` alone"
        )
    return options(recipe)


def run(recipe: EvalRecipe) -> ErasureResult:
    """Make every test that the recipe names, write erasure.json, and return its content.

    Evaluates the suite first. Raises ConfigError for a bad recipe or bad data before any weights load, RunError when
    another process makes the tests, and what `evals.runner.evaluate` raises.
    """
    if place()[2] > 1:
        raise ConfigError(
            "mirage erasure is one process; start it without a launcher, and set erasure.relearning.ranks to train in "
            "several"
        )
    chosen = check(recipe)
    forget = settings.forget(chosen.forget, chosen.content, recipe.seed)
    if not forget.samples:
        raise ConfigError(f"erasure.forget: no sample with the content {chosen.content!r} in its answer")
    prepared = {name: test.prepared(forget, recipe) for name, test in chosen.tests()}
    tested = subject.find(recipe.model, Path(recipe.run.dir))
    decided = {
        name: _dependencies(recipe, tested.model_hash, forget, test, prepared[name]) for name, test in chosen.tests()
    }
    folder = suite_dir(recipe) / "erasure"
    for name, own in decided.items():  # a changed option is refused before hours of other tests
        manifest.check(folder / name, own)
    before = runner.evaluate(recipe)
    if before is None:
        raise RunError(f"{suite_dir(recipe)}: another worker is judging the suite; start again when it has finished")
    with Claims(folder) as claims:
        if (claim := claims.take_unless_alive("tests", _stop_on_signal)) is None:
            raise RunError(f"{folder}: another process is making these tests")
        try:
            result = _make(_Start(recipe, forget, tested, prepared, decided), before, claims)
        finally:
            claims.release(claim)
    disk.write(
        suite_dir(recipe) / "erasure.json",
        state.sealed("erasure", cast(dict[str, Any], result), indent=1),
        private=True,
    )
    return result


def _stop_on_signal() -> None:
    if name := signals.received():
        raise signals.StopRequested(f"stopped by {name} before the first test")


@dataclass(frozen=True)
class _Start:
    """One start. tested: the model. prepared: its tests. decided: test -> what its kept results depend on."""

    recipe: EvalRecipe
    forget: Forget
    tested: subject.Subject
    prepared: Mapping[str, Prepared]
    decided: Mapping[str, Mapping[str, Any]]


def _make(start: _Start, before: SuiteResult, claims: Claims) -> ErasureResult:
    recipe, forget, tested = start.recipe, start.forget, start.tested
    folder = suite_dir(recipe) / "erasure"
    model = tested.loadable(folder, claims)
    result: ErasureResult = {
        "suite": recipe.suite,
        "model_hash": tested.model_hash,
        "judge": before["headline"],
        "forget": {
            "samples": len(forget.samples),
            "contents": len(set(forget.contents)),
            "without_content": forget.without,
        },
        "seconds": {},
    }
    for name, prepared in start.prepared.items():
        begun = time.monotonic()
        setting = Setting(replace(recipe, follow=None), model, before, forget, name)
        manifest.claim(setting.folder, {"settings": dict(start.decided[name])})
        result[name] = prepared.measure(setting)
        result["seconds"][name] = round(time.monotonic() - begun, 1)
        setting.log(f"done in {result['seconds'][name]} s")
    tested.check_unchanged()
    tested.discard(folder)
    return result


def _dependencies(
    recipe: EvalRecipe, model_hash: str, forget: Forget, test: ErasureTest, prepared: Prepared
) -> dict[str, Any]:
    """What a test's kept results depend on; a start with other values refuses the folder."""
    tree = configs.to_dict(recipe)
    return {
        "model_hash": model_hash,
        "forget": forget.digest,
        "test": configs.to_dict(test),
        **prepared.dependencies,
        **{name: tree[name] for name in ("sets", "seed", "template", "generation", "judges")},
        "dtype": recipe.model.dtype,
    }
