"""Models that judge answers or reword questions: a local model directory, or an endpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mirage_dist.data.sample import Sample
from mirage_dist.evals.models import reasoning
from mirage_dist.evals.models.endpoint import Endpoint, Request
from mirage_dist.evals.models.replies import Failed
from mirage_dist.schema import ChatConfig, ConfigError, EvalModelConfig, GenerationConfig, TemplateConfig

if TYPE_CHECKING:
    from mirage_dist.model.directory import Hashed

CHANGED = "what this chat model wrote is kept under the former files' hash; put these back, and start again"


@dataclass(frozen=True)
class Prompt:
    """One question. image: the path of its picture. reply: the answer to it, where a conversation is classified."""

    text: str
    image: str | None
    reply: str | None = None


# How prompts become the model's input: as a chat under a system prompt, as they are, without a chat template, or as a
# conversation that ends with the assistant's reply, around which the template writes the model's instructions.
Form = Literal["chat", "text", "conversation"]


class Backend(ABC):
    """Answers prompts under one system prompt. Answers are without the model's reasoning, and empty if it wrote no more
    than reasoning.
    """

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Identifies the model, as far as it can be known, in the keys of caches."""

    @abstractmethod
    def __call__(self, prompts: Sequence[Prompt], system: str | None) -> Iterator[tuple[int, str | Failed]]:
        """(index into `prompts`, answer), in the order in which the answers arrive. system: of chats only."""


class Local(Backend):
    """A Hugging Face model directory on this machine, loaded for the first prompt.

    Raises ConfigError when the directory does not exist, and RunError when its files change after they were hashed.
    """

    def __init__(self, config: ChatConfig, max_new_tokens: int, form: Form = "chat") -> None:
        self.form: Form = form
        self.model = EvalModelConfig(path=str(config.path), dtype=config.dtype)
        self.max_tokens = config.max_tokens
        self.generation = GenerationConfig(
            max_new_tokens=config.max_tokens or max_new_tokens, batch_size=config.batch_size
        )
        if not Path(str(self.model.path)).is_dir():
            raise ConfigError(f"path={self.model.path}: no such directory; expected that of a local chat model")

    @cached_property
    def hashed(self) -> Hashed:
        """The model's files as they were hashed."""
        from mirage_dist.evals.models import subject  # imports torch

        if self.form == "text":
            return subject.untemplated(Path(str(self.model.path)))
        return subject.find(self.model, Path(str(self.model.path))).hashed

    @property
    def identity(self) -> dict[str, Any]:
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return {"model": self.hashed.digest, "dtype": self.model.dtype, **limit}

    def __call__(self, prompts: Sequence[Prompt], system: str | None) -> Iterator[tuple[int, str | Failed]]:
        if not prompts:
            return
        from mirage_dist.evals.models import hf

        # Room for a long answer.
        template = TemplateConfig(system_prompt=system, max_length=32_768)
        hashed = self.hashed
        if self.form == "text":
            generator = hf.Completion(self.model, template, self.generation)
        elif self.form == "conversation":
            generator = hf.Assessment(self.model, template, self.generation)
        else:
            generator = hf.HuggingFace(self.model, template, self.generation)
        hashed.check_unchanged(CHANGED)
        if generator.encoder.text_only and any(prompt.image is not None for prompt in prompts):
            raise ConfigError("the chat model takes no pictures; choose a vision-language model")
        # The longest first: rows of similar length need little padding, and what does not fit fails at the start.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].text) - len(prompts[i].reply or ""))
        for batch in generator([_sample(i, prompts[i]) for i in order]):
            yield from ((order[place], reasoning.answer(text)) for place, text in batch)
        hashed.check_unchanged(CHANGED)


def _sample(number: int, prompt: Prompt) -> Sample:
    return Sample(str(number), prompt.image, prompt.text, prompt.reply or "", True, "", "chat")


class Remote(Backend):
    """An OpenAI-compatible endpoint, several requests at a time."""

    def __init__(self, config: ChatConfig, max_new_tokens: int, json_mode: bool, form: Form = "chat") -> None:
        self.endpoint = Endpoint(config, max_new_tokens, json_mode, chat=form != "text")

    @property
    def identity(self) -> dict[str, Any]:
        return self.endpoint.identity

    def __call__(self, prompts: Sequence[Prompt], system: str | None) -> Iterator[tuple[int, str | Failed]]:
        yield from self.endpoint.ask_all([Request(system, p.text, p.image, p.reply) for p in prompts])


def backend(config: ChatConfig, max_new_tokens: int, json_mode: bool, form: Form = "chat") -> Backend:
    """max_new_tokens: of a reply, unless the configuration sets a limit of its own.

    Raises ConfigError when the model's directory, or the environment variable of the key, does not exist.
    """
    if config.path is not None:
        return Local(config, max_new_tokens, form)
    return Remote(config, max_new_tokens, json_mode, form)
