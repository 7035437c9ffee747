"""From a sweep's directory to its frontier and its report; reads files only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mirage_dist import config as configs
from mirage_dist import runs as run_records
from mirage_dist.report import load, report
from mirage_dist.report.curves import frontier as formats
from mirage_dist.report.curves.frontier import Axis, Frontier
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.sweep import directory, frontier, measures
from mirage_dist.sweep.directory import PointRecord, SweepRecord
from mirage_dist.sweep.frontier import Measured, Questions
from mirage_dist.sweep.measures import Place

ByQuestion = dict[str, float]


@dataclass
class _Answers:
    """What the points say: name -> the values of both measures. unjudged: of each, questions without a verdict."""

    both: dict[str, tuple[ByQuestion, ByQuestion]] = field(default_factory=dict)
    unjudged: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))
    incomplete: dict[str, str] = field(default_factory=dict)
    # measure -> point -> recipe_hash, judge and its rules
    comparable: dict[Place, dict[str, tuple[str, str, str]]] = field(default_factory=dict)


def compute(out: Path) -> Frontier:
    """The frontier of a sweep's complete settings.

    Raises ConfigError where there is no sweep, one without `frontier`, or points that were evaluated differently;
    RunError when no setting is complete, the base model's rates are missing, or no question has an answer of all.
    """
    record = directory.read(out)
    options = record["frontier"]
    if options is None:
        raise ConfigError(f"{out}: this sweep has no `frontier`; add it to its recipe and start it again")
    places = Place(**options["forget"]), Place(**options["retain"])
    _check_starts(out, record)
    answers = _read(out, record, places)
    measured, base, questions, left_out = _aligned(record, answers, places)
    level, level_from = _level(options, base, places[1])
    rows = frontier.at_level(measured, questions, level)
    one_seed = all(len(one.seeds) < 2 for one in measured)
    ids = (questions.forget, questions.retain)
    axes = [_axis(place, own, left) for place, own, left in zip(places, ids, left_out, strict=True)]
    return {
        "sweep": record["name"],
        "forget": axes[0],
        "retain": axes[1],
        "level": level,
        "level_from": level_from,
        "base": None
        if base is None
        else {
            "forget": frontier.estimates([base.forget], "base forget")[0][0],
            "retain": frontier.estimates([base.retain], "base retain")[0][0],
        },
        "settings": frontier.settings(measured, questions),
        "at_level": rows,
        "differences": frontier.differences(rows),
        "seeds": record["seeds"],
        "seeds_held_out": not one_seed,
        "incomplete": answers.incomplete,
        "resamples": frontier.RESAMPLES,
    }


def _axis(place: Place, ids: Sequence[str], left_out: int) -> Axis:
    return {
        "measure": place.measure,
        "suite": place.suite,
        "set": place.set,
        "condition": place.condition,
        "questions": len(ids),
        "left_out": left_out,
    }


def _check_starts(out: Path, record: SweepRecord) -> None:
    """Raise ConfigError where points were trained from different weights in the same place."""
    firsts: dict[str, tuple[str, str]] = {}
    for point in record["points"]:
        folder = out / "points" / point["name"]
        begun = run_records.manifest(folder)
        if begun is None:
            continue
        model = configs.load(folder / "config.yaml", [], TrainRecipe).model.path
        first, weights = firsts.setdefault(model, (point["name"], begun["base_hash"]))
        if weights != begun["base_hash"]:
            raise ConfigError(
                f"{out}: points {first} and {point['name']} were trained from different weights: the model's folder "
                "has changed in between. Move the points of the former weights away, and start `mirage sweep` again"
            )


def _read(out: Path, record: SweepRecord, places: tuple[Place, Place]) -> _Answers:
    answers = _Answers()
    names = [point["name"] for point in record["points"]] + ([record["base"]] if record["base"] else [])
    for name in names:
        folder = out / "points" / name
        try:
            runs = {place.suite: load.read({name: folder}, place.suite)[0] for place in places}
            own = [measures.values(runs[place.suite], place) for place in places]
        except (ConfigError, RunError) as error:
            answers.incomplete[name] = str(error).splitlines()[0]
            continue
        answers.both[name] = own[0][0], own[1][0]
        for known, (_, unjudged) in zip(answers.unjudged, own, strict=True):
            known |= unjudged
        for place in places:
            run = runs[place.suite]
            settings = run.metrics["recipe_hash"], *measures.judged_by(run, place)
            answers.comparable.setdefault(place, {})[name] = settings
    for place, by_name in answers.comparable.items():
        first, *others = by_name
        if other := next((name for name in others if by_name[name] != by_name[first]), None):
            what = "judges or rules" if by_name[other][0] == by_name[first][0] else "questions or settings"
            raise ConfigError(
                f"{out}: points {first} and {other} were evaluated on {place.suite} with other {what}; start "
                "`mirage sweep` again, which evaluates what is not up to date"
            )
    return answers


def _aligned(
    record: SweepRecord, answers: _Answers, places: tuple[Place, Place]
) -> tuple[list[Measured], Measured | None, Questions, tuple[int, int]]:
    """Complete settings as arrays over the questions that all of them answered, and how many were left out."""
    if not answers.both:
        raise RunError("no point of this sweep has results yet: " + next(iter(answers.incomplete.values()), ""))
    shared: list[list[str]] = []
    left_out = []
    for axis in (0, 1):
        of_points = [own[axis] for own in answers.both.values()]
        common = set.intersection(*(set(own) for own in of_points))
        every = answers.unjudged[axis].union(*of_points)
        if len(common) < 2:
            raise RunError(
                f"{places[axis].suite}: {len(common)} questions have a verdict in all points; expected two at least"
            )
        shared.append(sorted(common))
        left_out.append(len(every) - len(common))
    groups: dict[tuple[str, str], list[PointRecord]] = {}
    for point in record["points"]:
        groups.setdefault((point["method"], point["setting"]), []).append(point)
    measured = []
    for own in groups.values():
        if all(point["name"] in answers.both for point in own):
            measured.append(_measured(own, answers, shared))
    if not measured:
        raise RunError(f"no setting has results of all its seeds yet; {len(answers.incomplete)} points are missing")
    base = None
    if record["base"] in answers.both:
        point: Any = {"name": record["base"], "method": record["base"], "setting": "", "values": {}, "seed": 0}
        base = _measured([point], answers, shared)
    questions = Questions(shared[0], shared[1], places[0].measure, places[1].measure)
    return measured, base, questions, (left_out[0], left_out[1])


def _measured(points: Sequence[PointRecord], answers: _Answers, shared: Sequence[Sequence[str]]) -> Measured:
    arrays = [
        np.array([[answers.both[point["name"]][axis][key] for key in ids] for point in points])
        for axis, ids in enumerate(shared)
    ]
    first = points[0]
    return Measured(
        first["method"],
        first["setting"],
        first["values"],
        [point["seed"] for point in points],
        [point["name"] for point in points],
        arrays[0],
        arrays[1],
    )


def _level(options: Mapping[str, Any], base: Measured | None, place: Place) -> tuple[float, str]:
    """The level, and where it comes from in words."""
    if options["level"] is not None:
        return options["level"], "frontier.level"
    if base is None:
        raise RunError("the base model's results are missing, from which the level comes; start `mirage sweep` again")
    sign = -1 if place.measure in formats.LOWER else 1
    level = float(base.retain.mean()) - sign * options["margin"]
    words = f"the base model's, {'less' if sign > 0 else 'plus'} {100 * options['margin']:g} points"
    return min(1.0, max(0.0, level)), words


def write(
    sweep: Path, out: Path, runs: Mapping[str, Path] | None = None, outputs: bool = False
) -> tuple[Frontier, str]:
    """Write the report whose first section is the frontier; returns it, and the section as text.

    runs: that the rest of the report shows; default: the base model, and of each method the first seed of the setting
    that all questions choose.
    """
    own = compute(sweep)
    title, note, html = formats.section(own)
    if runs is None:
        runs = shown(sweep, own)
        note += (
            " Below: of each method the first seed of the setting that all questions choose at the level; what chose "
            "it flatters it."
        )
    report(runs, out, None, own["forget"]["suite"], outputs, (title, note, html), formats.dumped(own))
    return own, formats.text(own)


def shown(sweep: Path, own: Frontier) -> dict[str, Path]:
    """The base model's run, and of each method that of the first seed of the setting that all questions choose."""
    runs = {}
    if own["base"] is not None:
        runs[formats.BASE] = sweep / "points" / formats.BASE
    picked = {(row["method"], row["of_all"]) for row in own["at_level"]}
    for one in own["settings"]:
        if (one["method"], one["setting"]) in picked:
            runs[one["method"]] = sweep / "points" / one["runs"][0]
    return runs or {own["settings"][0]["method"]: sweep / "points" / own["settings"][0]["runs"][0]}


def require_whole(own: Frontier) -> None:
    """Raise RunError when points have no results."""
    if own["incomplete"]:
        raise RunError(
            f"{len(own['incomplete'])} points of the sweep have no results, as the report's first section says"
        )
