"""What a preset is: the content of its data file, checked."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from mirage_dist.config import build, nearest
from mirage_dist.schema import ConfigError, documents
from mirage_dist.schema.limits import RECIPE_FILE
from mirage_dist.schema.numbers import Share, Tokens
from mirage_dist.schema.texts import check_template

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))
FILES = (".yaml", ".yml", ".json")  # how a preset of the user's own ends
DECISIONS = ("refused", "harmful", "relevant")
PLACEHOLDERS = ("question", "answer")
ALIKE = {"<": "‹", "[": "［", "{": "｛", "#": "＃"}  # first signs of marks, and what stands for them in the data


@dataclass(frozen=True)
class Reply:
    """How a reply is read, and what its labels decide: `refused`, `harmful`, `relevant`, each true or false.

    object: one JSON object of the three decisions. word: the whole reply is one of the `labels`. first_line: the first
    line is one of them, and after the label `rest_of` a line that the regular expression `rest` matches may follow.
    lines: a line NAME: yes or NAME: no for each name in `lines`, whose value is the decision, or null where it is not
    used. rubric: StrongREJECT's lines 1.b, 2.b and 3.b; harmful from a score of `threshold`.
    """

    kind: Literal["object", "word", "first_line", "lines", "rubric"]
    labels: dict[str, dict[str, bool]] = field(default_factory=dict)
    rest: str | None = None
    rest_of: str | None = None
    lines: dict[str, str | None] = field(default_factory=dict)
    threshold: Share | None = None

    def __post_init__(self) -> None:
        used = {"object": (), "word": ("labels",), "first_line": ("labels", "rest", "rest_of"), "lines": ("lines",),
                "rubric": ("threshold",)}[self.kind]  # fmt: skip
        for name in ("labels", "rest", "rest_of", "lines", "threshold"):
            given = getattr(self, name) not in (None, {})
            if given and name not in used:
                raise ConfigError(f"{name}: belongs to another kind of reply than {self.kind}; leave it out")
            if not given and name in used and name not in ("rest", "rest_of"):
                raise ConfigError(f"{name}: is missing; a reply of kind {self.kind} needs it")
        if strange := next((name for name in self._named if name not in DECISIONS), None):
            place = "lines" if self.lines else "labels"
            raise ConfigError(f"{place}: decides {strange!r}; {nearest(strange, DECISIONS)}")
        if (self.rest is None) != (self.rest_of is None) or self.rest_of not in (None, *self.labels):
            raise ConfigError(f"rest_of={self.rest_of!r}: expected one of the labels, together with `rest`")
        try:
            re.compile(self.rest or "")
        except re.error as error:
            raise ConfigError(f"rest={self.rest!r}: not a regular expression: {error}") from error

    @property
    def _named(self) -> list[str]:
        of_labels = [name for decided in self.labels.values() for name in decided]
        return [*of_labels, *(name for name in self.lines.values() if name is not None)]

    @property
    def decisions(self) -> set[str]:
        """What a reply decides."""
        return {"object": set(DECISIONS), "rubric": {"refused", "harmful"}}.get(self.kind) or set(self._named)


@dataclass(frozen=True)
class Definition:
    """A published judge.

    title: for reports. model: its name on the hub, None for any chat model. model_types: `model_type` in its
    config.json, None for any. sources: where prompt and labels are published, and the licence of the prompt.
    form: chat sends `system` and `prompt` as messages of a chat; text sends `prompt` as it is, without a chat template;
    conversation sends question and answer as a conversation, whose template has the instructions. pictures: whether the
    question's picture is sent. question: as the model under test received it, or as the data have it.
    marks: texts that structure the prompt; where a question or an answer has them, their first sign is replaced by one
    that looks alike. quoted: question and answer are JSON strings in which no sign is a `<`. max_tokens: of a
    reply.
    not_null: dotted keys that a local model's config.json must not set to null, each with what to do about it.
    known_errors: in sentences, for the docs.
    """

    title: str
    model: str | None
    model_types: list[str] | None
    sources: dict[str, str]
    form: Literal["chat", "text", "conversation"]
    pictures: bool
    question: Literal["attacked", "original"]
    reply: Reply
    max_tokens: Tokens
    known_errors: list[str]
    system: str | None = None
    prompt: str | None = None
    marks: list[str] = field(default_factory=list)
    quoted: bool = False
    json_mode: bool = False
    not_null: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.form == "conversation"):
            raise ConfigError(f"prompt: a preset of form {self.form} {'has none' if self.prompt else 'needs it'}")
        if (self.system is None) == (self.form == "chat"):
            raise ConfigError(f"system: a preset of form {self.form} {'has none' if self.system else 'needs it'}")
        if self.prompt is not None and check_template(self.prompt, PLACEHOLDERS, "prompt") != set(PLACEHOLDERS):
            raise ConfigError("prompt: must hold {question} and {answer}")
        if self.form == "text" and self.pictures:
            raise ConfigError("pictures: a preset of form text sends none; set it to false")
        if wrong := next((mark for mark in self.marks if mark[:1] not in ALIKE), None):
            raise ConfigError(f"marks: {wrong!r} begins with none of {' '.join(ALIKE)}")
        if self.form != "chat" and self.json_mode:
            raise ConfigError("json_mode: belongs to form chat; leave it out")

    def filled(self, question: str, answer: str) -> tuple[str, str]:
        """Question and answer as they stand in the prompt, of which neither can end its part."""
        if self.quoted:
            # Nothing inside a JSON string can end the quotation, and without "<" nothing in it is a special token.
            quoted = (json.dumps(part, ensure_ascii=False).replace("<", "\\u003c") for part in (question, answer))
            return next(quoted), next(quoted)
        if not self.marks:
            return question, answer
        pattern = re.compile("|".join(map(re.escape, sorted(self.marks, key=len, reverse=True))))
        safe = (pattern.sub(lambda mark: ALIKE[mark[0][0]] + mark[0][1:], part) for part in (question, answer))
        return next(safe), next(safe)

    @property
    def decided_by(self) -> dict[str, Any]:
        """What decides a verdict, for the keys of verdicts."""
        aside = ("title", "model", "model_types", "sources", "not_null", "known_errors")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in aside}


@cache
def named(name: str) -> Definition:
    """A preset of this package by its name, or the one in a file of the user's.

    Raises ConfigError for an unknown name, and for a file that is no preset.
    """
    if name in NAMES:
        return _read(FOLDER / f"{name}.yaml")
    if name.endswith(FILES):
        return _read(Path(name))
    raise ConfigError(
        f"preset={name!r}: unknown preset; expected one of {', '.join(NAMES)}, or the path of a YAML file"
    )


def _read(file: Path) -> Definition:
    text = documents.decoded(documents.read_bytes(file, RECIPE_FILE), file)
    try:
        documents.check_yaml(text)
        tree: Any = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=False)  # refuses a key given twice
    except Exception as error:  # of yaml and of OmegaConf, as for recipes
        raise ConfigError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from error
    if (why := documents.value_fault(tree)) is not None:
        raise ConfigError(f"{file}: {why}")
    return build(Definition, tree, str(file), "")
