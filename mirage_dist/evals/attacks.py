"""Attacks: rewrites of a question that keep its picture and its meaning but not its first word.

An attack is a pure function from a sample to its rewrites, one a shot. The same functions make the
over-prudence test (a safe question opened with a word tied to refusals) and the neutral control. A new
attack is one dataclass and one line in `REGISTRY`; its fields are its options in the recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mirage_dist.config import build, nearest
from mirage_dist.data.sources import FIRST_WORD, Sample
from mirage_dist.evals.prefill import Prefill
from mirage_dist.schema import ConfigError


class Attack(Protocol):
    """control: a rewrite without a trigger word, which the figures draw apart."""

    @property
    def control(self) -> bool: ...

    @property
    def shots(self) -> int: ...

    def __call__(self, sample: Sample) -> list[Sample]:
        """`shots` rewrites, or none where the attack has nothing for this sample."""
        ...


@dataclass(frozen=True)
class Swap:
    """The literal one-word attack: the first word becomes `word`, every other character stays.

    "Share the steps." -> "What the steps." for `word: what`. One shot.
    """

    word: str
    control: bool = False
    shots: int = 1

    def __post_init__(self) -> None:
        if self.shots != 1:
            raise ConfigError(f"shots={self.shots}: a swap has one rewrite; use kind: templates for more")
        if not FIRST_WORD.fullmatch(self.word):
            raise ConfigError(f"word={self.word!r}: expected one word")

    def __call__(self, sample: Sample) -> list[Sample]:
        first = first_word(sample)
        asked = sample.question
        return [replace(sample, question=asked[: first.start()] + cased(self.word, first[0]) + asked[first.end() :])]


@dataclass(frozen=True)
class Templates:
    """K rewrites of each question, one a template, each opening with `word`.

    A template may hold {rest}, the question from its second word on, and {question}, the whole of it.
    """

    word: str
    templates: list[str]
    control: bool = False

    def __post_init__(self) -> None:
        if not self.templates:
            raise ConfigError("templates is empty; give at least one, such as 'What {rest}'")
        for template in self.templates:
            first = FIRST_WORD.search(template)
            if not first or first[0].lower() != self.word.lower():
                raise ConfigError(f"templates: {template!r} does not open with the word {self.word!r}")
            unknown = set(re.findall(r"{(.*?)}", template)) - {"rest", "question"}
            if unknown or "{" not in template:
                raise ConfigError(f"templates: {template!r}; use {{rest}} or {{question}}, and nothing else in braces")

    @property
    def shots(self) -> int:
        return len(self.templates)

    def __call__(self, sample: Sample) -> list[Sample]:
        first = first_word(sample)
        rest = sample.question[first.end() :].lstrip(" ,:;")

        def fill(template: str) -> str:
            text = template.replace("{rest}", rest).replace("{question}", sample.question)
            return cased(text, first[0])

        return [replace(sample, question=fill(template)) for template in self.templates]


@dataclass(frozen=True)
class File:
    """Rewrites made by others, in the form in which attack files are published: a list of VLGuard records,
    one a rewrite, joined to the set by `id` (never by position) in file order. The first `shots` rows of an
    id are asked. `min_match` is the share of the set's samples that must have them.
    """

    path: str
    shots: int
    min_match: float = 1.0
    control: bool = False

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise ConfigError(f"shots={self.shots}: expected 1 or more")
        if not 0 < self.min_match <= 1:
            raise ConfigError(f"min_match={self.min_match}: expected a share above 0 and at most 1")

    @cached_property
    def rewrites(self) -> dict[str, list[str]]:
        """id -> questions, in file order."""
        found: dict[str, list[str]] = {}
        for identity, question in read_rewrites(Path(self.path)):
            found.setdefault(identity, []).append(question)
        return found

    def __call__(self, sample: Sample) -> list[Sample]:
        questions = self.rewrites.get(sample.id, [])[: self.shots]
        if len(questions) < self.shots:
            return []
        return [replace(sample, question=question) for question in questions]


REGISTRY: dict[str, type] = {"swap": Swap, "templates": Templates, "file": File, "prefill": Prefill}


def make(options: Mapping[str, Any], source: str, key: str) -> Attack:
    """The attack that `options` (`kind` and its fields) describes.

    Raises ConfigError for an unknown kind, field or value.
    """
    kind = options.get("kind")
    if kind not in REGISTRY:
        raise ConfigError(f"{source}: {key}.kind={kind!r}; {nearest(str(kind), list(REGISTRY))}")
    return build(REGISTRY[kind], {k: v for k, v in options.items() if k != "kind"}, source, key)


@dataclass(frozen=True)
class Coverage:
    """How an attack met its set, in samples (asked, without) and in rewrites (unchanged: the sample as it was).

    unknown: ids of an attack file that are not in the set.
    """

    asked: int
    without: list[str]
    unknown: list[str]
    unchanged: int


def apply(attack: Attack, samples: Sequence[Sample], name: str) -> tuple[list[list[Sample]], Coverage]:
    """Every sample's rewrites (a list each, empty where there is none), and what was matched.

    Raises ConfigError when an attack file has rewrites for fewer than `min_match` of the samples.
    """
    rewrites = [attack(sample) for sample in samples]
    without = [s.id for s, rows in zip(samples, rewrites, strict=True) if not rows]
    known = {s.id for s in samples}
    coverage = Coverage(
        asked=len(samples) - len(without),
        without=without,
        unknown=[i for i in attack.rewrites if i not in known] if isinstance(attack, File) else [],
        unchanged=sum(row == s for s, rows in zip(samples, rewrites, strict=True) for row in rows),
    )
    if isinstance(attack, File) and coverage.asked < attack.min_match * len(samples):
        raise ConfigError(
            f"{attack.path}: attack {name!r} has {attack.shots} rewrites for {coverage.asked} of {len(samples)} "
            f"samples; min_match asks for {attack.min_match:.0%}. Without: {_some(without)}. "
            f"In the file but not in the set: {_some(coverage.unknown)}. "
            "Is it the file for this set, and are the ids the same?"
        )
    return rewrites, coverage


def read_rewrites(path: Path) -> Iterable[tuple[str, str]]:
    """(id, question) of each record of a published attack file.

    A plain VLGuard reader would refuse such a file, because its ids repeat. Raises ConfigError naming the
    file, the record number (from 0) and the field.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(records, list) or not records:
        raise ConfigError(f"{path}: expected a list of VLGuard records, one a rewrite")
    for number, record in enumerate(records):
        yield _rewrite(record, f"{path}: record {number}")


