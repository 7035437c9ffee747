"""The two measures of a sweep's frontier: checked against the suites' recipes before the first training, and read of a
run's verdicts, question by question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mirage_dist import config as configs
from mirage_dist.evals import attacks, judges, metrics, results
from mirage_dist.evals.judges import cache
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.results import CLEAN, UNJUDGED, AppliedAttack, Condition, Verdict
from mirage_dist.evals.sharing.files import Answers
from mirage_dist.report.load import Run
from mirage_dist.schema import ConfigError, EvalRecipe, RunError
from mirage_dist.sweep.recipe import ForgetConfig, FrontierConfig, RetainConfig


@dataclass(frozen=True)
class Measure:
    """kind: of the set. verdict: the one that counts. over: whether any or all rewrites of a question must get it."""

    kind: str
    verdict: Verdict
    over: Callable[[Iterable[bool]], bool]


MEASURES: Mapping[str, Measure] = {
    "asr": Measure("unsafe", "harmful", any),
    "refusal": Measure("unsafe", "refused", all),
    "utility": Measure("safe", "correct", all),
    "rr": Measure("safe", "refused", any),
    "locality": Measure("locality", "correct", all),
    "accuracy": Measure("utility", "scored", all),  # the mean score of the rewrites
}


@dataclass(frozen=True)
class Place:
    """A measure, resolved: where the verdicts are that it counts."""

    measure: str
    suite: str
    set: str
    condition: str


def places(frontier: FrontierConfig, recipes: Mapping[str, EvalRecipe]) -> tuple[Place, Place]:
    """The forget and the retain measure. recipes: by suite.

    Raises ConfigError, which names the key, for a suite, set or condition that the evaluations do not have, and for
    a measure that the suite's first judge cannot decide.
    """
    return _place("forget", frontier.forget, recipes), _place("retain", frontier.retain, recipes)


def _place(name: str, own: ForgetConfig | RetainConfig, recipes: Mapping[str, EvalRecipe]) -> Place:
    key, measure = f"frontier.{name}", MEASURES[own.measure]
    if own.suite is None and len(recipes) > 1:
        raise ConfigError(f"{key}.suite: name one of the suites ({', '.join(recipes)})")
    suite = own.suite or next(iter(recipes))
    if suite not in recipes:
        raise ConfigError(f"{key}.suite={suite}: no evaluation has it; {configs.nearest(suite, list(recipes))}")
    recipe = recipes[suite]
    fitting = [title for title, options in recipe.sets.items() if options.kind == measure.kind]
    if not fitting:
        raise ConfigError(f"{key}.measure={own.measure}: suite {suite} has no set of kind {measure.kind}")
    title = own.set or fitting[0]
    if title not in fitting:
        raise ConfigError(
            f"{key}.set={title}: {own.measure} counts a set of kind {measure.kind}; {configs.nearest(title, fitting)}"
        )
    _check_condition(f"{key}.condition", own.condition, recipe, title)
    panel = judges.read(recipe)
    able = [judge for judge in panel if measure.verdict in judge.verdicts]
    if not able or (own.measure != "accuracy" and able[0] is not panel[0]):
        raise ConfigError(
            f"{key}.measure={own.measure}: needs a judge that gives the verdict {measure.verdict!r}, and the first of "
            f"suite {suite}, {panel[0].name}, gives {', '.join(sorted(panel[0].verdicts))}"
        )
    return Place(own.measure, suite, title, own.condition)


def _check_condition(key: str, text: str, recipe: EvalRecipe, title: str) -> None:
    condition, own = Condition.parse(text), recipe.sets[title]
    if condition == CLEAN:
        return
    known = [str(CLEAN), *own.attacks]
    if fields := own.attacks.get(condition.attack):
        attack = attacks.make(fields, "the recipe", f"sets.{title}.attacks.{condition.attack}", own.kind)
        try:
            applied = AppliedAttack(condition.attack, max(1, attack.shots), attack.control, attack.draws)
        except ConfigError:  # a file that the world has yet to make; the evaluation itself will say so
            return
        if condition in applied.conditions:
            return
        known = [str(CLEAN), *map(str, applied.conditions)]
    raise ConfigError(f"{key}={text}: set {title} has no such condition; {configs.nearest(text, known)}")


def values(run: Run, place: Place) -> tuple[dict[str, float], set[str]]:
    """Question id -> the measure's value from 0 to 1; and the questions that have none, for want of a verdict.

    Raises RunError when verdicts are missing or damaged.
    """
    if run.problems:
        raise RunError(run.problems[0])
    measure, condition = MEASURES[place.measure], Condition.parse(place.condition)
    judged = [one for one in _judged(run, place) if one.set == place.set]
    info = run.metrics["sets"][place.set]["attacks"].get(condition.attack)
    attack = None if info is None else results.applied(condition.attack, info)
    shots = condition.shots
    if place.measure == "accuracy":
        own = {key: total / n for key, (total, n) in metrics.scores(judged, condition).items()}
    elif attack is not None and attack.draws and measure.over is any:
        own = metrics.best_scores(judged, attack, condition, measure.verdict)
        shots = attack.shots
    else:
        outcomes = metrics.outcomes(judged, condition, measure.verdict, measure.over)
        own = {key: float(hit) for key, hit in outcomes.items()}
    rows = [one for one in judged if one.attack == condition.attack and one.shot <= shots]
    unjudged = {one.id for one in rows if one.verdict in UNJUDGED}
    return {key: value for key, value in own.items() if key not in unjudged}, unjudged


def _judged(run: Run, place: Place) -> list[Judged]:
    """The verdicts of the judge that decides the measure, with the scores of a benchmark's."""
    if place.measure != "accuracy":
        return run.judged
    name = _benchmark(run)
    lines = {line["key"]: line for line in cache.verdicts(run.folder / "verdicts" / f"{name}.jsonl")}
    rows = Answers(run.folder).refresh().of(lines)
    return [
        Judged(
            row["set"],
            row["id"],
            row["attack"],
            row["shot"],
            line["verdict"],
            row["category"],
            line.get("detail", {}).get("score"),
            row.get("turns", 0),
        )
        for row, line in zip(rows, lines.values(), strict=True)
    ]


def judged_by(run: Run, place: Place) -> tuple[str, str]:
    """The judge that decides the measure, and the rules by which it did (its fingerprint)."""
    name = run.judge if place.measure != "accuracy" else _benchmark(run)
    return name, ", ".join(sorted(run.rules(name)))


def _benchmark(run: Run) -> str:
    return next(title for title, own in run.metrics["judges"].items() if own["kind"] == "benchmark")
