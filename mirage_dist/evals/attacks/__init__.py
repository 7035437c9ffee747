"""Attacks: rewrites of a question that keep its picture and its meaning but not its wording.

An attack is a pure function from a sample to its rewrites, one for each shot. The same functions make the over-prudence
test (a safe question that opens with a word tied to refusals) and the neutral control. A new attack is one file with
one dataclass, and one line in `REGISTRY`, or `module:Class` from outside the package; its fields are its options in the
recipe. docs/attacks.md describes each attack.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        "sampling": "mirage_dist.evals.attacks.sampling:Sampling",
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
        for i, part in enumerate(parts[:-1]):
            if part.draws:
                raise ConfigError(
                    f"{source}: {key}.attacks[{i}]: draws answers, which comes after every change of the question; put "
                    "it last"
                )
        return Chain(parts, control=attack.control)
    return attack if kind is None else attack.of(kind)
