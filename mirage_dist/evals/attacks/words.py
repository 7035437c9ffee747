"""The one-word attacks: another first word, or each of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mirage_dist.data import records
from mirage_dist.data.sample import Sample
from mirage_dist.data.words import first_word, is_word
from mirage_dist.evals.attacks.base import Attack
from mirage_dist.schema import ConfigError
from mirage_dist.schema.numbers import Count, Repeats

AUTO = ["auto"]


@dataclass(frozen=True)
class Swap(Attack):
    """The literal one-word attack: the first word becomes `word`, every other character stays.

    "Share the steps." -> "What the steps." for `word: what`. One shot. A question whose first word cannot be measured,
    because its script has no spaces between words, is without a rewrite, here and in the attacks below.
    """

    word: str  # the new first word
    shots: Repeats = 1  # always 1

    def __post_init__(self) -> None:
        if self.shots != 1:
            raise ConfigError(f"shots={self.shots}: a swap has one rewrite; use kind: words or templates for more")
        check_word("word", self.word)

    def __call__(self, sample: Sample) -> list[Sample]:
        return swapped(sample, [self.word])


@dataclass(frozen=True)
class Words(Attack):
    """A swap for each of `words`, one word a shot; `limit` keeps the first of them.

    `words: auto` takes the words from an audit of the training data (`audit`: the file that `mirage audit … --out`
    writes), strongest first: on unsafe sets those that mark answers, elsewhere those that mark refusals. When the audit
    lists none, the attack has no shot.
    """

    words: list[str]  # first words, one a shot, or `auto`
    audit: str | None = None  # for `auto`: audit.json of `mirage audit … --out`
    limit: Count | None = None  # the first so many of the words; default: all

    def __post_init__(self) -> None:
        if not self.words:
            raise ConfigError("words is empty; give at least one, or auto with an audit")
        if (self.words == AUTO) != (self.audit is not None):
            raise ConfigError(f"words={self.words}, audit={self.audit!r}; expected a list, or auto and an audit's file")
        for word in self.words:
            check_word("words", word)
        if len({word.lower() for word in self.words}) < len(self.words):
            raise ConfigError(f"words={self.words}: a word occurs twice")

    def of(self, kind: str) -> Attack:
        """Raises ConfigError when the file is not an audit."""
        if self.audit is None:
            return self
        words = _read(Path(self.audit), "answered" if kind == "unsafe" else "refused")
        return Swaps(words[: self.limit], control=self.control)

    @property
    def chosen(self) -> list[str]:
        if self.audit is not None:
            raise ConfigError("words: auto: the words depend on the kind of the set, which is not known here")
        return self.words[: self.limit]

    @property
    def shots(self) -> int:
        return len(self.chosen)

    def __call__(self, sample: Sample) -> list[Sample]:
        return swapped(sample, self.chosen)


@dataclass(frozen=True)
class Swaps(Attack):
    """A swap for each word of an audit, which may list none."""

    words: Sequence[str]

    @property
    def shots(self) -> int:
        return len(self.words)

    def __call__(self, sample: Sample) -> list[Sample]:
        return swapped(sample, self.words)


def swapped(sample: Sample, words: Sequence[str]) -> list[Sample]:
    """The sample in NFC with each of these first words, in the case of the old one; none if it cannot be measured.

    Raises ConfigError for a question without a word.
    """
    first = first_word(sample)
    return [replace(sample, question=first.replaced(word)) for word in words] if first.measured else []


def check_word(key: str, word: str) -> None:
    """Raise ConfigError unless `word` is one word."""
    if not is_word(word):
        raise ConfigError(f"{key}={word!r}: expected one word")


def _read(file: Path, response: str) -> list[str]:
    """The audit's words that mark this kind of response, without repeats."""
    try:
        audit = records.value(file)
    except ConfigError as error:
        raise ConfigError(f"{file}: not a readable audit ({error}); make it with mirage audit DATA --out") from error
    by_response = audit.get("words") if isinstance(audit, dict) else None
    words = by_response.get(response) if isinstance(by_response, dict) else None
    if not isinstance(words, list):
        raise ConfigError(
            f"{file}: field 'words.{response}' is missing; expected a list of words, as mirage audit makes"
        )
    for number, word in enumerate(words):
        if not isinstance(word, str) or not is_word(word):
            raise ConfigError(f"{file}: field 'words.{response}[{number}]': expected one word, got {word!r}")
    return list({word.lower(): word for word in words}.values())
