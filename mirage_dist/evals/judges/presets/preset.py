"""`kind: preset`: a published classifier or rubric as judge, by the name of its data file."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mirage_dist.data.encoding.conversation import template_of, tokenizer_of
from mirage_dist.evals.judges.base import Judge, Opinion, Row, fingerprint, judged_picture
from mirage_dist.evals.judges.chat import ChatJudge, failed
from mirage_dist.evals.judges.presets import replies
from mirage_dist.evals.judges.presets.definition import NAMES, Definition, named
from mirage_dist.evals.judges.vlm import shape, verdict
from mirage_dist.evals.models.chat import Backend, Failed, Prompt, backend
from mirage_dist.evals.results import Verdict
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.schema import ConfigError, EvalRecipe
from mirage_dist.schema.numbers import Share
from mirage_dist.schema.texts import fill


@dataclass(frozen=True, kw_only=True)
class Preset(ChatJudge):
    """A published judge: `preset` names its data file, the options of a chat model say where its model is.

    preset: one of this package, or a YAML file of the same form (see `definition.Definition`).
    question: in place of the preset's own. threshold: of a rubric, the score from which an answer is harmful.
    json_mode: false for servers that do not know response_format, where the preset asks for a JSON object.
    """

    kind = "preset"

    preset: str
    question: Literal["attacked", "original"] | None = None
    threshold: Share | None = None
    json_mode: bool | None = None

    def __post_init__(self) -> None:
        own = self.definition
        if self.path is None and self.url is None:
            model = f"its model ({own.model})" if own.model else "a chat model"
            raise ConfigError(
                f"path: preset {self.preset} needs {model}: give `path`, its directory, or `url` and `model`, an "
                "OpenAI-compatible endpoint"
            )
        super().__post_init__()
        if self.threshold is not None and own.reply.kind != "rubric":
            raise ConfigError(f"threshold: belongs to presets with a score; {self.preset} has none, leave it out")
        if self.json_mode is not None and not own.json_mode:
            raise ConfigError(f"json_mode: preset {self.preset} asks for no JSON object; leave it out")
        if self.max_completion_tokens is not None and own.form == "text":
            raise ConfigError(f"max_completion_tokens: preset {self.preset} sends a text, no chat; set max_tokens")

    @cached_property
    def definition(self) -> Definition:
        """Raises ConfigError for an unknown preset, and for a file that is none."""
        return named(self.preset)

    @property
    def default_name(self) -> str:
        return self.preset if self.preset in NAMES else Path(self.preset).stem

    @property
    def verdicts(self) -> frozenset[Verdict]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those that its decisions can come to."""
        decided = self.definition.reply.decisions
        given: dict[str, Verdict] = {"refused": "refused", "harmful": "harmful", "relevant": "irrelevant"}
        rest: Verdict = "answered" if "refused" in decided else "harmless"
        return frozenset({rest, *(given[name] for name in decided)})

    @property
    def guards(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A rubric presupposes that the question asks for harm."""
        own = self.definition.reply
        return "harmful" in own.decisions and own.kind != "rubric"

    @property
    def about(self) -> str:
        own, place = self.definition, self.model or self.path
        left_out = "" if own.pictures else "; it sees question and answer, the picture is left out"
        silent = [name for name in ("refused", "harmful", "relevant") if name not in own.reply.decisions]
        missing = f"; it does not decide whether an answer is {' or '.join(silent)}" if silent else ""
        return f"{own.title} ({place}){left_out}{missing}"

    @cached_property
    def backend(self) -> Backend:
        own = self.definition
        json_mode = own.json_mode if self.json_mode is None else self.json_mode
        return backend(self, own.max_tokens, json_mode, own.form)

    def of(self, recipe: EvalRecipe) -> Judge:
        """Raises ConfigError when the model's directory does not exist or holds a model of another type than the
        preset's, and as `ChatJudge.of` does.
        """
        if self.path is not None:
            _check(self.preset, self.definition, Path(self.path))
        return super().of(recipe)

    @property
    def fingerprint(self) -> str:
        own = {**self.definition.decided_by, "question": self._question, "rules": 1}
        if self.threshold is not None:
            own["threshold"] = self.threshold
        return fingerprint({**own, **self.backend.identity})

    @property
    def _question(self) -> str:
        return self.question or self.definition.question

    def opinions(self, rows: Sequence[Row], suite: Sequence[Row]) -> Generator[tuple[int, Opinion], None, None]:
        """Logs how many answers are judged without their pictures."""
        prompts, kinds, unseen = [], [], 0
        for row in rows:
            prompts.append(self._prompt(row))
            kinds.append(row["kind"])
            unseen += row["image"] is not None and not self.definition.pictures
        if unseen:
            log.info(
                f"judge {self.name}: sees question and answer only; {unseen} of {len(rows)} questions are about a "
                "picture, which is left out",
                extra=EVERY_RANK,
            )
        for i, reply in self.backend(prompts, self.definition.system):
            yield i, self._opinion(kinds[i], reply)

    def _prompt(self, row: Row) -> Prompt:
        own = self.definition
        question = row["original_question"] if self._question == "original" else row["question"]
        question, answer = own.filled(question, row["response"])
        image = judged_picture(row) if own.pictures else None
        if own.prompt is None:
            return Prompt(question, image, answer)
        return Prompt(fill(own.prompt, question=question, answer=answer), image)

    def _opinion(self, kind: str, reply: str | Failed) -> Opinion:
        if isinstance(reply, Failed):
            return failed(reply)
        reading = replies.read(self.definition.reply, reply, self.threshold)
        if reading is None:
            return Opinion("unparsed", {"shape": shape(reply)})
        decisions = dict(reading.decisions)
        if self.definition.reply.kind == "rubric" and kind != "unsafe":
            decisions["harmful"] = False  # the rubric presupposes that the question asks for harm
        return Opinion(verdict(kind, decisions), {**decisions, **reading.detail})


def _check(preset: str, own: Definition, folder: Path) -> None:
    """Raise ConfigError unless a directory holds the preset's model, as far as can be seen without loading weights."""
    place, model = f"judges: preset {preset}: path={folder}", own.model or "a chat model"
    if not folder.is_dir():
        download = f"hf download {own.model} --local-dir {folder}" if own.model else "hf download MODEL --local-dir DIR"
        raise ConfigError(
            f"{place}: no such directory; expected {model}, downloaded there ({download}), or url and model of an "
            "endpoint"
        )
    from mirage_dist.evals.models import subject  # imports torch
    from mirage_dist.model.families import configs

    try:
        if (folder / "config.json").is_file():  # before the weights: another model has other ones
            _check_config(place, own, model, configs.read(folder / "config.json"))
        processor = subject.check(folder)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(place) else f"{place}: {error}") from error
    if own.form != "text" and template_of(processor) is None:
        raise ConfigError(f"{place}: has no chat template; expected {model}, with its tokenizer's files")
    if own.pictures and tokenizer_of(processor) is processor:
        raise ConfigError(f"{place}: takes no pictures, which this preset shows; expected {model}")


def _check_config(place: str, own: Definition, model: str, config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if own.model_types is not None and kind not in own.model_types:
        raise ConfigError(
            f"{place}: holds a model of type {kind!r}; expected {model}, of type {' or '.join(own.model_types)}, "
            "whose prompt this is"
        )
    for dotted, remedy in own.not_null.items():
        value: Any = config
        for part in dotted.split("."):
            value = value.get(part, remedy) if isinstance(value, Mapping) else remedy
        if value is None:
            raise ConfigError(f"{place}: config.json sets {dotted} to null; {remedy}")
