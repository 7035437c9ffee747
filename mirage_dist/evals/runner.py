"""`mirage eval`: ask a model every question of a suite, judge the answers, count.

A worker makes no collective call. It does what is missing and can be stopped, killed and started again at any time, and
any number of them can work on one suite at once.
"""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from sys import intern
from typing import Any

from mirage_dist import config as configs
from mirage_dist.evals import judges, metrics, rows, worker
from mirage_dist.evals.attacks.rewrites import Rewriter
from mirage_dist.evals.judges import Judge, Opinion
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.models import subject
from mirage_dist.evals.models import vllm as vllm_backend
from mirage_dist.evals.models.generate import Generator
from mirage_dist.evals.models.subject import Subject
from mirage_dist.evals.rows import Work
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import Answers, Row, suite_dir, told, write_atomically
from mirage_dist.evals.worker import Generate
from mirage_dist.schema import ConfigError, EvalRecipe, TrainRecipe


def evaluate(recipe: EvalRecipe, place: tuple[int, int] = (0, 1)) -> dict[str, Any] | None:
    """Answer what is missing with all other workers of this suite, judge what is unjudged, write `metrics.json`.

    place: (i, n), where in the work list this worker begins (see `evals.worker`). Of the workers that find everything
    answered one judges and returns what it wrote; the others return None.

    {"suite", "seed", "model_hash", "recipe_hash", "world", "sets": {set: {"kind", "samples", "attacks"}},
    "headline": judge, "judges": {judge: {"kind", "about", "entry", "sets", "categories", "paired", "verdicts",
    "unjudged"}}, "agreement"}. "entry" is {"asr", "rr", "ir", "utility", "locality"} of the first set of each kind, and
    where there are benchmarks "accuracy": {set: leaf} of their clean questions. "sets" has every set's measures (see
    `evals.metrics`), "categories" the same by category and subcategory, "paired" each attack against the clean
    questions, "verdicts" counts of verdicts, "agreement" what `evals.judges.compare` finds.

    The embedded world must exist where the recipe names one (see `inputs.make`).
    Raises ConfigError for a bad recipe, an engine that is not installed, bad data, a template that is not the one the
    run was trained with, or a suite directory that holds other settings' answers; all but a model that does not load
    before any weights are read. Raises RunError when the disk is full or the model's files change, and StopRequested
    behind the batch in which a signal came (see `signals`).
    """
    versions = _versions(recipe)  # and whether the engine is there at all
    panel = judges.panel(recipe)
    model = subject.find(recipe.model, Path(recipe.run.dir))
    _check_template(recipe, model)
    suite = suite_dir(recipe)
    settings = rows.settings(recipe, model.model_hash, model.template_hash)
    decided = _decided(recipe, settings)
    rows.check(suite, decided)  # before anything is made for it
    work = rows.plan(recipe, Rewriter(suite, settings, lambda claims: _generator(recipe, model, suite, claims)))
    _tell(recipe, work)
    _check_sight(work, model)
    manifest = rows.claim(suite, _manifest(recipe, work, decided, versions))
    _keep_recipe(recipe, suite)
    asks = rows.keyed(work.asks, settings)
    with Claims(suite) as claims:
        chunks = rows.chunks(asks, manifest["chunk_rows"])
        with _loader(recipe, model, suite, claims) as load:
            answers = worker.work(suite, asks, chunks, claims, load, place)
        model.check_unchanged()
        _tell_repeated(recipe, answers)
        if (claim := claims.take("judging")) is None:
            print(f"eval {recipe.suite}: every answer is there; another worker judges them", flush=True)
            return None
        try:
            result = {"model_hash": model.model_hash, **_measure(recipe, suite, panel, work, answers.of(asks))}
            write_atomically(suite / "metrics.json", json.dumps(result, indent=1) + "\n")
            model.discard(suite)
        finally:
            claims.release(claim)
    return result


