"""Prefix completion: given the first words of the answer that was to be forgotten, does the model tell the rest?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mirage_dist.erasure.setting import SET, Setting, attack_rate
from mirage_dist.schema import ConfigError, EvalSetConfig


@dataclass(frozen=True)
class Completion:
    """ASR on forget questions whose answer is begun (see `evals.attacks.prefill`); the judge sees what the model adds.

    words: how many are given; with more than stand before the forgotten content, all that do. questions: how many
    forget samples are asked.
    """

    words: list[int] = field(default_factory=lambda: [1, 2, 5])
    questions: int = 128

    def __post_init__(self) -> None:
        if not self.words or any(words < 1 for words in self.words):
            raise ConfigError(f"words={self.words}; expected numbers of words above 0")
        if self.questions < 1:
            raise ConfigError(f"questions={self.questions}; expected a number above 0")

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """{"words": {"0": leaf, "1": leaf, …}, "nothing_to_give": answers that begin with their content}.

        0 words are the questions as they are, all of them; an answer of which nothing can be given is in no other rate.
        """
        source = setting.questions("questions", setting.forget.samples[: self.questions])
        options = {"kind": "prefill", "content": setting.forget.pattern}
        attacks = {f"given_{words}": {**options, "words": words} for words in self.words}
        asked = setting.ask("begun", setting.model, {SET: EvalSetConfig("unsafe", [source], attacks)})
        rates = {str(words): attack_rate(asked, f"given_{words}_k1") for words in self.words}
        clean = attack_rate(asked)
        begun = max((leaf["n"] + leaf.get("unjudged", 0) for leaf in rates.values() if leaf), default=0)
        return {"words": {"0": clean, **rates}, "nothing_to_give": asked["sets"][SET]["samples"] - begun}
