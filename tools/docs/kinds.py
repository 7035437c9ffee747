"""Types of a recipe's keys in words: ranges and allowed values, from the annotations and the checks behind them."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable
from typing import Annotated, Any

from mirage_dist.schema import limits, numbers
from mirage_dist.schema.names import NAME, PLACE, Check
from tools.docs.sources import Class, Module, resolve

PLAIN = {"str": "text", "int": "whole number", "float": "number", "bool": "`true` or `false`", "Any": "any value"}
# Outside of every range.
OUTSIDE = (-(10**30), 10**30)
# What a mapping with a free choice of class may hold: the key that names the class, by the field that has the mapping.
CHOICES = {
    "objective": ("objectives", "name"),
    "optimizer": ("optimizers", "name"),
    "attacks": ("attacks", "kind"),
    "judges": ("judges", "kind"),
    "judge": ("judges", "kind"),
    "defences": ("defences", "kind"),
    "erasure": ("erasure", None),
}


def words(annotation: ast.expr, where: Module, field: str, link: Callable[[Class], str]) -> str:
    """An annotation in words, as Markdown. link: the Markdown of a mapping that a class describes."""
    if isinstance(annotation, ast.BinOp):
        parts = [p for p in _union(annotation) if not (isinstance(p, ast.Constant) and p.value is None)]
        text = ", or ".join(words(part, where, field, link) for part in parts)
        return f"{text}; or `null`" if len(parts) < len(_union(annotation)) else text
    if isinstance(annotation, ast.Subscript):
        return _subscript(annotation, where, field, link)
    name = ast.unparse(annotation)
    if name in PLAIN:
        return PLAIN[name]
    # The module of names and numbers has checks, which say in words what they expect.
    with contextlib.suppress(AttributeError):
        if check := _check(getattr(numbers, name)):
            return check
    if name in ("Name", "Place"):
        return {"Name": "name (part of a file's name)", "Place": "path"}[name]
    target = resolve(where, name)
    if isinstance(target, Class):
        return link(target)
    assert target is not None, f"{where.name}: {field}: {name} has no meaning here"
    return words(target, where, field, link)


def _subscript(annotation: ast.Subscript, where: Module, field: str, link: Callable[[Class], str]) -> str:
    kind = ast.unparse(annotation.value)
    parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if kind == "Literal":
        return " or ".join(f"`{_yaml(ast.literal_eval(part))}`" for part in parts)
    if kind == "Annotated":
        if isinstance(parts[1], ast.Call) and ast.unparse(parts[1].func) == "Choice":
            return _choice(field)
        names = {**vars(limits), **vars(numbers), "Annotated": Annotated}
        text = _check(eval(compile(ast.Expression(annotation), where.name, "eval"), names))
        assert text, f"{where.name}: {field}"
        return text
    if kind == "list":
        if field in CHOICES and "Choice" in ast.unparse(annotation):
            return f"list of {_choice(field, 'mappings')}, each also a bare word"
        entry = words(parts[0], where, field, link)
        return "list of texts" if entry == PLAIN["str"] else f"list, each entry: {entry}"
    assert kind == "dict", f"{where.name}: {field}: {kind}"
    if field == "erasure":
        return _choice(field)
    value = words(parts[1], where, field, link)
    return "mapping" if value == PLAIN["Any"] else f"mapping of names, each to: {value}"


def _choice(field: str, noun: str = "mapping") -> str:
    page, key = CHOICES[field]
    with_key = f" with `{key}` and that class's options" if key else ""
    return f"{noun}{with_key}: [{page}]({page}.md)"


def _check(annotated: Any) -> str | None:
    """The words of the check of an annotated type."""
    for mark in getattr(annotated, "__metadata__", ()):
        if mark is NAME or mark is PLACE:
            return None
        if isinstance(mark, Check):
            problem = next(text for value in OUTSIDE if (text := mark.problem(value)))
            return problem.removeprefix("expected ").removeprefix("a ")
    return None


def _union(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_union(node.left), *_union(node.right)]
    return [node]


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
