"""Mappings of a recipe that describe an object of a class: another class replaces the options of the former one."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from omegaconf import OmegaConf

from mirage_dist.schema.documents import whole_number


@dataclass(frozen=True)
class Choice:
    """Marks a mapping in a schema: `typing.Annotated[dict[str, Any], Choice("name")]`, or a dataclass as its `choice`.

    The entry under `key` names a class (see `registry.Registry`), the other entries are that class's options. Choosing
    another class therefore replaces the options as a whole; only those in `shared`, which every class has, stay. The
    same holds for mappings within the options that name a class under the same key.
    """

    key: str
    shared: tuple[str, ...] = ()


def choose(schema: Any, tree: Any, dotted: str, value: Any) -> None:
    """Remove the options from the mapping of `tree` whose class an override `dotted`=`value` changes.

    A mapping that names its class replaces the one in the recipe as a whole, too.
    """
    parts = _parts(dotted)
    for place, choice in _along(schema, tree, parts):
        old = _select(tree, place)
        if isinstance(old, str) and len(parts) > len(place):  # a bare word stands for the class without options
            old = OmegaConf.create({choice.key: old})
            _put(tree, place, old)
        if not OmegaConf.is_dict(old):
            continue
        if parts == (*place, choice.key):
            if value != _select(old, [choice.key]):
                _put(tree, place, _shared(old, choice))
        elif parts == place and isinstance(value, Mapping) and choice.key in value:
            _put(tree, place, {})


def replaced(schema: Any, below: Any, above: Any) -> None:
    """Remove the options from the mappings of `below` for which `above`, to be merged over it, names another class."""
    for place, choice in _within(schema, above):
        old, name = _select(below, place), _select(above, (*place, choice.key))
        if OmegaConf.is_dict(old) and name is not None and name != _select(old, [choice.key]):
            _put(below, place, _shared(old, choice))


def _shared(old: Any, choice: Choice) -> Any:
    """A mapping's entries that every class has, unresolved."""
    return OmegaConf.masked_copy(old, [name for name in choice.shared if name in old])


def _parts(dotted: str) -> tuple[str, ...]:
    """The keys and list positions of a dotted key: `a.b[0].c` and `a.b.0.c` alike."""
    return tuple(re.findall(r"[^.\[\]]+", dotted))


def _select(tree: Any, place: Sequence[str]) -> Any:
    """The node at a place; None where there is none, or an interpolation, whose value may not be known yet."""
    for part in place:
        key: Any = whole_number(part) if OmegaConf.is_list(tree) else part
        if OmegaConf.is_list(tree) and not (isinstance(key, int) and key < len(tree)):
            return None
        if not OmegaConf.is_config(tree) or (OmegaConf.is_dict(tree) and key not in tree):
            return None
        if OmegaConf.is_interpolation(tree, key):
            return None
        tree = tree[key]
    return tree


def _put(tree: Any, place: Sequence[str], value: Any) -> None:
    OmegaConf.update(tree, ".".join(place), value, merge=False)


def _along(
    schema: Any, tree: Any, parts: Sequence[str], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Choice]]:
    """The mappings marked as a `Choice` on the way from `schema` along `parts`, outermost first, with their places."""
    choice, schema = _mark(schema)
    # A single mapping may stand for a list of one.
    if typing.get_origin(schema) is list and OmegaConf.is_dict(_select(tree, place)):
        choice, schema = _mark(typing.get_args(schema)[0])
    if choice is not None:
        yield place, choice
    if parts and (inner := _inner(schema, parts[0], choice)) is not None:
        yield from _along(inner, tree, parts[1:], (*place, parts[0]))


def _within(schema: Any, tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Choice]]:
    """The mappings of `tree` that are marked as a `Choice`, each with its place; those in lists are left out."""
    choice, schema = _mark(schema)
    node = _select(tree, place)
    if not OmegaConf.is_dict(node):
        return
    if choice is not None:
        yield place, choice
    for name in node:
        if (inner := _inner(schema, str(name), choice)) is not None:
            yield from _within(inner, tree, (*place, str(name)))


def _mark(schema: Any) -> tuple[Choice | None, Any]:
    """The mark of a type, if it has one, and the type without its mark and without `| None`."""
    choice = None
    while True:
        if typing.get_origin(schema) is Annotated:
            schema, *marks = typing.get_args(schema)
            choice = next((mark for mark in marks if isinstance(mark, Choice)), choice)
        elif typing.get_origin(schema) in (typing.Union, types.UnionType):
            schema = next(a for a in typing.get_args(schema) if a is not type(None))
        else:
            own = getattr(schema, "choice", None)
            return own if isinstance(own, Choice) else choice, schema


def _inner(schema: Any, part: str, choice: Choice | None) -> Any:
    """The type of what lies under `part`; None where the schema does not say."""
    if choice is not None and not dataclasses.is_dataclass(schema):
        return Annotated[Any, choice]
    if dataclasses.is_dataclass(schema):
        return typing.get_type_hints(schema, include_extras=True).get(part)
    if typing.get_origin(schema) is dict:
        return typing.get_args(schema)[1]
    return typing.get_args(schema)[0] if typing.get_origin(schema) is list else None
