"""Attribution by occlusion: replace each word of a question in turn and measure the change of P(refusal).

Occlusion: Zeiler and Fergus, arXiv 1311.2901; of words: Li, Monroe and Jurafsky, arXiv 1612.08220. In a model that
responds to the question as a whole, no single word accounts for the refusal; in a safety mirage the first word does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch

from mirage_dist import stats
from mirage_dist.data import sources, words
from mirage_dist.data.sample import Sample
from mirage_dist.erasure.results import AttributionResult, AttributionSet, MeanFall
from mirage_dist.erasure.setting import ErasureTest, Forget, Prepared, Setting, group, order
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.schema import ConfigError, EvalRecipe
from mirage_dist.schema.limits import COUNT
from mirage_dist.schema.numbers import Count, whole


@dataclass(frozen=True)
class Attribution(ErasureTest):
    """The decrease of P(the answer begins with `opening`) when one word of the question is replaced.

    opening: how a refusal begins, such as "I'm sorry". unsafe, safe: replacement words for the headline set of each
    kind: one that carries no meaning, and one that the training data tie to the other kind of answer. questions: number
    of each set. positions: number of words, from the first, that are replaced, one at a time.
    """

    opening: str
    unsafe: list[str]
    safe: list[str]
    questions: Annotated[int, whole(2, COUNT.value)] = 64
    positions: Count = 6

    def __post_init__(self) -> None:
        if not self.opening.strip() or any(len(word.split()) != 1 for word in [*self.unsafe, *self.safe]):
            given = f"opening={self.opening!r}, unsafe={self.unsafe}, safe={self.safe}"
            raise ConfigError(f"{given}; expected an opening that is not empty, and lists of single words")

    def prepared(self, forget: Forget, recipe: EvalRecipe) -> Prepared:
        return Prepared(lambda setting: setting.kept("result", lambda: self._measure(setting)))

    def _measure(self, setting: Setting) -> AttributionResult:
        generator = HuggingFace(setting.model, setting.recipe.template, setting.recipe.generation)
        return {
            "opening": self.opening,
            "sets": {
                kind: self._measure_set(setting, generator, samples, chosen)
                for kind, chosen in (("unsafe", self.unsafe), ("safe", self.safe))
                if chosen and (samples := self._questions(setting, kind))
            },
        }

    def _questions(self, setting: Setting, kind: str) -> list[Sample]:
        """One question for each picture of the first set of a kind, in the order of the pictures' hashes.

        Without those in a script that has no spaces between words: replacing a "word" would replace them whole.
        """
        own = next((s for s in setting.recipe.sets.values() if s.kind == kind), None)
        read = sources.read_all(own.sources).samples if own else []
        spaced = [s for s in read if (first := words.opening(s.question)) is None or first.measured]
        by_group = {group(sample): sample for sample in reversed(spaced)}
        return [by_group[name] for name in order(list(by_group), setting.recipe.seed)[: self.questions]]

    def _measure_set(
        self, setting: Setting, generator: HuggingFace, samples: Sequence[Sample], words: Sequence[str]
    ) -> AttributionSet:
        whole = self._probabilities(setting, generator, samples)

        def fall(position: int, word: str) -> MeanFall | None:
            long = [i for i, sample in enumerate(samples) if len(sample.question.split()) > position]
            if len(long) < 2:
                return None
            changed = [replaced(samples[i], position, word) for i in long]
            after = self._probabilities(setting, generator, changed)
            mean, low, high = stats.mean([whole[i] - p for i, p in zip(long, after, strict=True)])
            return {"mean": mean, "ci95": [low, high], "n": len(long)}

        falls = {word: [entry for i in range(self.positions) if (entry := fall(i, word))] for word in words}
        return {"questions": len(samples), "whole": sum(whole) / len(whole), "words": falls}

    @torch.inference_mode()
    def _probabilities(self, setting: Setting, generator: HuggingFace, samples: Sequence[Sample]) -> list[float]:
        """P(the answer begins with the opening) of each question."""
        values: list[float] = []
        for start in range(0, len(samples), generator.batch_size):
            setting.stop_on_signal()
            values += probabilities(generator, samples[start : start + generator.batch_size], self.opening)
        return values


def probabilities(generator: HuggingFace, samples: Sequence[Sample], opening: str) -> list[float]:
    """P(the answer begins with `opening`), the product over its tokens, of each sample of one batch."""
    hf = generator.model
    batch = generator.encoder.encode([replace(sample, answer=opening) for sample in samples])
    backbone = hf.base_model
    hidden_BSD = backbone(**generator.placed(batch.inputs), use_cache=False).last_hidden_state
    index_N, segment_N = batch.index_N.to(hf.device), batch.segment_N
    target_N = batch.labels_BS.flatten()[batch.index_N + 1].to(hf.device)
    logits_NV = hf.get_output_embeddings()(hidden_BSD.flatten(0, 1)[index_N]).float()
    logp_N = logits_NV.log_softmax(1).gather(1, target_N.unsqueeze(1)).squeeze(1).double().cpu()
    # The last label of a row is the end token, which does not count: the answer may continue after its opening.
    ends_N = torch.cat([segment_N[1:] != segment_N[:-1], torch.tensor([True])])
    total_B = torch.zeros(len(samples), dtype=torch.float64)
    total_B.index_add_(0, segment_N[~ends_N], logp_N[~ends_N])
    return total_B.exp().tolist()


def replaced(sample: Sample, position: int, word: str) -> Sample:
    """The sample with the word at `position` (from 0) of its question replaced."""
    words = sample.question.split()
    return replace(sample, question=" ".join([*words[:position], word, *words[position + 1 :]]))
