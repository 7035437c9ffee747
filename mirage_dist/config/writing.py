"""Resolved recipes as plain containers, as YAML that reads back, as overrides, and as hashes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mirage_dist import disk


def to_dict(config: Any) -> dict[str, Any]:
    """The recipe as plain containers, defaults filled in."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved recipe as YAML; `load` reads it back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(literal(to_dict(config))))


def override(key: str, value: Any) -> str:
    """`key=value` as the command line takes it, quoted so that `load` reads exactly this value."""
    return f"{key}={_flow(literal(value))}"


def literal(value: Any) -> Any:
    """Containers and scalars with every `${` in their texts escaped, which OmegaConf would otherwise interpolate."""
    if isinstance(value, Mapping):
        return {name: literal(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [literal(part) for part in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def with_paths_as_text(value: Any) -> Any:
    """Containers and scalars with every path as text, as a recipe has it."""
    if isinstance(value, Mapping):
        return {name: with_paths_as_text(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [with_paths_as_text(part) for part in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _flow(value: Any) -> str:
    """JSON that YAML 1.1 reads alike: its escapes of characters beyond 16 bits differ."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in text)


def write_yaml(config: Any, path: Path) -> None:
    """Write `to_yaml(config)`."""
    path.write_text(to_yaml(config))


def config_hash(config: Any, ignore: Sequence[str] = ()) -> str:
    """SHA-256 of the resolved recipe without the dotted keys in `ignore`: equal recipes, equal hashes."""
    tree = to_dict(config) if dataclasses.is_dataclass(config) else json.loads(json.dumps(config))
    for dotted in ignore:
        *parents, last = dotted.split(".")
        node: Any = tree
        for parent in parents:
            node = (node or {}).get(parent)
        if node:
            node.pop(last, None)
    return disk.digest(tree)


def differences(mine: Any, other: Any, key: str = "") -> list[str]:
    """The dotted keys in which two resolved recipes differ, as `key: mine, other` lines; absent is null."""
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        names = sorted(set(mine) | set(other))
        return [d for n in names for d in differences(mine.get(n), other.get(n), f"{key}.{n}" if key else str(n))]
    if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
        return [d for i, (a, b) in enumerate(zip(mine, other, strict=True)) for d in differences(a, b, f"{key}[{i}]")]
    return [] if mine == other else [f"{key}: {mine!r} here, {other!r} there"]
