"""`mirage eval`: one model answers every question of a suite, the answers are judged, the rates are computed.

A worker makes no collective calls. It does what is missing and can be stopped, killed and started again at any time,
and any number of workers can share a suite.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from mirage_dist import __version__, runs, signals
from mirage_dist import config as configs
from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.evals import judges, judging, models, results, rows, worker, worklist
from mirage_dist.evals import manifest as manifests
from mirage_dist.evals.attacks.rewrites import Rewriter
from mirage_dist.evals.judges.errors import labels
from mirage_dist.evals.models import subject
from mirage_dist.evals.models.base import Generator
from mirage_dist.evals.models.hf import HuggingFace, encoder
from mirage_dist.evals.models.subject import Subject
from mirage_dist.evals.results import CLEAN, SuiteResult
from mirage_dist.evals.rows import Settings
from mirage_dist.evals.sharing import files
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import Answers, suite_dir
from mirage_dist.evals.worklist import WorkList
from mirage_dist.model.families import configs as families
from mirage_dist.model.families import processors
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe
from mirage_dist.signals import StopRequested

G = TypeVar("G", bound=Generator)


def evaluate(recipe: EvalRecipe, place: tuple[int, int] = (0, 1)) -> SuiteResult | None:
    """Answer the missing questions together with all other workers of the suite, then judge and write `metrics.json`.

    place: (i, n): this is worker i of n, which decides where in the work list it begins (see `evals.worker`). Of the
    workers that find every question answered, one judges and returns the content of `metrics.json`; the others return
    None. The embedded world must exist where the recipe names one (see `inputs.make`).

    Raises ConfigError for a bad recipe, an engine that is not installed, bad data, bad labels, a template that differs
    from the one the run was trained with, or a suite directory with answers under other settings, all before any
    weights are read, and for a model that cannot be loaded. Raises RunError when the disk is full or the model's files
    change, and StopRequested after the batch in which a signal came (see `signals`).
    """
    worklist.check(recipe)
    engine = models.backend(recipe.generation.backend)
    versions = engine.versions()  # fails here where the engine is not installed
    panel = judges.panel(recipe)
    labelled = None if recipe.labels is None else labels.read(recipe.labels)
    model = subject.find(recipe.model, Path(recipe.run.dir))
    written, recipe = recipe, _resolved(recipe, model)
    _check_template(recipe, model)
    suite = suite_dir(recipe)
    settings = rows.settings(recipe, model.model_hash, model.template_hash, model.environment, versions)
    decided = manifests.decided_by(recipe, settings)
    manifests.check(suite, decided)  # before anything is made for it
    rewriter = _rewriter(recipe, model, settings, lambda other: _surrogate(written, other, versions))
    work = worklist.plan(recipe, rewriter, _encoder(recipe, model).refusals)
    worklist.log_coverage(recipe.suite, work)
    _check_pictures(work, model)
    rounds = rows.rounds(work.questions)
    questions = rows.keyed(rounds[0], settings)
    matched = None
    if len(rounds) == 1:
        matched = labelled and labelled.matched({key: rows.place(q) for key, q in questions.items()})
    manifest = manifests.claim(suite, manifests.describe(recipe, work, decided, _all_versions(versions)))
    _begin(suite, recipe)
    size = manifest.get("chunk_rows", recipe.generation.batch_size)
    with Claims(suite) as claims:
        with _loader(engine, recipe, model, suite, claims) as load:
            answers = worker.work(suite, questions, rows.chunks(questions, size), claims, load, place)
            for turn in rounds[1:]:  # of conversations, whose keys contain the answers to earlier turns
                earlier = {key: rows.place(question) for key, question in questions.items() if question.sample.turn}
                responses = {earlier[row["key"]]: row["response"] for row in answers.of(earlier)}
                own = rows.keyed([rows.resumed(question, responses) for question in turn], settings)
                answers = worker.work(suite, own, rows.chunks(own, size), claims, load, place)
                questions |= own
        if len(rounds) > 1:
            questions = rows.ordered(questions, work.questions)
            matched = labelled and labelled.matched({key: rows.place(q) for key, q in questions.items()})
        model.check_unchanged()
        _report_repeated(recipe, answers)
        if (claim := claims.take_unless_alive("judging", partial(_stop_if_requested, recipe))) is None:
            log.info(f"eval {recipe.suite}: every question is answered; another worker judges", extra=EVERY_RANK)
            return None
        try:
            result = judging.judge(recipe, suite, model.model_hash, panel, work, answers.of(questions), claims, matched)
            files.write(suite / "metrics.json", results.text(result))
            model.discard(suite)
        finally:
            claims.release(claim)
    return result


def _rewriter(
    recipe: EvalRecipe, model: Subject, settings: Settings, other: Callable[[EvalModelConfig], Rewriter] | None = None
) -> Rewriter:
    suite = suite_dir(recipe)

    def load(claims: Claims) -> HuggingFace:
        return _load(HuggingFace, recipe, model, suite, claims)

    return Rewriter(suite, settings, load, _encoder(recipe, model), other)


def _surrogate(recipe: EvalRecipe, model: EvalModelConfig, versions: dict[str, str]) -> Rewriter:
    """What makes rewrites on another model than the one under test. recipe: as written. Raises as `subject.find`."""
    other = subject.find(model, Path(recipe.run.dir))
    own = _resolved(replace(recipe, model=model), other)
    settings = rows.settings(own, other.model_hash, other.template_hash, other.environment, versions)
    return _rewriter(own, other, settings)


def _begin(suite: Path, recipe: EvalRecipe) -> None:
    """Write config.yaml, and remove the rates of other settings, such as another judge's.

    A stop before the new rates are there must not leave the old ones beside a recipe that did not make them.
    """
    file = suite / "config.yaml"
    if file.is_file() and not _same(file, recipe):
        (suite / "metrics.json").unlink(missing_ok=True)
    files.write(file, configs.to_yaml(recipe))


def _same(file: Path, recipe: EvalRecipe) -> bool:
    """Whether a config.yaml is of this recipe, wherever its run directory has been moved."""
    moved = ["run", "model.path", "model.run"]
    try:
        return configs.config_hash(configs.load(file, [], EvalRecipe), moved) == configs.config_hash(recipe, moved)
    except ConfigError:
        return False


@contextmanager
def _loader(
    engine: type[Generator], recipe: EvalRecipe, model: Subject, suite: Path, claims: Claims
) -> Iterator[Callable[[], Generator]]:
    """A function that loads the model when there is something to answer. The GPU is free again after the block."""
    with ExitStack() as loaded:
        yield cache(lambda: loaded.enter_context(_load(engine, recipe, model, suite, claims)))


def _load(engine: type[G], recipe: EvalRecipe, model: Subject, suite: Path, claims: Claims) -> G:
    generator = engine(model.loadable(suite, claims), recipe.template, recipe.generation)
    model.check_unchanged()
    return generator


def _stop_if_requested(recipe: EvalRecipe) -> None:
    if name := signals.received():
        raise StopRequested(f"eval {recipe.suite}: stopped by {name}; every answer so far is on disk")


def _report_repeated(recipe: EvalRecipe, answers: Answers) -> None:
    if answers.repeated:
        log.info(
            f"eval {recipe.suite}: {answers.repeated} questions were answered twice, {len(answers.differing)} of them "
            f"with another text; the first answer counts{_first(answers.differing)}",
            extra=EVERY_RANK,
        )


def _first(keys: Collection[str]) -> str:
    return f" (keys {', '.join(sorted(keys)[:3])} …)" if keys else ""


def _resolved(recipe: EvalRecipe, model: Subject) -> EvalRecipe:
    """The recipe with what `image_aspect: auto` comes to, since that decides the answers."""
    if recipe.template.image_aspect != "auto":
        return recipe
    return replace(recipe, template=replace(recipe.template, image_aspect=model.aspect))


def _check_template(recipe: EvalRecipe, model: Subject) -> None:
    """Raise ConfigError when the template differs from that of training, as it did unnoticed in the paper's code."""
    if model.trained_in is None or not (trained := model.trained_in / "config.yaml").is_file():
        return
    data = runs.recipe(model.trained_in).data
    same = ("image_aspect", "template_options")
    for key in same if recipe.template.defence is not None else ("system_prompt", *same):
        here, there = getattr(recipe.template, key), getattr(data, key)
        if here != (model.aspect if there == "auto" else there):
            way = ", or name it as a defence: template.defence=NAME" if here and key == "system_prompt" else ""
            raise ConfigError(
                f"template.{key}={here!r}, but {trained} trained with data.{key}={there!r}; set the same value "
                f"here{way}"
            )


def _encoder(recipe: EvalRecipe, model: Subject) -> Encoder:
    return encoder(processors.load(model.processing), recipe.template, families.load(model.processing))


def _check_pictures(work: WorkList, model: Subject) -> None:
    """Raise ConfigError when a text-only model would be asked about pictures."""
    pictured = [question for question in work.questions if question.sample.image is not None]
    if not pictured or not model.text_only:
        return
    first = pictured[0]
    if all(question.attack != CLEAN.attack for question in pictured):
        raise ConfigError(
            f"model.path={model.folder} is a text-only model, but sets.{first.set}.attacks.{first.attack} puts "
            "questions into pictures; leave that attack out, or choose a vision-language model"
        )
    raise ConfigError(
        f"model.path={model.folder} is a text-only model, but {len(pictured)} of {len(work.questions)} questions "
        f"have a picture (the first: sets.{first.set}, id {first.sample.id!r}); choose sources without pictures (such "
        "as variant: text_only)"
    )


def _all_versions(engine: dict[str, str]) -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), "mirage-dist": __version__, **libraries, **engine}
