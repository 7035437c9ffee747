"""Rows, their keys, and the chunks of keys that workers claim.

A row is one answer under its key, the SHA-256 of everything that decides the answer (see `evals.sharing.files` for
where rows are stored).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NotRequired, TypedDict, cast

from mirage_dist import disk
from mirage_dist.data import pictures
from mirage_dist.data.sample import Sample
from mirage_dist.disk import hashes
from mirage_dist.evals.models.base import Answer
from mirage_dist.evals.sharing.files import Row
from mirage_dist.evals.worklist import Question
from mirage_dist.model.environment import Environment
from mirage_dist.schema import EvalRecipe, TemplateConfig


class Settings(TypedDict):
    """Everything besides its question, and how it is drawn, that an answer depends on. All of it is part of each key.

    Of a model behind an endpoint only `endpoint`, the address and fixed fields of each request, stands for the model,
    its engine and its decoding.
    template: as a defence leaves it, where there is one. defence: its name and options; present with one.
    image_processor: the class that turns pictures into tensors, None for a text-only model. It depends on the machine:
    transformers takes its torchvision classes where torchvision is installed, and PIL otherwise.
    libraries: versions of the libraries that compute the answers.
    """

    model_hash: NotRequired[str]
    chat_template_hash: NotRequired[str]
    image_processor: NotRequired[str | None]
    libraries: NotRequired[dict[str, str]]
    dtype: NotRequired[str]
    generation: NotRequired[dict[str, Any]]
    endpoint: NotRequired[dict[str, Any]]
    template: dict[str, Any]
    defence: NotRequired[dict[str, Any]]


def settings(
    recipe: EvalRecipe,
    model_hash: str,
    chat_template_hash: str,
    environment: Environment,
    engine: Mapping[str, str],
) -> Settings:
    """recipe: with what `template.image_aspect: auto` comes to. engine: versions of the generation backend's own
    libraries.
    """
    return {
        "model_hash": model_hash,
        "chat_template_hash": chat_template_hash,
        "image_processor": environment.image_processor,
        "libraries": {**environment.libraries, **engine},
        "dtype": recipe.model.dtype,
        "template": _written(recipe.template),
        "generation": {
            "decoding": "greedy",
            "max_new_tokens": recipe.generation.max_new_tokens,
            "backend": recipe.generation.backend,
        },
    }


def settings_of_endpoint(recipe: EvalRecipe, identity: Mapping[str, Any]) -> Settings:
    """identity: see `models.endpoint.Endpoint`."""
    return {"endpoint": dict(identity), "template": _written(recipe.template, endpoint=True)}


def defended(own: Settings, template: TemplateConfig, defence: Mapping[str, Any]) -> Settings:
    """The settings under a defence. template: as it leaves it. defence: see `defences.info`."""
    return {**own, "template": _written(template, "endpoint" in own), "defence": dict(defence)}


def _written(template: TemplateConfig, endpoint: bool = False) -> dict[str, Any]:
    """A template as keys have it: without what earlier versions did not have, where it is not used.

    endpoint: whether an endpoint answers, to which nothing of it goes but the system prompt.
    """
    written = asdict(template)
    if endpoint:
        others = ("image_aspect", "max_length")
        written = {name: own for name, own in written.items() if name not in others}
    if not written["template_options"]:
        del written["template_options"]
    if written["defence"] is None:
        del written["defence"]
    return written


def keyed(questions: Iterable[Question], decided_by: Mapping[str, Any]) -> dict[str, Question]:
    """Questions by their keys: the SHA-256 of settings, question as asked, picture's bytes, set, attack and shot."""
    questions = list(questions)
    shown = (question.sample.image for question in questions if question.sample.image)
    image_hash = hashes.sha256s(shown, pictures.sha256)  # for this call only: a picture may change before the next one
    return {_key(question, decided_by, image_hash): question for question in questions}


