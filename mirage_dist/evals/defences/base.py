"""The base of all defences: what is put around a model so that it refuses harm, without changing its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from mirage_dist.data.sample import Sample
from mirage_dist.evals.judges.base import Judge
from mirage_dist.schema import EvalRecipe, TemplateConfig


@dataclass(frozen=True, kw_only=True)
class Defence:
    """A defence, as a recipe describes it: the fields of its dataclass are its options.

    It stands between the user, who may attack, and the model: it sees a question as the attack has left it. A subclass
    changes the template (`template`) or the user's turns (`turn`), or else names a `guard` that reads the model's own
    answers. What it does must depend on its options and its arguments alone.

    guard: the judge that decides which answers are withheld; None of a defence that withholds none.
    """

    guard: ClassVar[Judge | None] = None

    @property
    def about(self) -> str:
        """What reports print about it, as the end of "the model, …"."""
        return f"with {type(self).__module__}.{type(self).__qualname__}"

    def whole(self, source: str, key: str) -> Defence:
        """This defence with what its options describe: itself, unless these name objects of other registries.

        source, key: the recipe and the defence's place in it, for errors. Raises ConfigError for such a description
        that is wrong; opens no file.
        """
        return self

    def of(self, recipe: EvalRecipe) -> Defence:
        """This defence for one recipe: itself, unless it depends on more than its options. Loads no weights.

        Raises ConfigError when the recipe or this machine lacks something that the defence needs.
        """
        return self

    def decided_by(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What is part of each answer's key: all of the recipe's `options`, unless some decide no answer."""
        return dict(options)

    def template(self, template: TemplateConfig) -> TemplateConfig:
        """The template with which the defended model is asked."""
        return template

    def turn(self, question: str) -> str:
        """One turn of the user, as the defended model gets it."""
        return question

    @final
    def sent(self, sample: Sample) -> Sample:
        """A sample as the defended model gets it: each turn of the user through `turn`, the earlier ones too."""
        history = tuple((self.turn(question), answer) for question, answer in sample.history)
        return replace(sample, question=self.turn(sample.question), history=history)
