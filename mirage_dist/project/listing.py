"""What recipes can name and which recipes there are: a name and a sentence each, read from the sources.

Nothing is imported for it, so that the list takes no longer than reading the files: a registry is the literal in its
module, and what an entry is says the docstring there.
"""

from __future__ import annotations

import ast
import re
import textwrap
from functools import cache
from pathlib import Path

from mirage_dist.config import home

WIDTH = 120
# What a list is of: the modules with a registry, or the folders of configs/ with recipes.
REGISTRIES = {
    "objectives": "objectives/base.py",
    "attacks": "evals/attacks/__init__.py",
    "judges": "evals/judges/__init__.py",
    "defences": "evals/defences/__init__.py",
    "formats": "data/formats/__init__.py",
    "optimizers": "train/optimizers/base.py",
}
RECIPES = {"recipes": ("train", "prepare", "eval", "paper", "sweep"), "suites": ("eval",), "models": ("model",)}
KINDS = ("recipes", "objectives", "attacks", "judges", "defences", "suites", "formats", "optimizers", "models")
HEADINGS = {
    "recipes": "for mirage train, eval, prepare, paper and sweep",
    "objectives": "objective.name",
    "attacks": "sets.SET.attacks.NAME.kind",
    "judges": "judges[0].kind",
    "defences": "defences.NAME.kind",
    "suites": "for mirage eval",
    "formats": "data.streams.STREAM[0].format",
    "optimizers": "train.optimizer.name",
    "models": "include=FILE beside a recipe; any other model is model.path=DIRECTORY",
}


def entries(kind: str) -> dict[str, str]:
    """Name -> a sentence about it, of one of KINDS; a recipe in the working directory hides the package's own."""
    if kind in REGISTRIES:
        registry = _registry(REGISTRIES[kind])
        modules = [place.partition(":")[0] for place in registry.values()]
        return {name: _about(place, modules.count(place.partition(":")[0]) == 1) for name, place in registry.items()}
    listed: dict[str, str] = {}
    for folder in RECIPES[kind]:
        names = {file.name for root in (Path(), home.HOME) for file in (root / "configs" / folder).glob("*.yaml")}
        places = [f"configs/{folder}/{name}" for name in sorted(names)]
        listed |= {place: _comment(home.find(place)) for place in places}
    return listed


def text(kinds: tuple[str, ...] = KINDS) -> str:
    """A line an entry, under a heading for each kind where there are several."""
    blocks = []
    for kind in kinds:
        listed = entries(kind)
        width = max(map(len, listed), default=0) + 2
        lines = [
            f"{name:<{width}}{textwrap.shorten(about, WIDTH - width, placeholder=' …')}".rstrip()
            for name, about in listed.items()
        ]
        if len(kinds) > 1:
            lines = [f"{kind} ({HEADINGS[kind]})", *(f"  {line}" for line in lines)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _registry(file: str) -> dict[str, str]:
    """The entries of `REGISTRY` in a module: name -> "module:Class"."""
    for node in _tree(home.PACKAGE / file).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REGISTRY":
            assert isinstance(node.value, ast.Call)
            return ast.literal_eval(node.value.args[2])
    raise AssertionError(f"{file} has no REGISTRY")


def _about(place: str, alone: bool) -> str:
    """The first sentence about a class; alone: that of its module, which has no other entry."""
    module, _, name = place.partition(":")
    tree = _tree(home.PACKAGE.parent / f"{module.replace('.', '/')}.py")
    own = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    first, second = (tree, own) if alone else (own, tree)
    return _sentence(ast.get_docstring(first) or ast.get_docstring(second) or "")


def _comment(file: Path) -> str:
    """The first sentence of a recipe's leading comment."""
    lines = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8", errors="replace"))
    return _sentence(re.sub(r"^# ?", "", lines[0] if lines else "", flags=re.MULTILINE))


def _sentence(text: str) -> str:
    """Of a text's first paragraph, in one line."""
    paragraph = re.split(r"\n\s*\n|\n   ", text.strip())[0]
    return re.split(r"(?<=\w{2}\.)\s|(?<=\)\.)\s", " ".join(paragraph.split()))[0]


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