@contextmanager
def _loader(recipe: EvalRecipe, model: Subject, suite: Path, claims: Claims) -> Iterator[Callable[[], Generate]]:
    """What loads the model when there is something to answer; in the end the GPU is free for the judges."""
    with ExitStack() as loaded:

        def load() -> Generate:
            if recipe.generation.backend == "hf":
                return _generator(recipe, model, suite, claims)
            told = model.loadable(suite, claims), recipe.template, recipe.generation
            generator = loaded.enter_context(vllm_backend.Generator(*told))
            model.check_unchanged()
            return generator

        yield load


def _generator(recipe: EvalRecipe, model: Subject, suite: Path, claims: Claims) -> Generator:
    generator = Generator(model.loadable(suite, claims), recipe.template, recipe.generation)
    model.check_unchanged()
    return generator


def _keep_recipe(recipe: EvalRecipe, suite: Path) -> None:
    """Renamed into place, for all workers write it."""
    beside = suite / f"config.yaml.{uuid.uuid4().hex[:8]}.tmp"
    with told(suite):
        configs.write_yaml(recipe, beside)
        beside.chmod(0o600)
        beside.replace(suite / "config.yaml")


def _tell_repeated(recipe: EvalRecipe, answers: Answers) -> None:
    if answers.repeated:
        print(
            f"eval {recipe.suite}: {answers.repeated} rows were answered again, {len(answers.differing)} with another "
            f"text; the first answer counts{_first(answers.differing)}",
            flush=True,
        )


def _first(keys: Collection[str]) -> str:
    return f" (keys {', '.join(sorted(keys)[:3])} …)" if keys else ""


def _tell(recipe: EvalRecipe, work: Work) -> None:
    """Print what the files' readers left out, and what the attacks could not do as asked; the manifest has the ids."""
    for name, read in work.read.items():
        left = {**read.dropped, "bad records": read.skipped, "ids renamed": read.renamed}
        if any(left.values()):
            told = ", ".join(f"{why} × {count}" for why, count in left.items() if count)
            print(
                f"eval {recipe.suite}: {name}: {len(read.samples)} questions; left out or changed: {told}", flush=True
            )
    for name, attacks in work.coverage.items():
        for title, found in attacks.items():
            if found.without or found.unknown or found.unchanged:
                print(
                    f"eval {recipe.suite}: {title} on {name}: {len(found.without)} samples without rewrites, "
                    f"{len(found.unknown)} ids of the file unknown, {found.unchanged} rewrites equal to the question",
                    flush=True,
                )


def _check_template(recipe: EvalRecipe, model: Subject) -> None:
    """Training and evaluation must see one template: in the paper's code they differed, unnoticed."""
    if model.trained_in is None or not (trained := model.trained_in / "config.yaml").is_file():
        return
    data = configs.load(trained, [], TrainRecipe).data
    for key in ("system_prompt", "image_aspect"):
        mine, its = getattr(recipe.template, key), getattr(data, key)
        if mine != its:
            raise ConfigError(
                f"template.{key}={mine!r}, but {trained} trained with data.{key}={its!r}; give it here too"
            )


def _check_sight(work: Work, model: Subject) -> None:
    """No text-only model is asked about what it cannot see."""
    shown = sum(ask.sample.image is not None for ask in work.asks)
    if shown and not model.sees:
        first = next(ask for ask in work.asks if ask.sample.image is not None)
        raise ConfigError(
            f"model.path={model.folder} is a text-only model, but {shown} of {len(work.asks)} questions have a picture "
            f"(the first: sets.{first.set}, id {first.sample.id!r}); take sources without (such as variant: text_only)"
        )


