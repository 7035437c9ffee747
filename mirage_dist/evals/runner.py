"""`mirage eval`: one model answers every question of a suite, the answers are judged, the rates are computed.

A worker makes no collective calls. It does what is missing and can be stopped, killed and started again at any time,
and any number of workers can share a suite.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TypeVar

from mirage_dist import __version__, runs, signals
from mirage_dist import config as configs
from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.evals import judges, judging, models, results, rows, worklist
from mirage_dist.evals import manifest as manifests
from mirage_dist.evals.attacks.rewrites import Rewriter
from mirage_dist.evals.defences import NONE, arms
from mirage_dist.evals.defences.arms import Arm
from mirage_dist.evals.judges import Judge
from mirage_dist.evals.judges.errors import labels
from mirage_dist.evals.judges.errors.labels import Labels, Matched
from mirage_dist.evals.models import remote, subject
from mirage_dist.evals.models.base import Generator, Respondent
from mirage_dist.evals.models.hf import HuggingFace, encoder
from mirage_dist.evals.models.remote import RemoteSubject
from mirage_dist.evals.models.subject import Subject
from mirage_dist.evals.results import CLEAN, SuiteResult
from mirage_dist.evals.rows import Settings
from mirage_dist.evals.sharing import files
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import Answers, suite_dir
from mirage_dist.evals.worklist import Question, WorkList
from mirage_dist.model.families import configs as families
from mirage_dist.model.families import processors
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe, RunError, TemplateConfig
from mirage_dist.signals import StopRequested

G = TypeVar("G", bound=Generator)


def evaluate(recipe: EvalRecipe, place: tuple[int, int] = (0, 1)) -> SuiteResult | None:
    """Answer the missing questions together with all other workers of the suite, then judge and write `metrics.json`:
    without a defence, and with each one of the recipe (see `evals.defences.arms`).

    place: (i, n): this is worker i of n, which decides where in the work list it begins (see `evals.worker`). Of the
    workers that find every question answered, one judges and returns the content of `metrics.json`; the others return
    None. The embedded world must exist where the recipe names one (see `inputs.make`).

    Raises ConfigError for a bad recipe, an engine that is not installed, bad data, bad labels, a template that differs
    from the one the run was trained with, or a suite directory with answers under other settings, all before any
    weights are read, and for a model that cannot be loaded. Raises RunError when the disk is full or the model's files
    change, when requests to an endpoint failed or it answers as another model than before, and StopRequested after the
    batch in which a signal came (see `signals`).
    """
    begun = _begun(recipe)
    with Claims(begun.suite) as claims:
        given = _answers(begun, claims, place)
        begun.model.check_unchanged()
        return _rates(begun, given, claims)


Given = tuple[Mapping[str, Question], Answers]  # questions by key, in the order of the work list, and their answers


@dataclass(frozen=True)
class _Begun:
    """An evaluation whose directories are its own. recipe: resolved. first: the first questions without a defence, by
    key. sizes: of each arm's chunks. labels: human ones, matched already unless conversations need answers first.
    """

    recipe: EvalRecipe
    suite: Path
    model: Subject | RemoteSubject
    engine: type[Generator]
    panel: Sequence[Judge]
    work: WorkList
    arms: Sequence[Arm]
    first: Mapping[str, Question]
    sizes: Mapping[str, int]
    labels: Labels | None
    matched: Matched | None

    def load(self, template: TemplateConfig, claims: Claims) -> Respondent:
        if isinstance(self.model, RemoteSubject):
            return self.model.load(template, self.recipe.generation, self.suite)
        return _load(self.recipe, self.model, self.suite, self.engine, template, claims)


def _begun(recipe: EvalRecipe) -> _Begun:
    """Check everything, make the rewrites, and claim the directories. Loads no weights unless rewrites need them."""
    worklist.check(recipe)
    engine = models.backend(recipe.generation.backend)
    versions = engine.versions()  # fails here where the engine is not installed
    engine.check(recipe.generation)
    panel = judges.panel(recipe)
    labelled = None if recipe.labels is None else labels.read(recipe.labels)
    model = subject.find(recipe.model, Path(recipe.run.dir)) if recipe.model.url is None else remote.find(recipe)
    written, recipe = recipe, _resolved(recipe, model)
    _check_template(recipe, model)
    suite = suite_dir(recipe)
    settings = _settings(recipe, model, versions)
    every = arms.of(recipe, suite, settings, panel)
    for arm in every:
        manifests.check(arm.folder, manifests.decided_by(recipe, arm.settings))  # before anything is made for it
    rewriter = _rewriter(recipe, model, settings, lambda other: _surrogate(written, other, versions))
    answering = rewriter.encoder
    work = worklist.plan(recipe, rewriter, *(() if answering is None else (answering.refusals,)))
    worklist.log_coverage(recipe.suite, work)
    _check_questions(work, model)
    rounds = rows.rounds(work.questions)
    first = every[0].keyed(rounds[0])
    matched = None
    if labelled is not None and len(rounds) == 1:
        matched = labelled.matched({key: rows.place(question) for key, question in first.items()})
    sizes = {}
    for arm in every:
        decided = manifests.decided_by(recipe, arm.settings)
        manifest = manifests.claim(arm.folder, manifests.describe(recipe, work, decided, _all_versions(versions)))
        sizes[arm.name] = manifest.get("chunk_rows", recipe.generation.batch_size)
    for arm in every:
        _begin(arm.folder, arm.recipe)
    return _Begun(recipe, suite, model, engine, panel, work, every, first, sizes, labelled, matched)


def _answers(begun: _Begun, claims: Claims, place: tuple[int, int]) -> dict[str, Given]:
    """Of each arm but filters, by its name, as soon as all are there. The device's memory is free again then.

    claims: this worker's, in the suite's folder.
    """
    given: dict[str, Given] = {}
    rounds = rows.rounds(begun.work.questions)
    with closing(_Loaded(partial(begun.load, claims=claims))) as loaded:
        for arm in begun.arms:
            if arm.guard is not None:
                continue
            first = begun.first if arm.defence is None else arm.keyed(rounds[0])
            load = partial(loaded.generator, arm.template)
            with _claims_of(arm, claims) as own:
                questions, answers = arms.answered(arm, first, rounds[1:], begun.sizes[arm.name], own, load, place)
            if len(rounds) > 1:
                questions = rows.ordered(questions, begun.work.questions)
            given[arm.name] = questions, answers
            _report_repeated(arm, answers)
    return given


def _rates(begun: _Begun, given: Mapping[str, Given], claims: Claims) -> SuiteResult | None:
    """Judge each arm that no other worker judges; the result without a defence, if this worker computed it."""
    result, matched = None, begun.matched
    questions, answers = given[NONE]
    if begun.labels is not None and matched is None:
        matched = begun.labels.matched({key: rows.place(question) for key, question in questions.items()})
    faults: list[str] = []
    order = sorted(begun.arms, key=lambda arm: arm.guard is not None)
    for arm in order:
        with _claims_of(arm, claims) as own, _judging(arm, own) as mine:
            if not mine:
                continue
            if arm.guard is not None:
                try:
                    answered = arms.filtered(arm, arm.guard, questions, answers.of(questions), own)
                except RunError as error:  # the rates of other defences do not wait for this guard
                    faults.append(str(error))
                    continue
            else:
                answered = given[arm.name][1].of(given[arm.name][0])
            human = matched if arm.defence is None else None
            judged = judging.judge(
                begun.recipe, arm.folder, begun.model.model_hash, begun.panel, begun.work, answered, own, human
            )
            if arm.defence is None and "caution" in judged:
                log.warning(f"eval {begun.recipe.suite}: {judged['caution']}", extra=EVERY_RANK)
            if isinstance(begun.model, RemoteSubject) and arm.guard is None:
                judged["endpoint"] = remote.info(begun.recipe.model, answered)
                log.info(f"eval {files.title(arm.folder)}: {results.taken(judged['endpoint'])}", extra=EVERY_RANK)
            if arm.defence is not None:
                judged["defence"] = arms.info(arm, arm.defence, questions, answered, begun.panel)
            files.write(arm.folder / "metrics.json", results.text(judged))
            result = judged if arm.defence is None else result
            if arm is order[-1] and not faults:
                begun.model.discard(begun.suite)
    if faults:
        raise RunError("\n".join(faults))
    return result


@contextmanager
def _claims_of(arm: Arm, claims: Claims) -> Iterator[Claims]:
    """This worker's claims in an arm's folder. claims: the suite's, where answers without a defence lie."""
    if arm.defence is None:
        yield claims
        return
    with Claims(arm.folder) as own:
        yield own


