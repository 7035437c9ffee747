"""Which mappings of a recipe describe an object of a class that the recipe chooses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """Marks a mapping in a schema: `typing.Annotated[dict[str, Any], Choice("name")]`.

    The entry under `key` names a class (see `registry.Registry`), the other entries are that class's options. Choosing
    another class on the command line therefore replaces the options as a whole.
    """

    key: str
