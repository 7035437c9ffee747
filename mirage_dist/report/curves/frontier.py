"""The forget–retain frontier of a sweep as a section of the page, as text, and as frontier.json and frontier.csv.

`sweep.frontier` computes it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypedDict

from mirage_dist.evals.results import Condition
from mirage_dist.report.figures import drawing
from mirage_dist.report.figures import frontier as figure
from mirage_dist.report.figures.style import slots
from mirage_dist.report.tables import framed

FILES = ("frontier.json", "frontier.csv")
TITLE = "Forget–retain frontier"
BASE = "base"  # the model that all trainings start from
LOWER = frozenset({"asr", "rr"})  # measures of which less is better
MEASURES = {
    "asr": "attack success",
    "refusal": "refusals of unsafe questions",
    "utility": "right answers to safe questions",
    "rr": "needless refusals",
    "locality": "right answers near the forgotten",
    "accuracy": "accuracy",
}


class Axis(TypedDict):
    """What one axis measures: a measure of a set of a suite under a condition (a key of metrics.json).

    questions: those that every run answered, and that have a verdict. left_out: of the others, how many.
    """

    measure: str
    suite: str
    set: str
    condition: str
    questions: int
    left_out: int


class Estimate(TypedDict):
    """A mean over seeds and questions, from 0 to 1. ci95: [low, high]. sd: over seeds, None of one seed."""

    rate: float
    ci95: list[float]
    sd: float | None
    by_seed: list[float]


class Setting(TypedDict):
    """One setting of a method, over its seeds. values: of the swept keys. runs: names of its points, by seed.

    pareto: no other setting of the method is as good on both axes and better on one. pareto_share: the share of
    resamples of questions and seeds in which that holds. pareto_of_all: the same among the settings of all methods.
    """

    method: str
    setting: str
    values: dict[str, Any]
    seeds: list[int]
    runs: list[str]
    forget: Estimate
    retain: Estimate
    pareto: bool
    pareto_share: float
    pareto_of_all: bool


class AtLevel(TypedDict):
    """A method at the level: chosen on one half of questions (and of seeds), measured on the other, and the reverse.

    forget, retain: of the halves that did not choose; None where no setting of a half reaches the level. in_sample: the
    forget measure on the halves that chose, which is optimistic. chosen: the setting of each half. of_all: the setting
    that all questions and seeds would choose.
    """

    method: str
    forget: Estimate | None
    retain: Estimate | None
    in_sample: float | None
    chosen: list[str | None]
    of_all: str | None


class Difference(TypedDict):
    """Of the forget measure of two methods at the level, second minus first."""

    methods: list[str]
    difference: float
    ci95: list[float]


class Frontier(TypedDict):
    """frontier.json. level: of the retain measure. seeds_held_out: whether choosing and measuring use other seeds.

    incomplete: points without results, each with the reason; their settings are in no figure. resamples: of the
    bootstrap.
    """

    sweep: str
    forget: Axis
    retain: Axis
    level: float
    level_from: str
    base: dict[str, Estimate] | None
    settings: list[Setting]
    at_level: list[AtLevel]
    differences: list[Difference]
    seeds: list[int]
    seeds_held_out: bool
    incomplete: dict[str, str]
    resamples: int


def axis_title(axis: Axis) -> str:
    """Such as `attack success, what, K = 3`."""
    return f"{MEASURES[axis['measure']]}, {Condition.parse(axis['condition']).label}"


def values_text(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_plain(value)}" for key, value in values.items()) or "the recipe as it is"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def note(own: Frontier) -> str:
    """How to read the section, in sentences."""
    seeds = len(own["seeds"])
    held_out = (
        "one half of the questions and of the seeds chooses a method's setting, the other measures it, and the reverse"
        if own["seeds_held_out"]
        else "one half of the questions chooses a method's setting, the other measures it, and the reverse; there is "
        "one seed only, whose luck stays in both halves"
    )
    return (
        f"Each setting is the mean over {seeds} seed{'s' * (seeds > 1)}. Forget: {_titled(own['forget'])}. Retain: "
        f"{_titled(own['retain'])}. Intervals hold 95 %, over questions and seeds. Methods are compared at "
        f"{_level(own)}: {held_out}. The best of many settings is flattered by the questions that chose it; that "
        "figure stands beside."
    )


def _titled(axis: Axis) -> str:
    return f"{axis_title(axis)} ({_better(axis)} is better)"


def _better(axis: Axis) -> str:
    return "less" if axis["measure"] in LOWER else "more"


def _level(own: Frontier) -> str:
    side = "at most" if own["retain"]["measure"] in LOWER else "at least"
    return f"{MEASURES[own['retain']['measure']]} of {side} {100 * own['level']:.1f} % ({own['level_from']})"


def section(own: Frontier) -> tuple[str, str, str]:
    """Title, note and HTML of the page's section."""
    description = f"{TITLE} of the sweep {own['sweep']}"
    titles = _titled(own["forget"]), _titled(own["retain"])
    drawn = drawing.svg(figure.frontier(own, titles), "frontier", description, figure.SIZE)
    caption = (
        "Each marker is a setting, with its 95 % intervals; small ones are its seeds. Lines join the settings of a "
        "method that no other of its settings beats on both axes. The dashed line is the level; a ring marks the "
        "setting that all questions would choose there."
    )
    shown = f"<figure><h3>{escape(TITLE)}</h3>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"
    lacking = "".join(f'<p class="warning">{escape(line)}</p>' for line in incomplete(own))
    parts = [lacking, f'<div class="figures">{shown}</div>', _at_level_table(own), _settings_table(own)]
    return f"{TITLE}: {own['sweep']}", note(own), "".join(parts)