@contextmanager
def _judging(arm: Arm, claims: Claims) -> Iterator[bool]:
    """Whether this worker judges an arm, and for as long as it does, no other one."""
    if (claim := claims.take_unless_alive("judging", partial(_stop_if_requested, arm.recipe))) is None:
        log.info(f"eval {files.title(arm.folder)}: every question is answered; another worker judges", extra=EVERY_RANK)
        yield False
        return
    try:
        yield True
    finally:
        claims.release(claim)


def _settings(recipe: EvalRecipe, model: Subject | RemoteSubject, versions: Mapping[str, str]) -> Settings:
    if isinstance(model, RemoteSubject):
        return rows.settings_of_endpoint(recipe, model.identity)
    return rows.settings(recipe, model.model_hash, model.template_hash, model.environment, versions)


def _rewriter(
    recipe: EvalRecipe,
    model: Subject | RemoteSubject,
    settings: Settings,
    other: Callable[[EvalModelConfig], Rewriter] | None = None,
) -> Rewriter:
    suite = suite_dir(recipe)
    if isinstance(model, RemoteSubject):
        return Rewriter(suite, settings, partial(_no_weights, recipe), other=other)
    load = partial(_load, recipe, model, suite, HuggingFace, recipe.template)
    return Rewriter(suite, settings, load, _encoder(recipe, model), other)