def _key(question: Question, decided_by: Mapping[str, Any], image_hash: Mapping[str, str]) -> str:
    sample = question.sample
    content = {
        "settings": decided_by,
        "set": [question.set, question.kind],
        "attack": [question.attack, question.shot],
        "sample": [sample.id, sample.question, sample.history, question.original],
        "image": image_hash[sample.image] if sample.image else None,
    }
    if question.optimised:
        content["optimised"] = question.optimised
    if sample.begun:
        content["begun"] = sample.begun
    if sample.shown:
        content["shown"] = sample.shown
    if sample.draw:
        content["draw"] = asdict(sample.draw)
    if sample.turn:
        content["turn"] = [sample.turn.number, sample.turn.turns]
    if question.sent:
        content["sent"] = [question.sent.question, question.sent.history]
    return disk.digest(content)


def row(key: str, question: Question, answer: str | Answer) -> Row:
    """The row of one answer. Where the answer was begun by an attack, `response` is the model's continuation."""
    sample = question.sample
    fields = {
        "key": key,
        "set": question.set,
        "kind": question.kind,
        "id": sample.id,
        "category": sample.category,
        "image": sample.image,
        "attack": question.attack,
        "shot": question.shot,
        "question": sample.question,
        "original_question": question.original,
        "expected": sample.answer,
        **({"references": list(sample.references)} if sample.references else {}),
        **({"begun": sample.begun} if sample.begun else {}),
        **({"draw": asdict(sample.draw)} if sample.draw else {}),
        **({"original_image": sample.original_image} if sample.original_image else {}),
        **({"turns": sample.turn.turns, "history": [list(turn) for turn in sample.history]} if sample.turn else {}),
        **({"sent": question.sent.question} if question.sent else {}),
        **({"served": answer.served} if isinstance(answer, Answer) else {}),
        "response": answer.text if isinstance(answer, Answer) else answer,
    }
    return cast(Row, fields)


Place = tuple[str, str, str, int]  # set, id, attack, shot


def place(question: Question) -> Place:
    """Where a question stands in its work list."""
    return question.set, question.sample.id, question.attack, question.shot


def rounds(questions: Iterable[Question]) -> list[list[Question]]:
    """The questions by the number of own answers that they wait for: those of a round need those of earlier rounds."""
    parts: dict[int, list[Question]] = {0: []}
    for question in questions:
        parts.setdefault(len(question.sample.turn.own) if question.sample.turn else 0, []).append(question)
    return [parts[depth] for depth in sorted(parts)]


def resumed(question: Question, responses: Mapping[Place, str]) -> Question:
    """A turn with the model's own answers to the turns before it. responses: to all of them, by place."""
    sample = question.sample
    if sample.turn is None:
        return question
    history = list(sample.history)
    for shot, turn in enumerate(sample.turn.own, start=1):
        history[turn] = history[turn][0], responses[question.set, sample.id, question.attack, shot]
    return replace(question, sample=replace(sample, history=tuple(history)))


def ordered(keyed: Mapping[str, Question], work: Sequence[Question]) -> dict[str, Question]:
    """The same in the order of the work list."""
    keys = {place(question): key for key, question in keyed.items()}
    return {keys[place(question)]: keyed[keys[place(question)]] for question in work}


@dataclass(frozen=True)
class Chunk:
    """Keys of questions of similar length, which a worker claims together. The name is a hash of the keys."""

    name: str
    keys: list[str]


def chunks(questions: Mapping[str, Question], size: int, mixed: bool = False) -> list[Chunk]:
    """The work list in chunks of `size`, the longest questions first.

    Rows of similar length need little padding, and a batch that does not fit into memory fails at the start. mixed: in
    the order of their keys instead, so that each chunk has questions of all kinds: what all requests of the first
    chunk have in common, such as a rejection, is then what the suite has in common.
    """
    order = sorted(questions) if mixed else sorted(questions, key=lambda key: -_length(questions[key].sample))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [Chunk(disk.sha256_text("".join(part))[:16], part) for part in parts]


def _length(sample: Sample) -> int:
    """Characters of the prompt. Pictures are left out: each takes about as many tokens as any other."""
    return len(sample.question) + sum(len(text) for turn in sample.history for text in turn)
