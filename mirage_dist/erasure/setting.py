"""What every test of erasure is, and what it gets: the model, the samples to forget, a folder for its results."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from mirage_dist import disk, signals, state
from mirage_dist.data import formats, sources
from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.formats.samples import lines_of
from mirage_dist.data.sample import Sample
from mirage_dist.erasure import forgetting
from mirage_dist.evals import runner
from mirage_dist.evals.models import subject
from mirage_dist.evals.models.hf import encoder
from mirage_dist.evals.results import CLEAN, Condition, JudgeResult, Leaf, SuiteResult
from mirage_dist.evals.sharing.files import suite_dir
from mirage_dist.model.families import configs as families
from mirage_dist.model.families import processors
from mirage_dist.progress import log
from mirage_dist.schema import EvalModelConfig, EvalRecipe, EvalSetConfig, RunError, SourceConfig

SET = "forget"  # name of the set of questions in the suites that a test evaluates
T = TypeVar("T")


@dataclass(frozen=True)
class Forget:
    """The samples that the model should have forgotten, in the order of the hashes of their pictures.

    contents: for each sample, the part of its answer that is the forgotten content. without: number of samples left out
    because the pattern matches nothing in their answer.
    """

    samples: list[Sample]
    contents: list[str]
    pattern: str | None
    without: int

    def carried(self, taught: Sequence[Sample], label: Literal["answer", "category"]) -> Callable[[Sample], bool]:
        """Whether what a model is taught by some of the samples may hold the content of a sample.

        It does where one of them has the same label, or where its answer, of which `contents` is a part only, states
        the content; case and punctuation do not count. Another wording of a whole answer is another content.
        """
        own = dict(zip(self.samples, zip(self.labels(label), self.contents, strict=True), strict=True))
        labels = {forgetting.key(own[sample][0]) for sample in taught}
        answers = {f" {forgetting.key(sample.answer)} " for sample in taught}

        def holds(sample: Sample) -> bool:
            name, content = map(forgetting.key, own[sample])
            return name in labels or any(f" {content} " in answer for answer in answers)

        return holds

    def labels(self, label: Literal["answer", "category", "safe"]) -> list[str]:
        """For each sample its content (answer), or its own field."""
        return self.contents if label == "answer" else [str(getattr(sample, label)) for sample in self.samples]

    @property
    def digest(self) -> str:
        """SHA-256 of what the tests depend on; the folders of the files do not count."""
        samples = [[s.id, s.question, s.answer, s.category, Path(s.image or "").name] for s in self.samples]
        return disk.digest([self.pattern, samples])


def forget(configs: Sequence[SourceConfig], pattern: str | None, seed: int) -> Forget:
    """Read the forget samples, each once, with ids of their own; those of one picture are adjacent.

    Raises ConfigError for bad data.
    """
    read = sources.read_all(configs).samples
    if twice := len(read) - len(unique := sources.distinct(read)):
        log.info(f"erasure.forget: {twice} samples are in several of its files, and count once")
    samples = sorted(unique, key=lambda s: (_hash(group(s), seed), s.id))
    contents = [content(sample.answer, pattern) for sample in samples]
    kept = [(s, c) for s, c in zip(samples, contents, strict=True) if c is not None]
    return Forget([s for s, _ in kept], [c for _, c in kept], pattern, len(samples) - len(kept))


def content(answer: str, pattern: str | None) -> str | None:
    """The part of an answer that `pattern` matches, or the whole answer without a pattern; None without a match."""
    if pattern is None:
        return answer.strip()
    match = re.search(pattern, answer)
    return match[0] if match else None


def split(
    samples: Sequence[Sample], contents: Sequence[str], share: float, questions: int, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """(samples from which a test may learn, questions), each in the order given. They share no `group`.

    contents: of each sample. share: fraction of the distinct contents that the test may learn, at least one of them.
    questions: the first so many samples, of any content.
    """
    names = order(contents, seed)
    known = set(names[: max(1, round(share * len(names)))])
    held = samples[:questions]
    groups = {group(sample) for sample in held}
    pairs = zip(samples, contents, strict=True)
    return [sample for sample, own in pairs if own in known and group(sample) not in groups], list(held)


def group(sample: Sample) -> str:
    """The unit that must not be on both sides of a split: the picture, or without one the question."""
    return Path(sample.image).name if sample.image else sample.question


def order(items: Sequence[str], seed: int) -> list[str]:
    """The distinct items in an order that depends on the items and the seed only."""
    return sorted(set(items), key=lambda item: _hash(item, seed))


def prompting(recipe: EvalRecipe, model: EvalModelConfig) -> tuple[Any, Encoder]:
    """The configuration of a model and the encoder of its prompts, for checks before its weights load.

    Raises ConfigError as `evals.models.subject.find` does.
    """
    folder = subject.find(model, Path(recipe.run.dir)).processing
    config = families.load(folder)
    return config, encoder(processors.load(folder), recipe.template, config)


def _hash(item: str, seed: int) -> str:
    return disk.sha256_text(f"{seed}:{item}")


class ErasureTest(ABC):
    """A test of erasure, as a recipe describes it: the fields of its dataclass are its options."""

    @abstractmethod
    def prepared(self, forget: Forget, recipe: EvalRecipe) -> Prepared:
        """The test of these samples, ready to be made. Loads no weights.

        Raises ConfigError for options, samples or a model with which it cannot be made.
        """


@dataclass(frozen=True)
class Prepared:
    """A test that one start makes.

    measure: makes it, or what is missing of it, and returns its part of `erasure.json`. dependencies: what its kept
    results depend on beside its options, the forget samples and the model; a start with other ones refuses its folder.
    """

    measure: Callable[[Setting], Any]
    dependencies: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """recipe: the evaluation's. model: a local model directory. before: the suite's own results. name: of the test."""

    recipe: EvalRecipe
    model: EvalModelConfig
    before: SuiteResult
    forget: Forget
    name: str

    @property
    def suite(self) -> str:
        return f"{self.recipe.suite}/erasure/{self.name}"

    @property
    def folder(self) -> Path:
        return suite_dir(replace(self.recipe, suite=self.suite))

    def log(self, text: str) -> None:
        log.info(f"{self.name}: {text}")

    def stop_on_signal(self) -> None:
        """Raise StopRequested when a signal has arrived."""
        if name := signals.received():
            raise signals.StopRequested(f"{self.name}: stopped by {name}; start again to make what is missing")

    def evaluate(self, name: str, model: EvalModelConfig, sets: Mapping[str, EvalSetConfig]) -> SuiteResult:
        """Evaluate a model on sets of questions, as the suite `name` below this test's folder.

        Raises RunError when another worker judges that suite, and what `evals.runner.evaluate` raises.
        """
        suite = f"{self.suite}/{name}"
        recipe = replace(self.recipe, suite=suite, model=model, sets=dict(sets), defences={}, erasure=None)
        result = runner.evaluate(recipe)
        if result is None:
            raise RunError(f"{suite_dir(recipe)}: another worker is judging it; start again when it has finished")
        return result

    def questions(self, name: str, samples: Sequence[Sample]) -> SourceConfig:
        """Write samples to a private file and return it as a source. Their answers hold the forgotten content."""
        file = self.folder / f"{name}.jsonl"
        disk.write(file, lines_of(samples), private=True)
        return formats.source("samples", str(file))

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """The JSON object that `make` returns: written to a private file once, and read from it on later starts.

        A file that is damaged or edited is named in the log, and made again.
        """
        file = self.folder / f"{name}.json"
        try:
            return cast(T, state.read("kept", file))
        except FileNotFoundError:
            pass
        except state.Damaged as error:
            self.log(f"{error}; its content is computed again")
        self.stop_on_signal()
        disk.write(file, state.sealed("kept", cast(dict[str, Any], make()), indent=1), private=True)
        return cast(T, state.read("kept", file))


def headline(result: SuiteResult) -> JudgeResult:
    """The headline judge's figures."""
    return result["judges"][result["headline"]]


def attack_rate(result: SuiteResult, condition: Condition = CLEAN, category: str | None = None) -> Leaf | None:
    """ASR on the test's own set, or on one category of it; None when that has no questions."""
    judged = headline(result)
    measures: Any = judged["sets"][SET] if category is None else judged["categories"][SET].get(category, {})
    return measures.get("asr", {}).get(str(condition))
