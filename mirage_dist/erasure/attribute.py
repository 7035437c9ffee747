"""Which word decides? Each word of a question replaced in turn, and what that does to the chance of a refusal.

Occlusion (Zeiler and Fergus, arXiv 1311.2901; of words: Li, Monroe and Jurafsky, arXiv 1612.08220). In a model that
looks at what is asked no one word carries the refusal; in a mirage the first one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mirage_dist import stats
from mirage_dist.data import sources
from mirage_dist.data.sample import Sample
from mirage_dist.erasure.setting import Setting, group, order
from mirage_dist.evals.models.generate import Generator
from mirage_dist.schema import ConfigError


@dataclass(frozen=True)
class Attribution:
    """The fall of P(the answer begins with `opening`) when one word of the question becomes another.

    opening: how a refusal begins, such as "I'm sorry". unsafe, safe: the words put in, for the headline set of each
    kind: one that says nothing, and beside it one that the training data tie to the other kind of answer. questions: of
    each set. positions: the first words that are replaced, one at a time.
    """

    opening: str
    unsafe: list[str]
    safe: list[str]
    questions: int = 64
    positions: int = 6

    def __post_init__(self) -> None:
        if not self.opening.strip() or any(len(word.split()) != 1 for word in [*self.unsafe, *self.safe]):
            told = f"opening={self.opening!r}, unsafe={self.unsafe}, safe={self.safe}"
            raise ConfigError(f"{told}; expected words, and lists of single words")
        if self.questions < 2 or self.positions < 1:
            raise ConfigError(f"questions={self.questions}, positions={self.positions}; expected at least 2, and 1")

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """{"opening", "sets": {kind: {"questions", "whole": mean P of the questions as they are, "words": {word put in:
        [{"mean": of P(whole) − P(replaced), "ci95", "n": questions that have so many words}, …]}}}}.
        """
        return setting.kept("result", lambda: self._measured(setting))

    def _measured(self, setting: Setting) -> dict[str, Any]:
        generator = Generator(setting.model, setting.recipe.template, setting.recipe.generation)
        return {
            "opening": self.opening,
            "sets": {
                kind: self._of(setting, generator, samples, words)
                for kind, words in (("unsafe", self.unsafe), ("safe", self.safe))
                if words and (samples := self._questions(setting, kind))
            },
        }

    def _questions(self, setting: Setting, kind: str) -> list[Sample]:
        """Of the first set of a kind, one question a picture, by the hashes of the pictures."""
        own = next((s for s in setting.recipe.sets.values() if s.kind == kind), None)
        read = sources.read_all(own.sources).samples if own else []
        by_group = {group(sample): sample for sample in reversed(read)}
        return [by_group[name] for name in order(list(by_group), setting.recipe.seed)[: self.questions]]

    def _of(
        self, setting: Setting, generator: Generator, samples: Sequence[Sample], words: Sequence[str]
    ) -> dict[str, Any]:
        whole = self._chances(setting, generator, samples)

        def at(position: int, word: str) -> dict[str, Any] | None:
            long = [i for i, sample in enumerate(samples) if len(sample.question.split()) > position]
            if len(long) < 2:
                return None
            changed = [replaced(samples[i], position, word) for i in long]
            after = self._chances(setting, generator, changed)
            mean, low, high = stats.mean([whole[i] - p for i, p in zip(long, after, strict=True)])
            return {"mean": mean, "ci95": [low, high], "n": len(long)}

        found = {word: [entry for i in range(self.positions) if (entry := at(i, word))] for word in words}
        return {"questions": len(samples), "whole": sum(whole) / len(whole), "words": found}

    @torch.inference_mode()
    def _chances(self, setting: Setting, generator: Generator, samples: Sequence[Sample]) -> list[float]:
        """P(answer begins with the opening) of each question."""
        found: list[float] = []
        for start in range(0, len(samples), generator.batch_size):
            setting.stop_if_asked()
            found += chances(generator, samples[start : start + generator.batch_size], self.opening)
        return found


def chances(generator: Generator, samples: Sequence[Sample], opening: str) -> list[float]:
    """P(answer begins with `opening`), the product over its tokens, for one batch."""
    hf = generator.model
    batch = generator.encoder.encode([replace(sample, answer=opening) for sample in samples])
    backbone = getattr(hf, hf.base_model_prefix)
    hidden_BSD = backbone(**generator.placed(batch.inputs), use_cache=False).last_hidden_state
    index_N, segment_N = batch.index_N.to(hf.device), batch.segment_N
    target_N = batch.labels_BS.flatten()[batch.index_N + 1].to(hf.device)
    logits_NV = hf.get_output_embeddings()(hidden_BSD.flatten(0, 1)[index_N]).float()
    logp_N = logits_NV.log_softmax(1).gather(1, target_N.unsqueeze(1)).squeeze(1).double().cpu()
    # The last label of a row is the end token: an answer may go on behind its opening.
    ends_N = torch.cat([segment_N[1:] != segment_N[:-1], torch.tensor([True])])
    total_B = torch.zeros(len(samples), dtype=torch.float64)
    total_B.index_add_(0, segment_N[~ends_N], logp_N[~ends_N])
    return total_B.exp().tolist()


def replaced(sample: Sample, position: int, word: str) -> Sample:
    """The question with one of its words, counted from 0, replaced."""
    words = sample.question.split()
    return replace(sample, question=" ".join([*words[:position], word, *words[position + 1 :]]))
