"""Attacks: rewrites of a question that keep its meaning but not its wording, its picture, or how it is answered.

An attack is a pure function from a sample to its rewrites, one for each shot. The same functions make the over-prudence
test (a safe question that opens with a word tied to refusals) and the neutral control. A new attack is one file with
one dataclass, and one line in `REGISTRY`, or `module:Class` from outside the package; its fields are its options in the
recipe. docs/attacks.md describes each attack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mirage_dist.evals.attacks.base import Attack, Coverage, apply
from mirage_dist.evals.attacks.combine import Chain, Combine
from mirage_dist.registry import Registry
from mirage_dist.schema import ConfigError

__all__ = ["REGISTRY", "Attack", "Coverage", "apply", "make"]

REGISTRY = Registry(
    "attack",
    "kind",
    {
        "swap": "mirage_dist.evals.attacks.words:Swap",
        "words": "mirage_dist.evals.attacks.words:Words",
        "templates": "mirage_dist.evals.attacks.templates:Templates",
        "prefix": "mirage_dist.evals.attacks.templates:Prefix",
        "file": "mirage_dist.evals.attacks.file:File",
        "prefill": "mirage_dist.evals.attacks.prefill:Prefill",
        "rewrite": "mirage_dist.evals.attacks.rewrite:Rewrite",
        "suffix": "mirage_dist.evals.attacks.suffix:Suffix",
        "typographic": "mirage_dist.evals.attacks.pictured.typographic:Typographic",
        "pgd": "mirage_dist.evals.attacks.pixels.pgd:Pgd",
        "universal": "mirage_dist.evals.attacks.pixels.universal:Universal",
        "noise": "mirage_dist.evals.attacks.pixels.noise:Noise",
        "sampling": "mirage_dist.evals.attacks.sampling:Sampling",
        "transcript": "mirage_dist.evals.attacks.turns.transcript:Transcript",
        "combine": "mirage_dist.evals.attacks.combine:Combine",
    },
    base=Attack,
)


def make(options: Mapping[str, Any], source: str, key: str, kind: str | None = None) -> Attack:
    """The attack that `options` (`kind` and its fields) describes, for sets of `kind` where one is given.

    Raises ConfigError for an unknown kind of attack, field or value.
    """
    attack: Attack = REGISTRY.make(options, source, key)
    if isinstance(attack, Combine):
        parts = [make(part, source, f"{key}.attacks[{i}]", kind) for i, part in enumerate(attack.attacks)]
        _check_order(parts, f"{source}: {key}", kind is not None)
        return Chain(parts, control=attack.control)
    return attack if kind is None else attack.of(kind)


def _check_order(parts: Sequence[Attack], where: str, ready: bool) -> None:
    """Raise ConfigError for parts that cannot follow one another. ready: whether the parts know their shots."""
    for i, part in enumerate(parts):
        here = f"{where}.attacks[{i}]"
        if part.draws and i < len(parts) - 1:
            raise ConfigError(f"{here}: draws answers, which comes after every change of the question; put it last")
        if part.turns and i > 0:
            raise ConfigError(f"{here}: takes its questions from a file, whatever came before; put it first")
        if part.targeted and any(before.begins for before in parts[:i]):
            raise ConfigError(
                f"{here}: optimises for the first tokens of an answer, and a part before it (prefill) has begun the "
                "answer; put prefill after it, or leave one of the two out"
            )
        if not parts[0].turns or i == 0:
            continue
        if part.draws or part.with_history:
            raise ConfigError(
                f"{here}: needs the answers to earlier turns, which do not exist yet; combine conversations with "
                "rewrites of their last question only"
            )
        if ready and part.shots != 1:
            raise ConfigError(f"{here}: K = {part.shots}; the last turn of a conversation has one rewrite")