def _no_weights(recipe: EvalRecipe, claims: object) -> NoReturn:
    raise ConfigError(
        f"model.url names an endpoint ({recipe.model.model}), and an attack of this recipe loads the weights of the "
        "model under test; leave it out, and say so in its class: weights = True"
    )


def _surrogate(recipe: EvalRecipe, model: EvalModelConfig, versions: dict[str, str]) -> Rewriter:
    """What makes rewrites on another model than the one under test. recipe: as written. Raises as `subject.find`."""
    other = subject.find(model, Path(recipe.run.dir))
    own = _resolved(replace(recipe, model=model), other)
    return _rewriter(own, other, _settings(own, other, versions))


def _begin(suite: Path, recipe: EvalRecipe) -> None:
    """Write config.yaml, and remove the rates of other settings, such as another judge's.

    A stop before the new rates are there must not leave the old ones beside a recipe that did not make them.
    """
    file = suite / "config.yaml"
    if file.is_file() and not _same(file, recipe):
        (suite / "metrics.json").unlink(missing_ok=True)
    files.write(file, configs.to_yaml(recipe))


def _same(file: Path, recipe: EvalRecipe) -> bool:
    """Whether a config.yaml is of this recipe, wherever its run directory has been moved, and with whatever defences:
    the manifests compare these.
    """
    moved = ["run", "model.path", "model.run", "defences"]
    try:
        return configs.config_hash(configs.load(file, [], EvalRecipe), moved) == configs.config_hash(recipe, moved)
    except ConfigError:
        return False


class _Loaded:
    """The model under test, loaded when there is something to answer, and again for another template."""

    def __init__(self, load: Callable[[TemplateConfig], Respondent]) -> None:
        self.load, self.template, self.held = load, None, ExitStack()
        self.current: Respondent | None = None

    def generator(self, template: TemplateConfig) -> Respondent:
        if self.current is None or template != self.template:
            self.close()
            self.template, self.current = template, self.held.enter_context(self.load(template))
        return self.current

    def close(self) -> None:
        """Release the device's memory."""
        self.held.close()
        self.current = None


def _load(
    recipe: EvalRecipe, model: Subject, suite: Path, engine: type[G], template: TemplateConfig, claims: Claims
) -> G:
    generator = engine(model.loadable(suite, claims), template, recipe.generation)
    model.check_unchanged()
    return generator


def _stop_if_requested(recipe: EvalRecipe) -> None:
    if name := signals.received():
        raise StopRequested(f"eval {recipe.suite}: stopped by {name}; every answer so far is on disk")


def _report_repeated(arm: Arm, answers: Answers) -> None:
    if answers.repeated:
        log.info(
            f"eval {files.title(arm.folder)}: {answers.repeated} questions were answered twice, "
            f"{len(answers.differing)} of them with another text; the first answer counts{_first(answers.differing)}",
            extra=EVERY_RANK,
        )


def _first(keys: Collection[str]) -> str:
    return f" (keys {', '.join(sorted(keys)[:3])} …)" if keys else ""


def _resolved(recipe: EvalRecipe, model: Subject | RemoteSubject) -> EvalRecipe:
    """The recipe with what `image_aspect: auto` comes to, since that decides the answers."""
    if isinstance(model, RemoteSubject) or recipe.template.image_aspect != "auto":
        return recipe
    return replace(recipe, template=replace(recipe.template, image_aspect=model.aspect))


def _check_template(recipe: EvalRecipe, model: Subject | RemoteSubject) -> None:
    """Raise ConfigError when the template differs from that of training, as it did unnoticed in the paper's code."""
    if (
        isinstance(model, RemoteSubject)
        or model.trained_in is None
        or not (trained := model.trained_in / "config.yaml").is_file()
    ):
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


def _check_questions(work: WorkList, model: Subject | RemoteSubject) -> None:
    """Raise ConfigError when a text-only model would get pictures, or an endpoint the beginning of its answer."""
    if isinstance(model, RemoteSubject):
        if begun := next((question for question in work.questions if question.sample.begun), None):
            raise ConfigError(
                f"sets.{begun.set}.attacks.{begun.attack}: begins the model's answer, which no request to an endpoint "
                "(model.url) can say; leave it out, or evaluate the weights (model.path)"
            )
        return
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
