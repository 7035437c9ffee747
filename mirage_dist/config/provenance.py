"""Where each value of a resolved recipe comes from: a line of a file, an include, an override, or the default."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mirage_dist import config as configs
from mirage_dist.schema.documents import LOADER

DEFAULT = "default"
Key = tuple[str, ...]  # keys and list positions


@dataclass(frozen=True)
class Value:
    """One value of a resolved recipe: its dotted key, the value, and where it comes from."""

    key: str
    value: Any
    origin: str


def values(path: str | Path, overrides: Sequence[str]) -> list[Value]:
    """The values of a resolved recipe in the order of its schema; a list or a mapping has a line of its own if empty.

    origin: `FILE:LINE`, with ` (include)` where another file includes that one, and the text as written where it is an
    interpolation; `override`; or `default`. Raises ConfigError as `config.load` does.
    """
    schema = configs.schema_of(path)
    recipe = configs.load(path, overrides, schema)
    files: list[Path] = []
    tree, source = configs.merged(path, overrides, schema, files)
    own = configs.find(path)
    layers = [_lines(file, "" if file == own else f" ({configs.INCLUDE})") for file in files]
    others = [o for o in overrides if not o.startswith(f"{configs.INCLUDE}=")]
    layers += [_override(override) for override in others]
    plain = dict(_leaves(configs.resolved(tree, others, schema, source)))
    return [Value(_dotted(key), value, _origin(key, plain, layers)) for key, value in _leaves(configs.to_dict(recipe))]


def text(lines: Sequence[Value]) -> str:
    """A line a value: `key=value` as an override takes it, and where it comes from."""
    written = [configs.override(line.key, line.value) for line in lines]
    width = max((len(one) for one in written if len(one) <= 60), default=0)
    return "".join(f"{one:<{width}}  # {line.origin}\n" for one, line in zip(written, lines, strict=True))


def _origin(key: Key, plain: Mapping[Key, Any], layers: Sequence[Mapping[Key, str]]) -> str:
    """That of the last layer that has the key, if no later one has taken it away.

    What is written may stand for more: a word for a mapping, and one entry for a list of it.
    """
    for beginning in (key[:length] for length in range(len(key), 0, -1)):
        optional = [(part,) if part != "0" else (part, None) for part in beginning]
        for form in itertools.product(*optional):
            written = tuple(part for part in form if part is not None)
            if written in plain:
                return next((layer[written] for layer in reversed(layers) if written in layer), DEFAULT)
    return DEFAULT


def _leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    if parts and len(value):
        for name, part in parts:
            yield from _leaves(part, (*key, str(name)))
    else:
        yield key, value


def _override(override: str) -> dict[Key, str]:
    dotted, value = configs.item(override)
    start = tuple(re.findall(r"[^.\[\]]+", dotted))
    return {(*start, *key): "override" for key, _ in _leaves(value)}


def _lines(file: Path, suffix: str) -> dict[Key, str]:
    """The values of one YAML file, which `config.merged` has read, with their places in it."""
    root = yaml.compose(configs.text_of(file), Loader=LOADER)
    return {key: f"{file}:{line}{suffix}{written}" for key, line, written in _nodes(root, ())}


def _nodes(node: yaml.Node | None, key: Key) -> Iterator[tuple[Key, int, str]]:
    """Key, line, and an interpolation's text, of each value; a key's own wins over what `<<` merges, by its place."""
    if isinstance(node, yaml.MappingNode) and node.value:
        for name, part in sorted(node.value, key=lambda pair: pair[0].tag != "tag:yaml.org,2002:merge"):
            if name.tag == "tag:yaml.org,2002:merge":
                for base in part.value if isinstance(part, yaml.SequenceNode) else [part]:
                    yield from _nodes(base, key)
            else:
                yield from _nodes(part, (*key, str(name.value)))
    elif isinstance(node, yaml.SequenceNode) and node.value:
        for number, part in enumerate(node.value):
            yield from _nodes(part, (*key, str(number)))
    elif node is not None:
        text = node.value if isinstance(node, yaml.ScalarNode) and "${" in node.value else ""
        yield key, node.start_mark.line + 1, f", as {' '.join(text.split())}" if text else ""


def _dotted(key: Key) -> str:
    return "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in key).removeprefix(".")
