"""Distributed safety fine-tuning and unlearning of vision-language models, and attacks on the result.

From Python: `train`, `evaluate`, `report` and `audit` (see `api`), imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirage_dist.api import audit as audit
    from mirage_dist.api import evaluate as evaluate
    from mirage_dist.api import report as report
    from mirage_dist.api import train as train

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name in ("audit", "evaluate"):
        return getattr(import_module("mirage_dist.api"), name)
    if name in ("report", "train"):  # packages, see `Verb`
        return import_module(f"mirage_dist.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Verb(ModuleType):
    """A package that has the name of a function of `api`, and can be called as that function.

    `mirage_dist.train` is the package as soon as anything has imported it; so it is both, whatever came first.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function()(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(self._function())

    def _function(self) -> Any:
        return getattr(import_module("mirage_dist.api"), self.__name__.rpartition(".")[2])
