"""Names in recipes to classes: one line a class of ours, `module:Class` for one from outside the package.

A class is imported when a recipe first names it, so that a registry costs nothing and no heavy library loads early.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mirage_dist.config import build, suggestion
from mirage_dist.schema import ConfigError


class Registry(Mapping[str, str]):
    """The classes of one kind: name -> "module:Class".

    kind: the singular noun for error messages. key: the option that names the class in a recipe's mapping.
    base: the class that all of them derive from, where there is one.
    """

    def __init__(self, kind: str, key: str, entries: Mapping[str, str], base: type | None = None) -> None:
        self.kind, self.key, self.entries, self.base = kind, key, dict(entries), base

    def __getitem__(self, name: str) -> str:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def load(self, name: object, source: str, where: str) -> type:
        """The class that a recipe names, one of ours or `module:Class` on the Python path or in the working directory.

        source, where: the recipe and the dotted key of the name, for errors. Raises ConfigError for an unknown name,
        listing all names, for a module or class that cannot be imported, and for a class not derived from `base`.
        """
        path = self.entries.get(str(name), str(name))
        module, colon, attribute = path.partition(":")
        if not (module and colon and attribute):
            raise ConfigError(f"{source}: {where}={name!r}: unknown {self.kind}; {self._names(str(name))}")
        if path not in self.entries.values() and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # as for `python -m`: a lab's own file lies in the working directory
        try:
            loaded = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # the file is the user's: whatever its import raises is reported as what it is
            raise ConfigError(
                f"{source}: {where}={name!r}: cannot be imported ({type(error).__name__}: {error}); expected "
                f"module:Class on the Python path or in {os.getcwd()}"
            ) from error
        if not isinstance(loaded, type):
            raise ConfigError(f"{source}: {where}={name!r}: {attribute} is not a class; expected module:Class")
        if self.base is not None and not issubclass(loaded, self.base):
            base = f"{self.base.__module__}.{self.base.__qualname__}"
            raise ConfigError(f"{source}: {where}={name!r}: {attribute} is no {self.kind}; derive it from {base}")
        return loaded

    def make(self, options: Mapping[str, Any], source: str, where: str) -> Any:
        """The object that `options` describes: the name under `key`, and the fields of that class's dataclass.

        Raises ConfigError for an unknown name, field or value.
        """
        cls = self.load(options.get(self.key), source, f"{where}.{self.key}")
        return build(cls, {name: value for name, value in options.items() if name != self.key}, source, where)

    def _names(self, name: str) -> str:
        listed = f"one of {', '.join(self.entries)}, or module:Class"
        close = suggestion(name, list(self.entries), cutoff=0.75)
        return f"{close} Expected {listed}" if close else f"expected {listed}"
