"""Defences: wrappers of a model under test that are to make it safer without changing its weights.

An evaluation answers every question without a defence and again with each one that the recipe names, so that each has
its own price and effect on the same questions. Attacks are composed outside: a defence sees the question as the attack
has left it. A new defence is one file with one dataclass, and one line in `REGISTRY`, or `module:Class` from outside
the package; its fields are its options in the recipe. docs/defences.md describes each defence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mirage_dist import config as configs
from mirage_dist.evals.defences.base import Defence
from mirage_dist.registry import Registry
from mirage_dist.schema import ConfigError, EvalRecipe

__all__ = ["NONE", "REGISTRY", "Defence", "make", "read"]

NONE = "none"  # what reports call an evaluation without a defence

REGISTRY = Registry(
    "defence",
    "kind",
    {
        "system_prompt": "mirage_dist.evals.defences.system_prompt:SystemPrompt",
        "self_reminder": "mirage_dist.evals.defences.self_reminder:SelfReminder",
        "output_filter": "mirage_dist.evals.defences.output_filter:OutputFilter",
    },
    base=Defence,
)


def make(options: Mapping[str, Any], source: str, key: str) -> Defence:
    """The defence that `options` (`kind` and its fields) describes. Raises ConfigError for what is unknown or wrong."""
    defence: Defence = REGISTRY.make(options, source, key)
    return defence.whole(source, key)


def read(recipe: EvalRecipe) -> dict[str, Defence]:
    """The recipe's defences by name, as it describes them; opens no file.

    Raises ConfigError as `make`, for two names that differ in case alone, for one defence under two names, and where
    the model is defended already by `template.defence`.
    """
    made: dict[str, Defence] = {}
    names: dict[str, str] = {}
    for name, options in recipe.defences.items():
        if name.lower() == NONE:
            raise ConfigError(f"defences.{name}: reports call an evaluation without a defence so; choose another name")
        if other := names.get(name.lower()):
            raise ConfigError(f"defences.{other}, defences.{name}: some file systems take them for one; rename one")
        made[name], names[name.lower()] = make(options, "the recipe", f"defences.{name}"), name
        if twice := next((other for other, own in made.items() if other != name and own == made[name]), None):
            raise ConfigError(f"defences.{twice} and defences.{name} are the same defence; remove one")
    if made and recipe.template.defence is not None:
        raise ConfigError(
            f"template.defence={recipe.template.defence!r}: with `defences` every question is also asked without one; "
            f"write this one as defences.{recipe.template.defence}: {{kind: system_prompt, text: …}}, and leave it out "
            "of the template"
        )
    return made


def info(recipe: EvalRecipe, name: str, defence: Defence) -> dict[str, Any]:
    """What decides a defended answer beside the question as it is sent and the template (see `Defence.decided_by`).

    defence: ready for the recipe.
    """
    made = {"name": name, **defence.decided_by(configs.to_dict(recipe)["defences"][name])}
    return made if defence.guard is None else {**made, "guard": defence.guard.fingerprint}