def _rewrite(record: Any, where: str) -> tuple[str, str]:
    if not isinstance(record, Mapping) or "id" not in record:
        raise ConfigError(f"{where}: field 'id' is missing")
    if not isinstance(record.get("safe"), bool):
        raise ConfigError(f"{where}: field 'safe' must be true or false, got {record.get('safe')!r}")
    name = "safe_instruction" if record["safe"] else "instruction"
    pairs = record.get("instr-resp")
    for pair in pairs if isinstance(pairs, list) else []:
        if isinstance(pair, Mapping) and isinstance(pair.get(name), str) and pair[name].strip():
            return str(record["id"]), pair[name]
    raise ConfigError(f"{where}: field 'instr-resp' holds no {name!r} with text")


def first_word(sample: Sample) -> re.Match[str]:
    """The first run of word characters of a question; raises ConfigError where there is none."""
    found = FIRST_WORD.search(sample.question)
    if not found:
        raise ConfigError(f"{sample.source}: sample {sample.id!r}: the question has no word: {sample.question!r}")
    return found


def cased(text: str, like: str) -> str:
    """`text` with its first letter in the case of the first letter of `like`."""
    first = text[:1].upper() if like[:1].isupper() else text[:1].lower()
    return first + text[1:]


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(map(repr, ids[:3])) + (", …" if len(ids) > 3 else "")
    return f"{len(ids)} ids" + (f" ({shown})" if ids else "")
