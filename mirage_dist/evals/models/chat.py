"""Putting questions to a model that judges or rewrites: what is asked, who answers, what cannot be answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mirage_dist.evals.models.endpoint import Endpoint
from mirage_dist.schema import ChatConfig, ConfigError, EvalModelConfig, GenerationConfig, TemplateConfig


@dataclass(frozen=True)
class Prompt:
    """One question, with the path of a picture or None."""

    text: str
    image: str | None


@dataclass(frozen=True)
class Failed:
    """No answer came; the reason in a few words of ours."""

    reason: str


class Backend(Protocol):
    """Answers prompts under one system prompt; identity: of the model, as far as it can be known, for caches."""

    @property
    def identity(self) -> dict[str, Any]: ...

    def __call__(self, prompts: Sequence[Prompt], system: str) -> Iterator[tuple[int, str | Failed]]:
        """(index into `prompts`, answer), in the order in which they come."""
        ...


class Local:
    """A Hugging Face model directory on this machine, loaded when first asked."""

    def __init__(self, config: ChatConfig, max_new_tokens: int) -> None:
        self.model = EvalModelConfig(path=str(config.path), dtype=config.dtype)
        self.generation = GenerationConfig(max_new_tokens=max_new_tokens, batch_size=config.batch_size)
        if not Path(str(self.model.path)).is_dir():
            raise ConfigError(f"path={self.model.path}: no such directory; expected that of a local chat model")

    @property
    def identity(self) -> dict[str, Any]:
        from mirage_dist.evals.models import subject  # brings torch

        folder = Path(str(self.model.path))
        return {"model": subject.find(self.model, folder).model_hash, "dtype": self.model.dtype}

    def __call__(self, prompts: Sequence[Prompt], system: str) -> Iterator[tuple[int, str | Failed]]:
        if not prompts:
            return
        answer = self._load(system)
        # The longest first: rows of like length waste little padding, and what does not fit fails at the start.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].text))
        for batch in answer([prompts[i] for i in order]):
            yield from ((order[place], said) for place, said in batch)

    def _load(self, system: str) -> Callable[[Sequence[Prompt]], Iterator[list[tuple[int, str]]]]:
        from mirage_dist.data.sample import Sample
        from mirage_dist.evals.models.generate import Generator

        # As the model's own processor wants pictures, and room for a long answer.
        template = TemplateConfig(system_prompt=system, image_aspect="processor", max_length=32_768)
        generator = Generator(self.model, template, self.generation)

        def answer(asked: Sequence[Prompt]) -> Iterator[list[tuple[int, str]]]:
            if generator.encoder.text_only and any(prompt.image is not None for prompt in asked):
                raise ConfigError("the chat model takes no pictures; choose a vision-language model")
            return generator([Sample(str(i), p.image, p.text, "", True, "", "chat") for i, p in enumerate(asked)])

        return answer


class Remote:
    """An OpenAI-compatible endpoint, several requests at a time."""

    def __init__(self, config: ChatConfig, max_new_tokens: int, json_mode: bool) -> None:
        self.endpoint = Endpoint(config, max_new_tokens, json_mode)

    @property
    def identity(self) -> dict[str, Any]:
        return self.endpoint.identity

    def __call__(self, prompts: Sequence[Prompt], system: str) -> Iterator[tuple[int, str | Failed]]:
        requests = [(system, prompt.text, prompt.image) for prompt in prompts]
        for i, text, reason in self.endpoint.ask_all(requests):
            yield i, Failed(reason) if text is None else text


def backend(config: ChatConfig, max_new_tokens: int, json_mode: bool) -> Backend:
    """Raises ConfigError when the directory, or the key's variable, is not there."""
    if config.path is not None:
        return Local(config, max_new_tokens)
    return Remote(config, max_new_tokens, json_mode)
