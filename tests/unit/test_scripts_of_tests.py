"""Python that tests and benchmarks keep in strings, such as what their ranks run, names what exists in mirage_dist."""

import ast
import importlib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirage_dist.config import REPOSITORY


def scripts() -> Iterator[tuple[str, ast.Module]]:
    """The strings that are Python with imports, each under FILE:LINE."""
    for folder in ("tests", "benchmarks", "tools"):
        for file in sorted(set((REPOSITORY / folder).rglob("*.py")) - {Path(__file__)}):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or "import" not in node.value:
                    continue
                try:
                    tree = ast.parse(node.value)
                except SyntaxError:
                    continue
                if any(isinstance(statement, ast.Import | ast.ImportFrom) for statement in tree.body):
                    yield f"{file.relative_to(REPOSITORY)}:{node.lineno}", tree


def missing(tree: ast.Module) -> list[str]:
    """What a script takes from mirage_dist that is not there: names that it imports, and attributes of its modules."""
    absent, modules = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mirage_dist":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                try:
                    value = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    absent += [f"{node.module}.{alias.name}"] if alias.name != "*" else []
                    continue
                if isinstance(value, types.ModuleType):
                    modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            absent += [] if hasattr(module, node.attr) else [f"{module.__name__}.{node.attr}"]
    return absent


def test_scripts_in_strings_name_what_exists():
    every = dict(scripts())
    assert any(place.startswith("tests/distributed/") for place in every)
    assert {place: absent for place, tree in every.items() if (absent := missing(tree))} == {}


@pytest.mark.parametrize(
    ("script", "absent"),
    [
        (
            "from mirage_dist.train.planning import plan\nplan.Trained.of(1)",
            ["mirage_dist.train.planning.plan.Trained"],
        ),
        ("from mirage_dist.train import nowhere", ["mirage_dist.train.nowhere"]),
        ("from mirage_dist import ranks\nranks.barrier(1, 'x')", []),
    ],
)
def test_a_name_that_moved_is_seen(script, absent):
    assert missing(ast.parse(script)) == absent
