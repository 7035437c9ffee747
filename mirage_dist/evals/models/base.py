"""The base class of everything that answers the questions of a suite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from mirage_dist.data.sample import Sample
from mirage_dist.evals.models.replies import Failed
from mirage_dist.evals.sharing.files import Served
from mirage_dist.schema import EvalModelConfig, GenerationConfig, TemplateConfig


@dataclass(frozen=True)
class Answer:
    """An endpoint's answer. text: of the model, or what stands for it. served: how it came (see `Served`)."""

    text: str
    served: Served


# An answer: of an engine on this machine as text; of an endpoint with how it came, or why there is none.
Outcome = str | Answer | Failed


class Respondent(ABC):
    """Answers samples: each with the likeliest tokens, or as its `draw` says. Leaving it as a context releases what it
    holds, such as the device's memory.

    seeded: whether it follows a sample's `draw`, so that its seed gives the same answer in any batch. Attacks that draw
    answers are refused where it is False. ends_on_signal: whether it looks for a stop itself, and then yields what is
    on its way and no more; others are stopped after a batch.
    """

    seeded: ClassVar[bool] = False
    ends_on_signal: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Iterator[Sequence[tuple[int, Outcome]]]:
        """Answer every sample; yields (index into `samples`, outcome) pairs as they come."""

    def close(self) -> None:
        """Release what is held. The base class leaves that to the garbage collector."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Generator(Respondent):
    """Answers samples in batches with one model on this machine.

    A subclass loads the model in its constructor, which takes `model` (a directory as `path`), `template` and
    `generation`, and raises ConfigError when the model cannot be loaded. It implements `answer`, and says by `seeded`
    whether that follows a sample's `draw`.
    """

    def __init__(self, model: EvalModelConfig, template: TemplateConfig, generation: GenerationConfig) -> None:
        self.path, self.batch_size = str(model.path), generation.batch_size

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Versions of the engine's own libraries, which are part of each row's key.

        Raises ConfigError when the engine is not installed.
        """
        return {}

    @classmethod
    def check(cls, generation: GenerationConfig) -> None:
        """Raise ConfigError when this process cannot run the engine as the recipe asks, such as on its GPUs.

        Comes before anything is written or loaded.
        """
        return

    @abstractmethod
    def answer(self, samples: Sequence[Sample]) -> list[str]:
        """The answers to one batch, without special tokens and surrounding spaces."""

    def __call__(self, samples: Sequence[Sample]) -> Iterator[list[tuple[int, str]]]:
        """Answer every sample; yields each batch when it is done, as (index into `samples`, answer) pairs.

        Raises RunError when the device's memory does not suffice.
        """
        for start in range(0, len(samples), self.batch_size):
            batch = range(start, min(start + self.batch_size, len(samples)))
            yield list(zip(batch, self.answer([samples[i] for i in batch]), strict=True))
