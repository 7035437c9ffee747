"""Attacks: rewrites of a question that keep its picture and its meaning but not its wording.

An attack is a pure function from a sample to its rewrites, one a shot. The same functions make the
over-prudence test (a safe question opened with a word tied to refusals) and the neutral control. A new
attack is one file with one dataclass, and one line in `REGISTRY`; its fields are its options in the recipe.
docs/attacks.md says what each of them does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mirage_dist.config import build, nearest
from mirage_dist.evals.attacks.base import Attack, ByKind, Coverage, apply
from mirage_dist.evals.attacks.combine import Combine
from mirage_dist.evals.attacks.file import File
from mirage_dist.evals.attacks.prefill import Prefill
from mirage_dist.evals.attacks.prefix import Prefix
from mirage_dist.evals.attacks.rewrite import Rewrite
from mirage_dist.evals.attacks.suffix import Suffix
from mirage_dist.evals.attacks.swap import Swap
from mirage_dist.evals.attacks.templates import Templates
from mirage_dist.evals.attacks.words import Words
from mirage_dist.schema import ConfigError

__all__ = ["REGISTRY", "Attack", "Combine", "Coverage", "apply", "make"]

REGISTRY: dict[str, type] = {
    "swap": Swap,
    "words": Words,
    "templates": Templates,
    "prefix": Prefix,
    "file": File,
    "prefill": Prefill,
    "rewrite": Rewrite,
    "suffix": Suffix,
    "combine": Combine,
}


def make(options: Mapping[str, Any], source: str, key: str, kind: str | None = None) -> Attack:
    """The attack that `options` (`kind` and its fields) describes, on a set of `kind` where one is given.

    Raises ConfigError for an unknown kind of attack, field or value.
    """
    name = options.get("kind")
    if name not in REGISTRY:
        raise ConfigError(f"{source}: {key}.kind={name!r}; {nearest(str(name), list(REGISTRY))}")
    attack = build(REGISTRY[name], {k: v for k, v in options.items() if k != "kind"}, source, key)
    if isinstance(attack, Combine):
        parts = [make(part, source, f"{key}.attacks[{i}]", kind) for i, part in enumerate(attack.attacks)]
        return attack.with_parts(parts)
    return attack.of(kind) if kind is not None and isinstance(attack, ByKind) else attack
