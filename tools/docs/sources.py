"""The package's sources as syntax trees: modules, classes, and what names in them mean. Nothing is imported."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Module:
    """One module of the package. name: dotted."""

    name: str

    @cached_property
    def text(self) -> str:
        stem = ROOT / self.name.replace(".", "/")
        file = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        return file.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """Line n at place n - 1."""
        return self.text.splitlines()

    @cached_property
    def comments(self) -> dict[int, tuple[str, bool]]:
        """Line number -> the comment there, and whether the line has nothing else."""
        comments = {}
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                alone = not token.line[: token.start[1]].strip()
                comments[token.start[0]] = (token.string.lstrip("# "), alone)
        return comments

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """Name here -> module of the package and name there."""
        return {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mirage_dist")
            for alias in node.names
        }

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring in one line."""
        return _paragraph(ast.get_docstring(self.tree) or "")

    def statement(self, name: str) -> ast.ClassDef | ast.Assign | None:
        """The class or the assignment of a name at the module's top."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets):
                return node
        return None


@dataclass(frozen=True)
class Class:
    """A class of the package."""

    module: Module
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, else of the module's, in one line."""
        return _paragraph(self.docstring) or self.module.summary

    @property
    def bases(self) -> list[Class]:
        """Those of the package, first to last."""
        bases = (resolve(self.module, ast.unparse(base)) for base in self.node.bases)
        return [base for base in bases if isinstance(base, Class)]


def _paragraph(docstring: str) -> str:
    return " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())


@cache
def module(name: str) -> Module:
    return Module(name)


@cache
def resolve(where: Module, name: str) -> Class | ast.expr | None:
    """What a name means in a module: a class, or the expression that is assigned to it, of this package; else None."""
    node = where.statement(name)
    if isinstance(node, ast.ClassDef):
        return Class(where, node)
    if isinstance(node, ast.Assign):
        return node.value
    if name in where.imports:
        owner, original = where.imports[name]
        return resolve(module(owner), original)
    return None


def named(place: str) -> Class:
    """The class of "module:Class"."""
    owner, _, name = place.partition(":")
    target = resolve(module(owner), name)
    assert isinstance(target, Class), place
    return target


def registry(place: str) -> dict[str, Class]:
    """The classes of a registry, "module:NAME": name in recipes -> class."""
    owner, _, name = place.partition(":")
    call = resolve(module(owner), name)
    assert isinstance(call, ast.Call), place
    return {key: named(path) for key, path in ast.literal_eval(call.args[2]).items()}
