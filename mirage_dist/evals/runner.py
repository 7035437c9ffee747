"""`mirage eval`: ask a model every question of a suite, judge the answers, count.

A worker makes no collective call. It does what is missing and can be stopped and started again at any time.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist import signals
from mirage_dist.data import toyworld
from mirage_dist.evals import judges, metrics, rows
from mirage_dist.evals.generate import Generator, model_hash, template_hash
from mirage_dist.evals.judges import Judge, Opinion
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.rows import Row, Work
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, TrainRecipe
from mirage_dist.signals import StopRequested

MAX_RESTARTS = 3


def suite_dir(recipe: EvalRecipe) -> Path:
    return Path(recipe.run.dir) / "evals" / recipe.suite


def evaluate(recipe: EvalRecipe, share: tuple[int, int] = (0, 1)) -> dict[str, Any] | None:
    """Answer what is missing, judge what is unjudged, write and return `metrics.json`.

    share: (i, n), this worker's part of the work list: every n-th question from the i-th on. None is returned while
    answers of other workers are missing; whoever finds all of them there judges and measures.

    {"suite", "seed", "model_hash", "recipe_hash", "world", "sets": {set: {"kind", "samples", "attacks"}},
    "headline": judge, "judges": {judge: {"kind", "about", "entry", "sets", "categories", "paired", "verdicts",
    "unjudged"}}, "agreement"}. "entry" is {"asr", "rr", "ir", "utility", "locality"} of the first set of each kind,
    "sets" every set's measures (see `evals.metrics`), "categories" the same by category and subcategory, "paired" each
    attack against the clean questions, "verdicts" counts of verdicts, "agreement" what `evals.judges.compare` finds.

    The embedded world is made first where the recipe names one that is not there.
    Raises ConfigError for a bad recipe, bad data, a template that is not the one the run was trained with, or a suite
    directory that holds other settings' answers; all but a model that does not load before any weights are read. Raises
    StopRequested behind the batch in which a signal came (see `signals`).
    """
    _check_template(recipe)
    if recipe.world is not None:
        toyworld.make(recipe.world)
    panel = judges.panel(recipe)
    work = rows.plan(recipe)
    _tell(recipe, work)
    settings = rows.settings(recipe, model_hash(recipe.model.path), template_hash(recipe.model.path))
    suite = suite_dir(recipe)
    rows.claim(suite, _manifest(recipe, work, settings))
    configs.write_yaml(recipe, suite / "config.yaml")
    answered = _answer(recipe, suite, rows.keyed(work.asks, settings), share)
    if answered is None:
        return None
    result = {"model_hash": settings["model_hash"], **_measure(recipe, suite, panel, work, answered)}
    rows.write_atomically(suite / "metrics.json", json.dumps(result, indent=1) + "\n")
    return result


def _tell(recipe: EvalRecipe, work: Work) -> None:
    """Print what the attacks could not do as asked; the manifest has the ids."""
    for name, attacks in work.coverage.items():
        for title, found in attacks.items():
            if found.without or found.unknown or found.unchanged:
                print(
                    f"eval {recipe.suite}: {title} on {name}: {len(found.without)} samples without rewrites, "
                    f"{len(found.unknown)} ids of the file unknown, {found.unchanged} rewrites equal to the question",
                    flush=True,
                )


def _answer(recipe: EvalRecipe, suite: Path, asks: Mapping[str, rows.Ask], share: tuple[int, int]) -> list[Row] | None:
    """Every row of the work list, in its order; generates those of this worker's share that are not on disk.

    None while rows of other shares are missing.
    """
    found, half = rows.read_rows(suite)
    missing = [key for key in list(asks)[share[0] :: share[1]] if key not in found]
    if half:
        print(f"eval {recipe.suite}: {half} half-written lines ignored", flush=True)
    _bound_restarts(suite, len(missing))
    there = sum(key in found for key in asks)
    print(f"eval {recipe.suite}: {there} of {len(asks)} answers are there", flush=True)
    if missing and signals.received() is None:
        generator = Generator(recipe.model, recipe.template, recipe.generation)
        samples = [asks[key].sample for key in missing]
        with rows.Writer(suite) as writer:
            for batch in generator(samples, f"eval {recipe.suite}"):
                new = [rows.row(missing[i], asks[missing[i]], text) for i, text in batch]
                writer.append(new)
                if name := signals.received():
                    raise StopRequested(f"eval {recipe.suite}: stopped by {name}; every answer so far is on disk")
        found, _ = rows.read_rows(suite)
    elif missing:
        raise StopRequested(f"eval {recipe.suite}: stopped by {signals.received()} before the first answer")
    if lacking := sum(key not in found for key in asks):
        print(
            f"eval {recipe.suite}: this share is done; {lacking} of {len(asks)} answers are still missing", flush=True
        )
        return None
    return [found[key] for key in asks]


def _bound_restarts(suite: Path, missing: int) -> None:
    """Raise RunError when the same Slurm job has started MAX_RESTARTS times in a row without one new answer."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    file = suite / "starts" / f"{job}.jsonl"
    file.parent.mkdir(exist_ok=True)
    before = [json.loads(line)["missing"] for line in file.read_text().splitlines()] if file.exists() else []
    if missing and before[-MAX_RESTARTS:] == [missing] * MAX_RESTARTS:
        raise RunError(
            f"{suite}: Slurm job {job} has started {MAX_RESTARTS} times with {missing} answers missing; see its log "
            "for what ended it, then submit it again"
        )
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps({"missing": missing}) + "\n")


