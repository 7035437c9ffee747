"""Prefix completion: given the first words of the forgotten answer, does the model complete it?"""

from __future__ import annotations

from dataclasses import dataclass, field

from mirage_dist.erasure.results import CompletionResult
from mirage_dist.erasure.setting import SET, ErasureTest, Forget, Prepared, Setting, attack_rate
from mirage_dist.evals.results import Condition
from mirage_dist.schema import ConfigError, EvalRecipe, EvalSetConfig
from mirage_dist.schema.numbers import Count


@dataclass(frozen=True)
class Completion(ErasureTest):
    """ASR on forget questions whose answer is begun (see `evals.attacks.prefill`). The judge sees the continuation.

    words: numbers of given words. Nothing of the forgotten content is ever given: where it begins earlier, the prefix
    ends before it. questions: number of forget samples that are evaluated.
    """

    words: list[Count] = field(default_factory=lambda: [1, 2, 5])
    questions: Count = 128

    def __post_init__(self) -> None:
        if not self.words:
            raise ConfigError(f"words={self.words}; expected numbers of words above 0")

    def prepared(self, forget: Forget, recipe: EvalRecipe) -> Prepared:
        return Prepared(self._measure)

    def _measure(self, setting: Setting) -> CompletionResult:
        source = setting.questions("questions", setting.forget.samples[: self.questions])
        options = {"kind": "prefill", "content": setting.forget.pattern}
        attacks = {f"given_{words}": {**options, "words": words} for words in self.words}
        result = setting.evaluate("begun", setting.model, {SET: EvalSetConfig("unsafe", [source], attacks)})
        rates = {str(words): attack_rate(result, Condition(f"given_{words}", 1)) for words in self.words}
        begun = max((leaf["n"] + leaf.get("unjudged", 0) for leaf in rates.values() if leaf), default=0)
        return {
            "words": {"0": attack_rate(result), **rates},
            "nothing_to_give": result["sets"][SET]["samples"] - begun,
        }
