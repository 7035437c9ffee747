"""The base of all attacks, and how an attack is applied to a set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

if TYPE_CHECKING:
    from mirage_dist.data.encoding.collate import Encoder
    from mirage_dist.evals.attacks.journal import Resources
    from mirage_dist.evals.attacks.rewrites import Rewriter

Key = Callable[[Sample], str]  # a hash of everything in a sample, its picture's bytes included


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack, as a recipe describes it: the fields of its dataclass are its options. A subclass has `__call__`.

    control: it changes the wording but brings no trigger word; figures draw it apart from the others.
    shots: K, the number of rewrites of each question. min_match: the fraction of a set that must have rewrites.
    origin: where the rewrites come from, for messages. ids: of the samples that it has rewrites for, where these
    do not depend on the set. draws: how many answers to each changed question are drawn at random, in rounds: one of
    each, then the next; 0: the answers are the likeliest ones. turns: its rewrites are the turns of a conversation, of
    different lengths. with_history: it depends on the answers to earlier turns. spent: gradient steps after which each
    of its rewrites was taken from one search, ascending; empty for rewrites that are no stages of a search. optimised:
    a hash of all that decided its rewrites where these were optimised on a model; "" for all others. begins: its
    rewrites begin the model's answer (`Sample.begun`). targeted: it optimises for how the model's answer begins.
    weights: it needs the weights of the model under test, which an endpoint does not show.
    """

    control: bool = False

    shots = 1
    min_match = 0.0
    origin = ""
    ids: ClassVar[Collection[str]] = ()
    draws = 0
    turns = False
    with_history = False
    spent: ClassVar[tuple[int, ...]] = ()
    optimised = ""
    begins = False
    targeted = False
    weights = False

    def __call__(self, sample: Sample) -> list[Sample]:
        """`shots` rewrites, or none when the attack cannot rewrite this sample."""
        raise NotImplementedError(f"{type(self).__qualname__} does not define __call__")

    def of(self, kind: str) -> Attack:
        """This attack on sets of one kind (unsafe, safe, locality, utility): itself, unless it depends on the kind."""
        return self

    def prepared(self, samples: Sequence[Sample], name: str, rewriter: Rewriter) -> Attack:
        """This attack, ready to be called on these samples; a model may have to generate its rewrites first.

        name: of the set and the attack, in messages and file names. Raises ConfigError, RunError and StopRequested.
        """
        return self


@dataclass(frozen=True)
class Rewritten:
    """The rewrites that were generated for one of the missing samples, or none.

    index: into the missing samples. reason: why there are none. failed: the model could not be reached, so that a
    later attempt may succeed. untried: the model had been given up before. note: more for messages, never for a file.
    search: how the search for them went, for the file.
    """

    index: int
    rewrites: list[str]
    reason: str = ""
    failed: bool = False
    untried: bool = False
    note: str = ""
    search: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Generated(Attack):
    """An attack whose rewrites a model generates before they can be evaluated.

    cache: a folder in which suites share the rewrites; None: the suite's own folder. pinned: whether the hash of
    `identity` is part of the key of each answer (see `Attack.optimised`). surrogate: the model that is loaded to
    generate them in place of the model under test. checks_stop: whether `generate` looks for a stop itself
    (`Resources.check`), because a step may complete several results: none of them is lost to a stop after another.
    """

    cache = None
    pinned = False
    surrogate = None
    checks_stop = False

    def __call__(self, sample: Sample) -> list[Sample]:
        raise ConfigError(f"sample {sample.id!r}: its rewrites have not been generated")

    def prepared(self, samples: Sequence[Sample], name: str, rewriter: Rewriter) -> Attack:
        return rewriter.table(self, samples, name)

    def check(self, samples: Sequence[Sample], name: str, answering: Encoder | None, attacked: Encoder | None) -> None:
        """Raise ConfigError for samples, or a model, that this attack does not suit. Loads no weights.

        answering: the encoder of the model under test; None where no model answers. attacked: that of `surrogate`, or
        of the model under test without one; None behind an endpoint. name: of the set and the attack, for messages.
        """
        return

    def changed(self, sample: Sample, rewrite: str, home: Path) -> Sample:
        """The sample as a rewrite has it: by default its text in place of the question.

        home: the folder in which the attack's files are. Raises RunError when the rewrite is a file that is damaged.
        """
        return replace(sample, question=rewrite)

    def identity(self, samples: Sequence[Sample], key: Key, under_test: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides the rewrites of a sample beside the sample.

        under_test: what the answers of the model under test depend on: hashes of weights and template, settings.
        Raises ConfigError when the model that generates them cannot be used.
        """
        raise NotImplementedError

    def generate(self, missing: Sequence[Sample], resources: Resources) -> Generator[Rewritten, None, None]:
        """Exactly one result for each of the missing samples, in any order, as soon as it exists."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Table(Attack):
    """An attack whose rewrites exist: sample -> its rewrites."""

    rewrites: Mapping[Sample, list[Sample]]
    shots: int = field()
    min_match: float = field()
    origin: str = field()
    spent: tuple[int, ...] = ()
    optimised: str = ""

    def __call__(self, sample: Sample) -> list[Sample]:
        return self.rewrites.get(sample, [])


@dataclass(frozen=True)
class Coverage:
    """For which samples of a set an attack has rewrites.

    covered: the number of samples that have them. without: ids of the others. unknown: ids of an attack file that the
    set does not have. unchanged: the number of rewrites that equal their question.
    """

    covered: int
    without: list[str]
    unknown: list[str]
    unchanged: int


def apply(attack: Attack, samples: Sequence[Sample], name: str) -> tuple[list[list[Sample]], Coverage]:
    """Each sample's rewrites (an empty list where there are none), and which samples have them.

    Raises ConfigError when an attack has rewrites for fewer than `min_match` of the samples, or for none.
    """
    rewrites = [attack(sample) for sample in samples]
    without = [s.id for s, rows in zip(samples, rewrites, strict=True) if not rows]
    known = {s.id for s in samples}
    coverage = Coverage(
        covered=len(samples) - len(without),
        without=without,
        unknown=[i for i in attack.ids if i not in known],
        unchanged=sum(row == s for s, rows in zip(samples, rewrites, strict=True) for row in rows),
    )
    if coverage.covered < attack.min_match * len(samples) or (attack.shots and samples and not coverage.covered):
        raise ConfigError(_too_few(attack, coverage, len(samples), name))
    return rewrites, coverage


def _too_few(attack: Attack, coverage: Coverage, total: int, name: str) -> str:
    if not attack.min_match:
        return f"attack {name!r} has rewrites for none of {total} samples, so that it would measure nothing; remove it"
    message = (
        f"{attack.origin}: attack {name!r} has {attack.shots} rewrites for {coverage.covered} of {total} samples; "
        f"min_match requires {attack.min_match:.0%}. Without: {_some(coverage.without)}"
    )
    if attack.ids:
        message += (
            f". In the file but not in the set: {_some(coverage.unknown)}. Check that the file belongs to this set and "
            "that both use the same ids"
        )
    return message


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(map(repr, ids[:3])) + (", …" if len(ids) > 3 else "")
    return f"{len(ids)} ids" + (f" ({shown})" if ids else "")
