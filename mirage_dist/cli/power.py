"""`mirage power`: how many questions a difference needs, or what difference so many questions show."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from mirage_dist.progress import put, show
from mirage_dist.schema import ConfigError
from mirage_dist.stats import power as exact

TESTS = {"paired": "McNemar's exact test", "unpaired": "Fisher's exact test"}


def power(parsed: argparse.Namespace) -> None:
    if (parsed.after is None) == (parsed.questions is None):
        raise ConfigError(
            "mirage power: give either --after, for the number of questions that this difference needs, or "
            "--questions, for the difference that so many show"
        )
    if parsed.unpaired and parsed.discordance is not None:
        raise ConfigError("--discordance: belongs to paired measurements; with --unpaired leave it out")
    if parsed.questions is not None and parsed.questions > exact.MOST:
        raise ConfigError(f"--questions {parsed.questions}: expected at most {exact.MOST:,}")
    if parsed.power <= parsed.level:
        raise ConfigError(f"--power {parsed.power:g}: expected more than the level, {parsed.level:g}")
    made = _questions(parsed) if parsed.questions is None else _differences(parsed)
    if parsed.json:
        put(json.dumps(made, indent=1) + "\n")
    else:
        show(*_lines(made))


def _design(parsed: argparse.Namespace, after: float) -> exact.Design:
    if parsed.unpaired:
        return exact.Unpaired(parsed.before, after)
    own = exact.independent(parsed.before, after) if parsed.discordance is None else parsed.discordance
    return exact.Paired(parsed.before, after, own)


def _head(parsed: argparse.Namespace) -> dict[str, Any]:
    design = "unpaired" if parsed.unpaired else "paired"
    return {"design": design, "test": TESTS[design], "level": parsed.level, "power": parsed.power}


def _questions(parsed: argparse.Namespace) -> dict[str, Any]:
    if parsed.before == parsed.after:
        raise ConfigError(f"--after {parsed.after:g}: the same rate as --before; expected another one")
    try:
        design = _design(parsed, parsed.after)
    except ValueError as error:
        raise ConfigError(f"--discordance: {error}") from error
    needed = exact.questions(design, parsed.level, parsed.power)
    if needed is None:
        raise ConfigError(
            f"--after {parsed.after:g}: {exact.MOST:,} questions do not show a change as small as this one; expected a "
            "larger one"
        )
    head = {**_head(parsed), **asdict(design), "independent": not parsed.unpaired and parsed.discordance is None}
    return {**head, "questions": needed[0], "achieved": needed[1]}


def _differences(parsed: argparse.Namespace) -> dict[str, Any]:
    made: dict[str, Any] = {**_head(parsed), "before": parsed.before, "questions": parsed.questions}
    if not parsed.unpaired:
        made |= {"discordance": parsed.discordance, "independent": parsed.discordance is None}
    for name, sign, most in (("fall", -1, parsed.before), ("rise", 1, 1 - parsed.before)):

        def design(difference: float, sign: int = sign) -> exact.Design | None:
            try:
                return _design(parsed, min(1.0, max(0.0, parsed.before + sign * difference)))
            except ValueError:  # no two such rates differ on so many questions
                return None

        shown = exact.detectable(design, parsed.questions, parsed.level, parsed.power, most)
        made[name] = None
        if shown is not None:
            after = round(parsed.before + sign * shown[0], 6)
            made[name] = {"after": after, "difference": sign * shown[0], "achieved": shown[1]}
    return made


def _lines(made: dict[str, Any]) -> list[str]:
    level, power = f"{made['level']:g}", _percent(made["power"])
    of_each = "questions" if made["design"] == "paired" else "questions of each kind"
    what = "the same questions twice" if made["design"] == "paired" else "two sets of different questions"
    lines = [f"{made['design']}: {what}, {made['test']}, two-sided, level {level}, power {power}"]
    if "fall" not in made:
        lines.append(f"from {_percent(made['before'])} to {_percent(made['after'])}: {made['questions']:,} {of_each}")
        lines.append(f"power with so many: {_percent(made['achieved'])}")
    else:
        lines.append(f"{made['questions']:,} {of_each}, from {_percent(made['before'])}:")
        for name, word in (("fall", "or lower"), ("rise", "or higher")):
            own = made[name]
            if own is None:
                lines.append(f"a {name}: none, however large")
            else:
                lines.append(f"a {name} to {100 * own['after']:.2f} % {word} (power {_percent(own['achieved'])})")
    if made["design"] == "paired":
        lines.append(_discordance(made))
    return lines


def _discordance(made: dict[str, Any]) -> str:
    if not made["independent"]:
        return f"the two measurements differ on {_percent(made['discordance'])} of the questions"
    given = "" if made.get("discordance") is None else f", {_percent(made['discordance'])} of the questions"
    return (
        f"discordance as of independent measurements{given}: two measurements of one question mostly agree more, and "
        "fewer questions suffice; --discordance takes a measured share"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