def _measure(
    recipe: EvalRecipe, suite: Path, panel: Sequence[Judge], work: Work, answered: Sequence[Row]
) -> dict[str, Any]:
    opinions = {judge.name: judges.judged(suite, judge, answered) for judge in panel}
    told = {j.name: _by_judge(recipe, j, work, answered, opinions[j.name]) for j in panel}
    # Benchmarks are scored against their own answers, whichever judge gives the headline.
    scores = [j["entry"]["accuracy"] for j in told.values() if j["kind"] == "benchmark"]
    for judged in told.values() if scores else ():
        judged["entry"]["accuracy"] = scores[0]
    return {
        "suite": recipe.suite,
        "seed": recipe.seed,
        "recipe_hash": _recipe_hash(recipe),
        "world": None if recipe.world is None else configs.to_dict(recipe.world),
        "sets": {
            name: {
                "kind": recipe.sets[name].kind,
                "samples": sum(a.set == name and a.attack == "clean" for a in work.asks),
                "attacks": {a.name: {"shots": a.shots, "control": a.control} for a in applied},
            }
            for name, applied in work.attacks.items()
        },
        "headline": panel[0].name,
        "judges": told,
        "agreement": judges.compare(panel, answered, {n: [o.verdict for o in own] for n, own in opinions.items()}),
    }


def _judged(row: Row, opinion: Opinion) -> Judged:
    """There may be a million: words that many rows share are kept once."""
    place = intern(row["set"]), intern(row["id"]), intern(row["attack"]), row["shot"]
    return Judged(*place, opinion.verdict, intern(row["category"]), opinion.detail.get("score"))


def _by_judge(
    recipe: EvalRecipe, judge: Judge, work: Work, answered: Sequence[Row], opinions: Sequence[Opinion]
) -> dict[str, Any]:
    judged = [_judged(row, opinion) for row, opinion in zip(answered, opinions, strict=True)]
    measured, categories, paired, counted = {}, {}, {}, {}
    for name, applied in work.attacks.items():
        told = recipe.sets[name].kind, [j for j in judged if j.set == name], applied, judge.verdicts
        measured[name] = metrics.measure(*told)
        categories[name] = metrics.by_category(*told)
        paired[name] = metrics.paired(*told)
        counted[name] = metrics.counts(told[1])
    return {
        "kind": judge.kind,
        "about": judge.about,
        "entry": _entry(recipe, measured),
        "sets": measured,
        "categories": categories,
        "paired": paired,
        "verdicts": counted,
        "unjudged": judges.unjudged(opinions),
    }


def _entry(recipe: EvalRecipe, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The headline figures; `measured` is by set."""
    entry: dict[str, Any] = {"asr": None, "rr": None, "ir": None, "utility": None, "locality": None}
    kinds = {name: recipe.sets[name].kind for name in measured}
    for name in reversed(list(measured)):  # so that the first set of a kind has the last word
        if kinds[name] != "utility":
            entry.update((m, value) for m, value in measured[name].items() if m in entry)
    benchmarks = [name for name, kind in kinds.items() if kind == "utility"]
    return {**entry, "accuracy": {n: measured[n]["accuracy"]["clean"] for n in benchmarks}} if benchmarks else entry


def _decided(recipe: EvalRecipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the rows; not where things lie, how fast they are asked or how judged."""
    tree = configs.to_dict(recipe)
    return {**{name: tree[name] for name in ("suite", "sets", "seed", "world")}, **settings}


def _manifest(
    recipe: EvalRecipe, work: Work, decided: Mapping[str, Any], versions: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "settings": decided,
        "chunk_rows": recipe.generation.batch_size,
        "asks": rows.by_condition(work.asks),
        "model": configs.to_dict(recipe.model),
        "recipe_hash": _recipe_hash(recipe),
        "sets": rows.coverage_report(work),
        "versions": versions,
    }


def _versions(recipe: EvalRecipe) -> dict[str, str]:
    libraries = {name: version(name) for name in ("mirage-dist", "torch", "transformers")}
    engine = {"vllm": vllm_backend.version()} if recipe.generation.backend == "vllm" else {}
    return {"python": platform.python_version(), **libraries, **engine}


def _recipe_hash(recipe: EvalRecipe) -> str:
    """Equal for runs that were asked the same questions in the same way: what makes them comparable."""
    others = (
        "run",
        "follow",
        "wandb_outputs",
        "erasure",
        "model.path",
        "model.run",
        "model.step",
        "generation.batch_size",
        "generation.gpu_memory_utilization",
        "judges",
        "seed",
        "world",
    )
    return configs.config_hash(recipe, ignore=others)
