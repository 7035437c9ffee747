"""Questions and answers for the page's example browser, chosen by hash so that nobody picked them.

What models said of real data is left out of the file unless it was asked for by name: a page gets passed on.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage_dist.report.load import Run, by_hash
from mirage_dist.report.style import slots

Place = tuple[str, str, str, int]  # set, question id, attack, shot


def gather(runs: Sequence[Run], count: int, outputs: bool) -> dict[str, Any]:
    """What the browser shows, ready for JSON: up to `count` questions a set with all of their rewrites.

    {"models": [{"name", "slot"}], "judges", "outputs": are answers in it, "sets": {set: {"kind", "shown",
    "questions"}}, "pictures": [data URI], "asked": [{"set", "id", "attack", "shot", "category", "question",
    "original", "expected", "picture": index or None, "answers": [{"verdicts": {judge: verdict}, "said": text or None}
    or None, one a model]}]}.
    Pictures and the data's own answers come from embedded worlds only, where none can harm.
    """
    chosen = {own: _chosen(runs, own, count) for own in dict.fromkeys(s for run in runs for s in run.metrics["sets"])}
    questions = {(own, identity) for own, ids in chosen.items() for identity in ids}
    asked: dict[Place, dict[str, Any]] = {}
    pictures: dict[str, int] = {}  # path -> index
    for number, run in enumerate(runs):
        for row in run.asked(questions):
            place = (row["set"], row["id"], row["attack"], row["shot"])
            if place not in asked:
                asked[place] = _question(run, row, pictures, len(runs))
            verdicts = {judge: said[row["key"]] for judge, said in run.verdicts.items() if row["key"] in said}
            asked[place]["answers"][number] = {"verdicts": verdicts, "said": row["response"] if outputs else None}
    order = {place: number for number, place in enumerate((own, i) for own, ids in chosen.items() for i in ids)}
    own = slots([run.name for run in runs])
    return {
        "models": [{"name": run.name, "slot": own[run.name]} for run in runs],
        "judges": list(dict.fromkeys(judge for run in runs for judge in run.verdicts)),
        "outputs": outputs,
        "sets": {name: _told(runs, name, len(ids)) for name, ids in chosen.items() if ids},
        "pictures": [_data(path) for path in pictures],
        "asked": sorted(asked.values(), key=lambda entry: order[entry["set"], entry["id"]]),
    }


def _chosen(runs: Sequence[Run], own: str, count: int) -> list[str]:
    """The first ids of a set in the order of their hashes: an arbitrary choice that nobody made."""
    return by_hash({judged.id for run in runs for judged in run.judged if judged.set == own})[:count]


def _told(runs: Sequence[Run], own: str, shown: int) -> dict[str, Any]:
    about = next(run.metrics["sets"][own] for run in runs if own in run.metrics["sets"])
    return {"kind": about["kind"], "shown": shown, "questions": about["samples"]}


def _question(run: Run, row: Mapping[str, Any], pictures: dict[str, int], models: int) -> dict[str, Any]:
    return {
        **{name: row[name] for name in ("set", "id", "attack", "shot", "category", "question")},
        "original": row["original_question"],
        "expected": row["expected"] if run.metrics["world"] else None,
        "picture": _picture(run, row["image"], pictures),
        "answers": [None] * models,
    }


def _picture(run: Run, path: str | None, pictures: dict[str, int]) -> int | None:
    if not run.metrics["world"] or path is None or not Path(path).is_file():
        return None
    return pictures.setdefault(path, len(pictures))


def _data(path: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def as_script(data: Mapping[str, Any]) -> str:
    """JSON that can stand in a script element: nothing in it can end the element or begin a tag."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