def _check_template(recipe: EvalRecipe) -> None:
    """Training and evaluation must see one template: in the paper's code they differed, unnoticed."""
    trained = Path(recipe.run.dir) / "config.yaml"
    if not trained.is_file() or Path(recipe.run.dir) not in Path(recipe.model.path).parents:
        return
    data = configs.load(trained, [], TrainRecipe).data
    for key in ("system_prompt", "image_aspect"):
        mine, its = getattr(recipe.template, key), getattr(data, key)
        if mine != its:
            raise ConfigError(
                f"template.{key}={mine!r}, but {trained} trained with data.{key}={its!r}; give it here too"
            )


def _measure(
    recipe: EvalRecipe, suite: Path, panel: Sequence[Judge], work: Work, answered: Sequence[Row]
) -> dict[str, Any]:
    opinions = {judge.name: judges.judged(suite, judge, answered) for judge in panel}
    return {
        "suite": recipe.suite,
        "seed": recipe.seed,
        "recipe_hash": _recipe_hash(recipe),
        "world": None if recipe.world is None else configs.to_dict(recipe.world),
        "sets": {
            name: {
                "kind": recipe.sets[name].kind,
                "samples": sum(a.set == name and a.attack == "clean" for a in work.asks),
                "attacks": {c.name: {"shots": c.shots, "control": c.control} for c in conditions},
            }
            for name, conditions in work.conditions.items()
        },
        "headline": panel[0].name,
        "judges": {j.name: _by_judge(recipe, j, work, answered, opinions[j.name]) for j in panel},
        "agreement": judges.compare(panel, answered, {n: [o.verdict for o in own] for n, own in opinions.items()}),
    }


def _by_judge(
    recipe: EvalRecipe, judge: Judge, work: Work, answered: Sequence[Row], opinions: Sequence[Opinion]
) -> dict[str, Any]:
    judged = [
        Judged(row["set"], row["id"], row["attack"], row["shot"], opinion.verdict, row["category"])
        for row, opinion in zip(answered, opinions, strict=True)
    ]
    measured, categories, paired, counted = {}, {}, {}, {}
    for name, conditions in work.conditions.items():
        told = recipe.sets[name].kind, [j for j in judged if j.set == name], conditions, judge.verdicts
        measured[name] = metrics.measure(*told)
        categories[name] = metrics.by_category(*told)
        paired[name] = metrics.paired(*told)
        counted[name] = metrics.counts(told[1])
    headline: dict[str, Any] = {"asr": None, "rr": None, "ir": None, "utility": None, "locality": None}
    for measures in reversed(measured.values()):  # so that the first set of a kind has the last word
        headline.update((m, value) for m, value in measures.items() if m in headline)
    return {
        "kind": judge.kind,
        "about": judge.about,
        "entry": headline,
        "sets": measured,
        "categories": categories,
        "paired": paired,
        "verdicts": counted,
        "unjudged": judges.unjudged(opinions),
    }


def _manifest(recipe: EvalRecipe, work: Work, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`: all that decides the rows; not where things lie, how fast they are asked or how judged."""
    tree = configs.to_dict(recipe)
    libraries = ("mirage-dist", "torch", "transformers")
    return {
        "settings": {**{name: tree[name] for name in ("suite", "sets", "seed", "world")}, **settings},
        "model_path": recipe.model.path,
        "recipe_hash": _recipe_hash(recipe),
        "sets": rows.coverage_report(work),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
    }


def _recipe_hash(recipe: EvalRecipe) -> str:
    """Equal for runs that were asked the same questions in the same way: what makes them comparable."""
    others = ("run", "model.path", "generation.batch_size", "judges", "seed", "world")
    return configs.config_hash(recipe, ignore=others)
