"""A suffix that the model's own gradients find, in the manner of GCG."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Bench, Key, Made
from mirage_dist.schema import ConfigError

if TYPE_CHECKING:
    from mirage_dist.evals.attacks import gcg

ANSWER = "{answer}"


@dataclass(frozen=True)
class Suffix:
    """Tokens put behind the question that make the model under test likely to begin with `target` (see `evals.gcg`;
    Zou et al. 2023, arXiv 2307.15043, algorithm 1). It needs that model's weights.

    target: an affirmative opening; {answer} in it stands for the sample's answer. universal: one suffix for the whole
    set, found on `train` of its samples (drawn by `seed`), instead of one for each sample. length: of the suffix, in
    tokens. steps, candidates (single swaps tried a step), top_k (likeliest tokens of a position): the budget; with
    no step the suffix is the one that a search begins with, a control. avoid: words that no suffix may hold. One shot.
    """

    target: str = "Sure, here is"
    universal: bool = False
    train: int = 16
    length: int = 20
    steps: int = 100
    candidates: int = 128
    top_k: int = 64
    seed: int = 0
    avoid: list[str] = field(default_factory=list)
    control: bool = False
    shots: int = 1

    cache = None  # the suffix belongs to the model under test
    min_match = 1.0
    origin = "gradients"

    def __post_init__(self) -> None:
        if self.shots != 1:
            raise ConfigError(f"shots={self.shots}: a suffix has one rewrite")
        for name in ("train", "length", "candidates", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a whole number above 0")
        if self.steps < 0:
            raise ConfigError(f"steps={self.steps}: expected 0 (the suffix that a search begins with) or more")
        if not self.target.strip():
            raise ConfigError("target is empty; give an affirmative opening, or {answer}")

    def __call__(self, sample: Sample) -> list[Sample]:
        raise ConfigError(f"sample {sample.id!r}: its suffix was not searched yet")

    def identity(self, samples: Sequence[Sample], key: Key, under_test: Mapping[str, Any]) -> dict[str, Any]:
        names = ("target", "universal", "length", "steps", "candidates", "top_k", "seed", "avoid")
        chosen = [key(sample) for sample in self.chosen(samples, key)] if self.universal else None
        return {**{name: getattr(self, name) for name in names}, "train": chosen, "rules": 1, **under_test}

    def chosen(self, samples: Sequence[Sample], key: Key) -> list[Sample]:
        """The samples on which a universal suffix is found, whatever their order in the set."""

        def drawn(sample: Sample) -> str:
            return hashlib.sha256(f"{self.seed} {key(sample)}".encode()).hexdigest()

        return sorted(samples, key=drawn)[: self.train]

    def make(self, missing: Sequence[Sample], bench: Bench) -> Generator[Made, None, None]:
        from mirage_dist.evals.attacks import gcg  # brings torch

        model = gcg.Model(bench.generator(), self.avoid)
        if self.universal:
            suffix = self._search(model, self.chosen(bench.samples, bench.key), "universal", bench)
            yield from (Made(i, [f"{sample.question} {suffix}"]) for i, sample in enumerate(missing))
            return
        for i, sample in enumerate(missing):
            yield Made(i, [f"{sample.question} {self._search(model, [sample], bench.key(sample), bench)}"])

    def _search(self, model: gcg.Model, samples: Sequence[Sample], name: str, bench: Bench) -> str:
        """The suffix after all steps; goes on behind the last one that was noted under `name`."""
        from mirage_dist.evals.attacks import gcg

        wanted = [replace(s, answer=self.target.replace(ANSWER, s.answer)) for s in samples]
        problem = gcg.Problem(model, wanted, self.length, f"{self.seed} {name}")
        noted = bench.noted(name)
        state = problem.start() if noted is None else gcg.State(noted["step"], noted["ids"], noted["loss"])
        while state.step < self.steps:
            state = problem.step(state, self.candidates, self.top_k)
            bench.note(name, {**state._asdict(), "steps": self.steps, "text": model.text(state.ids)}, self.universal)
        return model.text(state.ids)
