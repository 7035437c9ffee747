"""Attacks: rewrites of a question that keep its picture and its meaning but not its wording.

An attack is a pure function from a sample to its rewrites, one a shot. The same functions make the
over-prudence test (a safe question opened with a word tied to refusals) and the neutral control. A new
attack is one file with one dataclass, and one line in `REGISTRY`; its fields are its options in the recipe.
docs/attacks.md says what each of them does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mirage_dist.evals.attacks.base import Attack, ByKind, Coverage, apply
from mirage_dist.evals.attacks.combine import Combine
from mirage_dist.registry import Registry

__all__ = ["REGISTRY", "Attack", "Combine", "Coverage", "apply", "make"]

REGISTRY = Registry(
    "attack",
    "kind",
    {
        "swap": "mirage_dist.evals.attacks.swap:Swap",
        "words": "mirage_dist.evals.attacks.words:Words",
        "templates": "mirage_dist.evals.attacks.templates:Templates",
        "prefix": "mirage_dist.evals.attacks.prefix:Prefix",
        "file": "mirage_dist.evals.attacks.file:File",
        "prefill": "mirage_dist.evals.attacks.prefill:Prefill",
        "rewrite": "mirage_dist.evals.attacks.rewrite:Rewrite",
        "suffix": "mirage_dist.evals.attacks.suffix:Suffix",
        "combine": "mirage_dist.evals.attacks.combine:Combine",
    },
)


def make(options: Mapping[str, Any], source: str, key: str, kind: str | None = None) -> Attack:
    """The attack that `options` (`kind` and its fields) describes, on a set of `kind` where one is given.

    Raises ConfigError for an unknown kind of attack, field or value.
    """
    attack = REGISTRY.make(options, source, key)
    if isinstance(attack, Combine):
        parts = [make(part, source, f"{key}.attacks[{i}]", kind) for i, part in enumerate(attack.attacks)]
        return attack.with_parts(parts)
    return attack.of(kind) if kind is not None and isinstance(attack, ByKind) else attack
