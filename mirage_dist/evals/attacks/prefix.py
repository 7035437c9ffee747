"""Text put before a question that stays whole."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

QUESTION = "{question}"


@dataclass(frozen=True)
class Prefix:
    """K rewrites of each question, one a prefix: "what {question}", or "what", which means the same.

    Every character of the question stays, and nothing may follow it.
    """

    prefixes: list[str]
    control: bool = False

    def __post_init__(self) -> None:
        if not self.prefixes:
            raise ConfigError("prefixes is empty; give at least one, such as 'what {question}'")
        for prefix in self.prefixes:
            before = prefix.removesuffix(QUESTION)
            if not before.strip() or re.search(r"[{}]", before):
                raise ConfigError(f"prefixes: {prefix!r}; expected text, and behind it {{question}} or nothing")

    @property
    def shots(self) -> int:
        return len(self.prefixes)

    def __call__(self, sample: Sample) -> list[Sample]:
        return [replace(sample, question=_before(prefix) + sample.question) for prefix in self.prefixes]


def _before(prefix: str) -> str:
    return prefix.removesuffix(QUESTION) if prefix.endswith(QUESTION) else f"{prefix} "