def incomplete(own: Frontier) -> list[str]:
    """What the frontier lacks, in sentences."""
    return [f"{name} has no result, and its setting is left out: {why}" for name, why in own["incomplete"].items()]


def _at_level_table(own: Frontier) -> str:
    places = slots(methods(own))
    body = []
    for row in own["at_level"]:
        chosen = [_named(own, row["method"], setting) for setting in dict.fromkeys(row["chosen"])]
        settings = "<br>".join(f'<span class="note">{escape(text)}</span>' for text in chosen)
        flattered = "" if row["in_sample"] is None else f"{100 * row['in_sample']:.1f}"
        colour = f"--c:var(--slot{places[row['method']]})"
        body.append(
            f'<tr><th scope="row"><span class="name" style="{colour}">{escape(row["method"])}</span></th>'
            f"<td>{_cell(row['forget'])}</td><td>{_cell(row['retain'])}</td>"
            f'<td><span class="count">{flattered}</span></td><td>{settings}</td></tr>'
        )
    measures = (axis_title(own["forget"]), axis_title(own["retain"]))
    titles = (f"Method, at {_level(own)}", *measures, "on the half that chose", "settings chosen")
    table = framed("rates main", "".join(f'<th scope="col">{escape(t)}</th>' for t in titles), "".join(body))
    pairs = "".join(f"<li>{escape(_difference(pair))}</li>" for pair in own["differences"])
    return table + (f'<ul class="facts">{pairs}</ul>' if pairs else "")


def _named(own: Frontier, method: str, setting: str | None) -> str:
    if setting is None:
        return "no setting reaches the level"
    return next(
        values_text(one["values"]) for one in own["settings"] if (one["method"], one["setting"]) == (method, setting)
    )


def _difference(pair: Difference) -> str:
    low, high = (100 * bound for bound in pair["ci95"])
    first, second = pair["methods"]
    return f"{first} → {second}: {100 * pair['difference']:+.1f} points ({low:+.1f} to {high:+.1f})"


def _cell(own: Estimate | None) -> str:
    if own is None:
        return '<span class="count">not reached</span>'
    return f'<span class="rate">{100 * own["rate"]:.1f}</span><span class="count">{_spread(own)}</span>'


