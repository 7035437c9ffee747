"""The one-word attack with several words, which may come from an audit of the training data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mirage_dist.data.sample import Sample
from mirage_dist.data.words import FIRST_WORD
from mirage_dist.evals.attacks.swap import check_word, swapped
from mirage_dist.schema import ConfigError

AUTO = ["auto"]


@dataclass(frozen=True)
class Words:
    """The first word becomes each of `words`, one a shot; `limit` keeps the first of them.

    `words: auto` takes those that an audit found (`audit`: the file that `mirage audit … --out` writes), strongest
    first: on unsafe sets the words tied to answers, elsewhere those tied to refusals. Where the audit found none, the
    attack has no shot.
    """

    words: list[str]
    audit: str | None = None
    limit: int | None = None
    control: bool = False
    found: list[str] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.words:
            raise ConfigError("words is empty; give at least one, or auto with an audit")
        if (self.words == AUTO) != (self.audit is not None):
            raise ConfigError(f"words={self.words}, audit={self.audit!r}; expected a list, or auto and an audit's file")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit}: expected a whole number above 0")
        for word in self.words:
            check_word("words", word)
        if len({word.lower() for word in self.words}) < len(self.words):
            raise ConfigError(f"words={self.words}: one of them stands there twice")

    def of(self, kind: str) -> Words:
        """Raises ConfigError for a file that is no audit."""
        if self.audit is None:
            return self
        chosen = replace(self)
        object.__setattr__(chosen, "found", _read(Path(self.audit), "answered" if kind == "unsafe" else "refused"))
        return chosen

    @property
    def chosen(self) -> list[str]:
        words = self.words if self.audit is None else self.found
        if words is None:
            raise ConfigError("words: auto: which words they are depends on the set's kind, and none was told")
        return words[: self.limit]

    @property
    def shots(self) -> int:
        return len(self.chosen)

    def __call__(self, sample: Sample) -> list[Sample]:
        return [swapped(sample, word) for word in self.chosen]


def _read(file: Path, response: str) -> list[str]:
    """The audit's words tied to this kind of response, without repeats."""
    try:
        audit: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a readable audit ({error}); make it with mirage audit DATA --out") from error
    words = audit.get("words") if isinstance(audit, dict) else None
    found = words.get(response) if isinstance(words, dict) else None
    if not isinstance(found, list):
        raise ConfigError(
            f"{file}: field 'words.{response}' is missing; expected a list of words, as mirage audit makes"
        )
    for number, word in enumerate(found):
        if not isinstance(word, str) or not FIRST_WORD.fullmatch(word):
            raise ConfigError(f"{file}: field 'words.{response}[{number}]': expected one word, got {word!r}")
    return list({word.lower(): word for word in found}.values())
