"""Questions and answers for the page's example browser, chosen by hash so that nobody picked them.

Model outputs on real data are left out unless they are requested explicitly: a page gets passed on.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from mirage_dist.data.pictures import PictureError, as_png, open_picture
from mirage_dist.evals.judges.base import judged_picture
from mirage_dist.progress import log
from mirage_dist.report.figures.style import slots
from mirage_dist.report.load import Run, by_hash

Place = tuple[str, str, str, int]  # set, question id, attack, shot


class Answer(TypedDict):
    """One model's answer: verdicts by judge; response is None where outputs are left out."""

    verdicts: dict[str, str]
    response: str | None


class Question(TypedDict):
    """A question as the models got it, under one attack and shot, with the answers in the order of the models.

    original: its wording in the data. expected: the data's answer, of embedded worlds only. picture: index into
    `Examples.pictures`, of the one before an attack on its pixels, which is the same for all models. pixels: whether
    there was such an attack. An answer is None when the model did not get the question.
    """

    set: str
    id: str
    attack: str
    shot: int
    category: str
    question: str
    original: str
    expected: str | None
    picture: int | None
    pixels: bool
    answers: list[Answer | None]


class Model(TypedDict):
    """slot: number of the model's colour (see `figures.style`)."""

    name: str
    slot: int


class ExampleSet(TypedDict):
    """shown: number of the set's questions in the page. questions: number of all."""

    kind: str
    shown: int
    questions: int


class Examples(TypedDict):
    """What browser.js shows. outputs: whether answers are included. pictures: data URIs."""

    models: list[Model]
    judges: list[str]
    outputs: bool
    sets: dict[str, ExampleSet]
    pictures: list[str]
    questions: list[Question]


class _Pictures:
    """The pictures of a page, each once: decoded and encoded anew, so that nothing but a picture gets into it."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self.left_out: list[PictureError] = []
        self._index: dict[str, int | None] = {}

    def index(self, path: str | None, world: Path | None) -> int | None:
        """The picture's index in `uris`; None without a path or a world, and for a file that lies outside the world's
        folder or cannot be read as a picture, which is noted in `left_out`.
        """
        if path is None or world is None:
            return None
        if path not in self._index:
            self._index[path] = None
            try:
                if not Path(os.path.realpath(path)).is_relative_to(world):
                    raise PictureError(path, f"lies outside the world's folder {world}")
                content = as_png(open_picture(path))
            except PictureError as error:
                self.left_out.append(error)
            else:
                self._index[path] = len(self.uris)
                self.uris.append(f"data:image/png;base64,{base64.b64encode(content).decode()}")
        return self._index[path]

    def warn(self) -> None:
        """One warning about all that were left out: an attack may have drawn a picture for every question."""
        if self.left_out:
            count, first = len(self.left_out), self.left_out[0]
            log.warning(f"examples: {count} {'pictures' if count > 1 else 'picture'} left out of the page; {first}")


def gather(runs: Sequence[Run], count: int, outputs: bool) -> Examples:
    """Up to `count` questions of each set with all of their rewrites.

    Pictures and the data's answers are included of embedded worlds only, where they cannot do harm.
    """
    chosen = {own: _chosen(runs, own, count) for own in dict.fromkeys(s for run in runs for s in run.metrics["sets"])}
    questions = {(own, identity) for own, ids in chosen.items() for identity in ids}
    by_place: dict[Place, Question] = {}
    pictures = _Pictures()
    for number, run in enumerate(runs):
        for row in run.rows_of(questions):
            place = (row["set"], row["id"], row["attack"], row["shot"])
            if place not in by_place:
                by_place[place] = _question(run, row, pictures, len(runs))
            verdicts: dict[str, str] = {
                judge: own[row["key"]] for judge, own in run.verdicts.items() if row["key"] in own
            }
            response = row["response"] if outputs else None
            by_place[place]["answers"][number] = {"verdicts": verdicts, "response": response}
    pictures.warn()
    order = {place: number for number, place in enumerate((own, i) for own, ids in chosen.items() for i in ids)}
    slot = slots([run.name for run in runs])
    return {
        "models": [{"name": run.name, "slot": slot[run.name]} for run in runs],
        "judges": list(dict.fromkeys(judge for run in runs for judge in run.verdicts)),
        "outputs": outputs,
        "sets": {name: _set(runs, name, len(ids)) for name, ids in chosen.items() if ids},
        "pictures": pictures.uris,
        "questions": sorted(by_place.values(), key=lambda question: order[question["set"], question["id"]]),
    }


def _chosen(runs: Sequence[Run], own: str, count: int) -> list[str]:
    """The first ids of a set in the order of their hashes: an arbitrary choice that nobody made."""
    return by_hash({judged.id for run in runs for judged in run.judged if judged.set == own})[:count]


def _set(runs: Sequence[Run], own: str, shown: int) -> ExampleSet:
    info = next(run.metrics["sets"][own] for run in runs if own in run.metrics["sets"])
    return {"kind": info["kind"], "shown": shown, "questions": info["samples"]}


def _question(run: Run, row: Mapping[str, Any], pictures: _Pictures, models: int) -> Question:
    return {
        "set": row["set"],
        "id": row["id"],
        "attack": row["attack"],
        "shot": row["shot"],
        "category": row["category"],
        "question": row["question"],
        "original": row["original_question"],
        "expected": row["expected"] if run.metrics["world"] else None,
        "picture": pictures.index(judged_picture(row), run.world) if run.metrics["world"] else None,
        "pixels": "original_image" in row,
        "answers": [None] * models,
    }


def as_script(data: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element: nothing in it can end the element or begin a tag."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