def _spread(own: Estimate) -> str:
    low, high = (100 * bound for bound in own["ci95"])
    deviation = "" if own["sd"] is None else f" · sd {100 * own['sd']:.1f}"
    return f"{low:.1f}–{high:.1f}{deviation}"


def _settings_table(own: Frontier) -> str:
    places, body = slots(methods(own)), []
    for one in own["settings"]:
        on = f"{100 * one['pareto_share']:.0f} %" if one["pareto_share"] else "–"
        mark = "on the frontier" if one["pareto"] else ""
        body.append(
            f'<tr><th scope="row"><span class="name" style="--c:var(--slot{places[one["method"]]})">'
            f'{escape(one["method"])}</span> <span class="note">{escape(values_text(one["values"]))}</span></th>'
            f"<td>{_cell(one['forget'])}</td><td>{_cell(one['retain'])}</td>"
            f'<td>{mark}<span class="count">{on} of resamples</span></td></tr>'
        )
    if (base := own["base"]) is not None:
        body.insert(
            0,
            f'<tr><th scope="row"><span class="name" style="--c:var(--slot{places[BASE]})">{BASE}</span></th>'
            f"<td>{_cell(base['forget'])}</td><td>{_cell(base['retain'])}</td><td></td></tr>",
        )
    titles = ("Setting", axis_title(own["forget"]), axis_title(own["retain"]), "Pareto")
    table = framed("rates main", "".join(f'<th scope="col">{escape(t)}</th>' for t in titles), "".join(body))
    return f"<details><summary>All {len(own['settings'])} settings</summary>{table}</details>"


def methods(own: Frontier) -> list[str]:
    """The base model and the methods, in order: they have one colour each."""
    return list(dict.fromkeys([BASE, *(row["method"] for row in own["at_level"])]))


def text(own: Frontier) -> str:
    """The comparison at the level, for a terminal."""
    rows = [["method", axis_title(own["forget"]), axis_title(own["retain"]), "setting"]]
    for row in own["at_level"]:
        chosen = "; ".join(_named(own, row["method"], setting) for setting in dict.fromkeys(row["chosen"]))
        both = (row["forget"], row["retain"])
        cells = ["not reached" if e is None else f"{100 * e['rate']:.1f} [{_spread(e)}]" for e in both]
        rows.append([row["method"], *cells, chosen])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*incomplete(own), f"at {_level(own)}:", *table, *map(_difference, own["differences"])])


def dumped(own: Frontier) -> dict[str, str]:
    """Name -> content of frontier.json and frontier.csv."""
    return {FILES[0]: json.dumps(own, indent=1) + "\n", FILES[1]: _sheet(own)}


def _sheet(own: Frontier) -> str:
    """A line for each setting (seed: mean) and for each of its seeds."""
    buffer = io.StringIO()
    sheet = csv.writer(buffer, lineterminator="\n")
    keys = list(dict.fromkeys(key for one in own["settings"] for key in one["values"]))
    names = ("rate", "low", "high", "sd")
    head = ["method", "setting", *keys, "seed", "pareto", "pareto_share"]
    sheet.writerow([*head, *(f"{axis}_{name}" for axis in ("forget", "retain") for name in names)])
    for one in own["settings"]:
        place = [one["method"], one["setting"], *(_safe(one["values"].get(key, "")) for key in keys)]
        both: Sequence[Estimate] = (one["forget"], one["retain"])
        figures = [x for e in both for x in (e["rate"], *e["ci95"], "" if e["sd"] is None else e["sd"])]
        sheet.writerow([*place, "mean", int(one["pareto"]), one["pareto_share"], *figures])
        for number, seed in enumerate(one["seeds"]):
            rates = [x for e in both for x in (e["by_seed"][number], "", "", "")]
            sheet.writerow([*place, seed, "", "", *rates])
    return buffer.getvalue()


def _safe(value: Any) -> Any:
    """No text that a spreadsheet would take for a formula."""
    return value if isinstance(value, (int, float)) else f"'{value}" if str(value)[:1] in "=+-@\t\r" else str(value)
