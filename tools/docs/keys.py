"""Every key that a recipe may have, from the dataclasses that describe it: type, default and meaning.

A key's meaning is what its class says of it: the item "name: …" of the class's docstring, and the comment at the field,
behind it or on the lines before it. A field without a meaning is an error: see `without_meaning`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from mirage_dist.schema import limits
from tools.docs.sources import Class, Module, named, resolve

REQUIRED = object()  # the default of a key that has none
OWN = object()  # the default of a mapping that has the defaults of its own keys


@dataclass(frozen=True)
class Key:
    """One field of a dataclass that a recipe may set.

    owner: the class that declares it, whose module's names the annotation uses. default: a value of YAML, REQUIRED or
    OWN. meaning: Markdown in one line; empty where the source says nothing.
    """

    name: str
    owner: Class
    annotation: ast.expr
    default: Any
    meaning: str

    @property
    def shown_default(self) -> str:
        """Markdown."""
        if self.default is REQUIRED:
            return "*required*"
        if self.default is OWN:
            return "*its own defaults*"
        text = "null" if self.default is None else json.dumps(self.default, ensure_ascii=False)
        return f"`{text.replace('|', chr(92) + '|')}`"


@cache
def keys(cls: Class) -> tuple[Key, ...]:
    """The keys of a dataclass in the order of its fields, those of its bases first."""
    fields: dict[str, Key] = {}
    for base in reversed(cls.bases):
        fields |= {key.name: key for key in keys(base)}
    for key in _declared(cls):
        older = fields.get(key.name)
        fields[key.name] = replace(key, meaning=key.meaning or (older.meaning if older else ""))
    for name, text in _items(cls.docstring, list(fields)).items():
        comment = _comment(cls, fields[name]) if fields[name].owner == cls else ""
        fields[name] = replace(fields[name], meaning=_joined(text, comment))
    return tuple(key if key.meaning else replace(key, meaning=_of_class(key)) for key in fields.values())


def without_meaning(classes: list[Class]) -> list[str]:
    """The keys of these classes of which the source says nothing, as `module.Class.key`."""
    names = [
        f"{key.owner.module.name}.{key.owner.name}.{key.name}"
        for cls in classes
        for key in keys(cls)
        if len(key.meaning) < 4
    ]
    return sorted({*names})


def inner(cls: Class) -> list[tuple[Key, Class]]:
    """The dataclasses that the keys of a class lead to, with those keys."""
    return [(key, target) for key in keys(cls) for target in _targets(key)]


def within(root: Class) -> dict[Class, list[str]]:
    """Each dataclass of a recipe with the dotted places where it stands, the recipe itself first."""
    places: dict[Class, list[str]] = {}

    def walk(cls: Class, place: str) -> None:
        places.setdefault(cls, []).append(place)
        for key, target in inner(cls):
            walk(target, f"{place}.{key.name}{_entry(key)}".lstrip("."))

    walk(root, "")
    return places


def recipes() -> dict[str, Class]:
    """The recipe of each verb that has one."""
    return {
        "train": named("mirage_dist.schema.training:TrainRecipe"),
        "eval": named("mirage_dist.schema.evaluation:EvalRecipe"),
        "prepare": named("mirage_dist.schema.data:PrepareRecipe"),
        "paper": named("mirage_dist.paper.recipe:PaperRecipe"),
        "sweep": named("mirage_dist.sweep.recipe:SweepRecipe"),
    }


def _targets(key: Key) -> list[Class]:
    names = [node.id for node in ast.walk(key.annotation) if isinstance(node, ast.Name) and node.id != "Choice"]
    classes = [resolve(key.owner.module, name) for name in names]
    return [cls for cls in classes if isinstance(cls, Class) and cls.node.decorator_list]


def _of_class(key: Key) -> str:
    """What the class that a key leads to says of itself, in one sentence."""
    return next((_line(re.split(r"(?<=\w{2}\.)\s", cls.summary)[0]) for cls in _targets(key)), "")


def _entry(key: Key) -> str:
    """How an entry of a list or mapping is addressed."""
    text, places = ast.unparse(key.annotation), ""
    while match := re.match(r"(list|dict)\[", text):
        places += "[0]" if match[1] == "list" else f".{key.name.rstrip('s').upper()}"
        text = text[match.end() :] if match[1] == "list" else text[match.end() :].partition(", ")[2]
    return places


def _declared(cls: Class) -> Iterator[Key]:
    for node in cls.node.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(node.annotation) or _keyword(node.value, "init") is False:
            continue
        key = Key(node.target.id, cls, node.annotation, _default(node.value, cls.module), "")
        yield replace(key, meaning=_comment(cls, key))


def _default(value: ast.expr | None, where: Module) -> Any:
    if value is None:
        return REQUIRED
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "field"):
        return _value(value, where)
    if (factory := _keyword(value, "default_factory", evaluated=False)) is not None:
        if isinstance(factory, ast.Lambda):
            return _value(factory.body, where)
        return {"list": [], "dict": {}}.get(ast.unparse(factory), OWN)
    default = _keyword(value, "default", evaluated=False)
    return REQUIRED if default is None else _value(default, where)


def _value(node: ast.expr, where: Module) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Attribute) and node.attr == "value":  # of a limit
        return getattr(limits, ast.unparse(node.value)).value
    constant = resolve(where, ast.unparse(node))
    assert isinstance(constant, ast.expr), f"{where.name}: the default {ast.unparse(node)} is no constant"
    return _value(constant, where)


def _keyword(value: ast.expr | None, name: str, evaluated: bool = True) -> Any:
    """An argument of `field(…)`."""
    for argument in value.keywords if isinstance(value, ast.Call) else ():
        if argument.arg == name:
            return ast.literal_eval(argument.value) if evaluated else argument.value
    return None


def _comment(cls: Class, key: Key) -> str:
    """The comment at a field: behind it, else the lines of comment right before it."""
    node = next(n for n in cls.node.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == key.name)
    comments = cls.module.comments
    behind = [comments[n][0] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
    if behind:
        return _line(" ".join(behind))
    above, number = [], node.lineno - 1
    while number in comments and comments[number][1]:
        above.insert(0, comments[number][0])
        number -= 1
    return _line(" ".join(above))


def _items(docstring: str, names: list[str]) -> dict[str, str]:
    """What a docstring says of names, in items "name: …" or "name, other: …" that begin a line or a sentence."""
    if not names:
        return {}
    one = f"(?:{'|'.join(map(re.escape, names))})\\b(?: \\([^()]*\\))?"
    start = re.compile(rf"(?:^|(?<=[.;)] ))({one}(?:, {one})*): ")
    other = re.compile(r"(?:^|(?<=\. ))(?!default)[a-z_]+(?:, [a-z_]+)*: ")  # an item about what is no key
    meanings: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", docstring):
        text = " ".join(line.strip() for line in paragraph.splitlines())
        items = list(start.finditer(text))
        ends = sorted({*(match.start() for match in [*items, *other.finditer(text)]), len(text)})
        for match in items:
            end = next(place for place in ends if place > match.start())
            for item in re.finditer(one, match[1]):
                name, _, aside = item[0].partition(" (")
                meaning = _line(text[match.end() : end])
                meanings[name] = f"{aside[:-1]}; {meaning}" if aside else meaning
    return meanings


def _joined(text: str, comment: str) -> str:
    return f"{text}; {comment}" if comment and comment not in text else text


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(" .;")
