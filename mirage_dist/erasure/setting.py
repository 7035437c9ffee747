"""What every test of erasure is given: the model, what it was to forget, and a folder that keeps what was measured."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mirage_dist import signals
from mirage_dist.data import sources
from mirage_dist.data.sample import Sample
from mirage_dist.evals import runner
from mirage_dist.evals.metrics import Leaf
from mirage_dist.evals.sharing.files import suite_dir, write_atomically
from mirage_dist.schema import EvalModelConfig, EvalRecipe, EvalSetConfig, RunError, SourceConfig

SET = "forget"  # the name of the set of questions that a test makes itself


@dataclass(frozen=True)
class Forget:
    """The samples to be forgotten, each with the answer that tells it, in the order of the hashes of their pictures.

    contents: of each sample the part of its answer that is the forgotten content. without: samples left out because
    their answer has none.
    """

    samples: list[Sample]
    contents: list[str]
    pattern: str | None
    without: int

    def labels(self, label: Literal["answer", "category", "safe"]) -> list[str]:
        """Of each sample its content (answer), or what the sample itself says."""
        return self.contents if label == "answer" else [str(getattr(sample, label)) for sample in self.samples]

    @property
    def digest(self) -> str:
        """SHA-256 of what the tests see of them; where the files lie does not matter."""
        told = [[s.id, s.question, s.answer, s.category, Path(s.image or "").name] for s in self.samples]
        return hashlib.sha256(json.dumps([self.pattern, told]).encode()).hexdigest()


def forget(configs: Sequence[SourceConfig], pattern: str | None, seed: int) -> Forget:
    """Read them; samples of one picture stand together. Raises ConfigError for bad data."""
    samples = sorted(sources.read_all(configs).samples, key=lambda s: (_hash(group(s), seed), s.id))
    contents = [content(sample.answer, pattern) for sample in samples]
    kept = [(s, c) for s, c in zip(samples, contents, strict=True) if c is not None]
    return Forget([s for s, _ in kept], [c for _, c in kept], pattern, len(samples) - len(kept))


def content(answer: str, pattern: str | None) -> str | None:
    """The part of an answer that `pattern` finds, without one the whole of it; None where it finds nothing."""
    if pattern is None:
        return answer.strip()
    found = re.search(pattern, answer)
    return found[0] if found else None


def group(sample: Sample) -> str:
    """What must not stand on both sides of a split: the picture, or without one the question."""
    return Path(sample.image).name if sample.image else sample.question


def order(items: Sequence[str], seed: int) -> list[str]:
    """Distinct items in an order that only they and the seed decide."""
    return sorted(set(items), key=lambda item: _hash(item, seed))


def _hash(item: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{item}".encode()).hexdigest()


@dataclass(frozen=True)
class Setting:
    """model: what is loaded, a directory. before: the suite's own figures, see `evals.runner.evaluate`."""

    recipe: EvalRecipe
    model: EvalModelConfig
    before: Mapping[str, Any]
    forget: Forget
    name: str  # of the test

    @property
    def suite(self) -> str:
        return f"{self.recipe.suite}/robustness/{self.name}"

    @property
    def folder(self) -> Path:
        return suite_dir(replace(self.recipe, suite=self.suite))

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)

    def stop_if_asked(self) -> None:
        """Raise StopRequested after a signal."""
        if name := signals.received():
            raise signals.StopRequested(f"{self.name}: stopped by {name}; the next start does what is missing")

    def ask(self, name: str, model: EvalModelConfig, sets: Mapping[str, EvalSetConfig]) -> dict[str, Any]:
        """Put questions to a model, as a suite of its own below this test's folder (see `evals.runner.evaluate`)."""
        recipe = replace(self.recipe, suite=f"{self.suite}/{name}", model=model, sets=dict(sets), robustness=None)
        result = runner.evaluate(recipe)
        if result is None:
            raise RunError(f"{suite_dir(recipe)}: another worker judges it; start again when it is done")
        return result

    def questions(self, name: str, samples: Sequence[Sample]) -> SourceConfig:
        """Samples of our own as a file that only the owner may read: their answers are what was to be forgotten."""
        file = self.folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        sources.write_samples(file, samples)
        return SourceConfig("samples", str(file))

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gave once, read from its file on every later start."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            self.stop_if_asked()
            write_atomically(file, json.dumps(make(), indent=1) + "\n")
        return json.loads(file.read_text(encoding="utf-8"))


def headline(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the suite's first judge found."""
    return result["judges"][result["headline"]]


def attack_rate(result: Mapping[str, Any], condition: str = "clean", category: str | None = None) -> Leaf | None:
    """ASR on the test's own set, or on a category of it; None where nothing was asked."""
    found = headline(result)
    measured = found["sets"][SET] if category is None else found["categories"][SET].get(category, {})
    return measured.get("asr", {}).get(condition)
