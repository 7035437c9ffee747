"""Putting questions to the model that judges: what is asked, who answers, and what cannot be answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mirage_dist.evals.judges.endpoint import Endpoint
from mirage_dist.schema import ConfigError, EvalModelConfig, GenerationConfig, JudgeConfig, TemplateConfig


@dataclass(frozen=True)
class Prompt:
    """One question for the judge, with the path of a picture or None."""

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

    def __init__(self, config: JudgeConfig, max_new_tokens: int) -> None:
        self.model = EvalModelConfig(path=str(config.path), dtype=config.dtype)
        self.generation = GenerationConfig(max_new_tokens=max_new_tokens, batch_size=config.batch_size)
        if not Path(str(self.model.path)).is_dir():
            raise ConfigError(f"judges: path={self.model.path}: no such directory; a judge is a local model directory")

    @property
    def identity(self) -> dict[str, Any]:
        from mirage_dist.evals import subject  # brings torch

        folder = Path(str(self.model.path))
        return {"model": subject.find(self.model, folder).model_hash, "dtype": self.model.dtype}

    def __call__(self, prompts: Sequence[Prompt], system: str) -> Iterator[tuple[int, str | Failed]]:
        from mirage_dist.data.sources import Sample
        from mirage_dist.evals.generate import Generator

        if not prompts:
            return
        # As the judge's own processor wants pictures, and room for a long answer.
        template = TemplateConfig(system_prompt=system, image_aspect="processor", max_length=32_768)
        generator = Generator(self.model, template, self.generation)
        # The longest first: rows of like length waste little padding, and what does not fit fails at the start.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].text))
        samples = [Sample(str(i), prompts[i].image, prompts[i].text, "", True, "", "judge") for i in order]
        for batch in generator(samples):
            yield from ((order[place], said) for place, said in batch)


class Remote:
    """An OpenAI-compatible endpoint, several requests at a time."""

    def __init__(self, config: JudgeConfig, max_new_tokens: int, json_mode: bool) -> None:
        self.endpoint = Endpoint(config, max_new_tokens, json_mode)

    @property
    def identity(self) -> dict[str, Any]:
        return self.endpoint.identity

    def __call__(self, prompts: Sequence[Prompt], system: str) -> Iterator[tuple[int, str | Failed]]:
        requests = [(system, prompt.text, prompt.image) for prompt in prompts]
        for i, text, reason in self.endpoint.ask_all(requests):
            yield i, Failed(reason) if text is None else text


def backend(config: JudgeConfig, max_new_tokens: int, json_mode: bool) -> Backend:
    """Raises ConfigError when the directory, or the key's variable, is not there."""
    if config.path is not None:
        return Local(config, max_new_tokens)
    return Remote(config, max_new_tokens, json_mode)
