"""What an attack is, and how it is put to a set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from mirage_dist.data.sample import Sample
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


@runtime_checkable
class ByKind(Protocol):
    """An attack that is another one on another kind of set."""

    def of(self, kind: str) -> Attack:
        """What it is on a set of this kind (unsafe, safe, locality)."""
        ...


@runtime_checkable
class Joined(Protocol):
    """An attack with rewrites for some samples only. min_match: the share of a set that must have them; origin: where
    they are from, for messages; ids: of the samples that it has rewrites for, empty where these are the set's own.
    """

    @property
    def min_match(self) -> float: ...
    @property
    def origin(self) -> str: ...
    @property
    def ids(self) -> Collection[str]: ...


@dataclass(frozen=True)
class Made:
    """What was made for one of the samples that were missing: its rewrites, or none and why.

    failed: nobody could be asked, which may go better another time.
    """

    index: int
    rewrites: list[str]
    why: str = ""
    failed: bool = False


Key = Callable[[Sample], str]  # a hash of all that a sample is


class Bench(Protocol):
    """What is there for making rewrites (see `evals.rewrites`). samples: all that the attack is put to."""

    @property
    def samples(self) -> Sequence[Sample]: ...
    @property
    def key(self) -> Key: ...

    def generator(self) -> Any:
        """The model under test (`evals.generate.Generator`), loaded when first asked for."""
        ...

    def noted(self, name: str) -> dict[str, Any] | None:
        """What was noted last under this name, also by a process that was killed."""
        ...

    def note(self, name: str, state: Mapping[str, Any], tell: bool) -> None:
        """Keep a search's "step" of "steps", its "loss" and whatever else it goes on from; tell of it now and then."""
        ...


@runtime_checkable
class Prepared(Protocol):
    """An attack whose rewrites a model has to make before they can be asked. cache: a folder that suites share."""

    @property
    def min_match(self) -> float: ...
    @property
    def control(self) -> bool: ...
    @property
    def shots(self) -> int: ...
    @property
    def cache(self) -> str | None: ...
    @property
    def origin(self) -> str: ...

    def identity(self, samples: Sequence[Sample], key: Key, under_test: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides the rewrites of a sample beside the sample. Raises ConfigError where nobody can be asked.

        under_test: of the model under test, what its answers depend on: hashes of weights and template, settings.
        """
        ...

    def make(self, missing: Sequence[Sample], bench: Bench) -> Generator[Made, None, None]:
        """Of each of these once, in any order, as it is made."""
        ...


@dataclass(frozen=True)
class Table:
    """An attack whose rewrites are made: (id, question) -> rewrites."""

    rewrites: Mapping[tuple[str, str], list[str]]
    shots: int
    control: bool
    min_match: float
    origin: str
    ids: Collection[str] = ()

    def __call__(self, sample: Sample) -> list[Sample]:
        return [replace(sample, question=text) for text in self.rewrites.get((sample.id, sample.question), [])]


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

    Raises ConfigError when an attack has rewrites for fewer than `min_match` of the samples.
    """
    rewrites = [attack(sample) for sample in samples]
    without = [s.id for s, rows in zip(samples, rewrites, strict=True) if not rows]
    known = {s.id for s in samples}
    coverage = Coverage(
        asked=len(samples) - len(without),
        without=without,
        unknown=[i for i in attack.ids if i not in known] if isinstance(attack, Joined) else [],
        unchanged=sum(row == s for s, rows in zip(samples, rewrites, strict=True) for row in rows),
    )
    if isinstance(attack, Joined) and coverage.asked < attack.min_match * len(samples):
        _too_little(attack, attack.shots, coverage, len(samples), name)
    return rewrites, coverage


def _too_little(attack: Joined, shots: int, coverage: Coverage, total: int, name: str) -> None:
    told = (
        f"{attack.origin}: attack {name!r} has {shots} rewrites for {coverage.asked} of {total} samples; min_match "
        f"asks for {attack.min_match:.0%}. Without: {_some(coverage.without)}"
    )
    if attack.ids:
        told += (
            f". In the file but not in the set: {_some(coverage.unknown)}. Is it the file for this set, and are the "
            "ids the same?"
        )
    raise ConfigError(told)


def check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{name}={value}: expected a share above 0 and at most 1")


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(map(repr, ids[:3])) + (", …" if len(ids) > 3 else "")
    return f"{len(ids)} ids" + (f" ({shown})" if ids else "")
