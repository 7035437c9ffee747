"""The house's rules, held over the source: imports run one way, names are the field's, light commands stay light."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mirage_dist.config import REPOSITORY

PACKAGE = REPOSITORY / "mirage_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
OTHERS = sorted(f for folder in ("tests", "benchmarks", "tools") for f in (REPOSITORY / folder).rglob("*.py"))
MODULES = {
    ".".join(f.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): f for f in sorted(FILES)
}
# The floors of the house, from the ground up. A part may import what lies below its own floor, and on its own floor
# only what is named here.
FLOORS = [
    ["schema", "progress", "stats"],
    ["state"],
    ["signals", "liveness", "calls", "imports"],
    ["disk"],
    ["config"],
    ["registry", "ranks", "launching", "runs", "worlds"],
    ["monitoring"],
    ["kernels", "data"],
    ["model", "objectives"],
    ["train", "evals"],
    ["erasure", "report"],
    ["embedded", "countries", "inputs", "demo", "paper", "sweep", "doctor", "project", "hub", "api", "cli"],
]
BESIDE = {
    "progress": {"schema"},
    "ranks": {"progress"},
    "launching": {"progress", "ranks"},
    "report": {"erasure"},
    "inputs": {"embedded", "countries"},
    "demo": {"inputs", "countries", "sweep"},
    "paper": {"inputs", "embedded"},
    "doctor": {"inputs"},
    "cli": {"inputs", "demo", "paper", "sweep", "doctor", "project", "hub"},
}
# Parts that these do not import although they lie below.
WITHOUT = {
    "kernels": {"stats", "registry", "disk", "liveness", "launching", "monitoring"},
    "objectives": {"data", "disk", "liveness", "launching", "monitoring"},
    "evals": {"kernels", "objectives"},
    "report": {"kernels", "model", "objectives", "train", "monitoring"},
}
ACTS = {"told", "found", "asked", "said", "tell", "tells"}  # names say what a thing is, not how it came


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def part(module: str) -> str:
    return module.split(".")[1]


def imported(node: ast.AST) -> list[str]:
    """What one statement imports, as far as it names modules of the package."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    return [module for name in names if (module := module_of(name))]


def module_of(name: str) -> str | None:
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def imports(file: Path) -> set[str]:
    """Also those within functions, but not those for type checkers only."""
    modules: set[str] = set()
    pending: list[ast.AST] = [tree_of(file)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        modules.update(imported(node))
        pending.extend(ast.iter_child_nodes(node))
    return modules


def allowed(own: str) -> set[str]:
    floor = next(number for number, parts in enumerate(FLOORS) if own in parts)
    below = {name for parts in FLOORS[:floor] for name in parts}
    return (below - WITHOUT.get(own, set())) | BESIDE.get(own, set()) | {own}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str):
    if module == "mirage_dist":
        return
    used = {part(name) for name in imports(MODULES[module]) if name != "mirage_dist"}
    assert used <= allowed(part(module)), f"{module} may not import {used - allowed(part(module))}"


def test_no_file_imports_itself_through_others():
    graph = {module: imports(file) - {module} for module, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"an import circle: {' -> '.join(error.args[1])}") from error


def private_names(file: Path) -> Iterator[str]:
    """Names with an underscore that this file takes from another module of ours."""
    tree = tree_of(file)
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mirage_dist"):
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__"):  # `__version__` is public
                    yield f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}" in MODULES:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules):
            continue
        if node.attr.startswith("_") and not node.attr.startswith("__"):
            yield f"{modules[node.value.id]}.{node.attr}"


@pytest.mark.parametrize("file", [*FILES, *OTHERS], ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_what_is_private_to_a_module_stays_in_it(file: Path):
    assert not list(private_names(file))


def names(tree: ast.AST) -> Iterator[str]:
    """Every name that a file gives to something: variables, parameters, functions, classes, attributes, aliases.

    The fields of a TypedDict are keys of files that others read, and stay as they are.
    """
    typed = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and "TypedDict" in map(ast.unparse, n.bases)]
    keys = {id(field.target) for node in typed for field in node.body if isinstance(field, ast.AnnAssign)}
    for node in ast.walk(tree):
        if id(node) in keys:
            continue
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.alias(asname=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


@pytest.mark.parametrize("file", [*FILES, *OTHERS], ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_names_say_what_a_thing_is(file: Path):
    acts = {
        name for name in names(tree_of(file)) if ACTS & set(name.lower().split("_")) and not name.startswith("test_")
    }
    assert not acts, f"{sorted(acts)} say an act; name the content"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_is_one_thing_and_loads_nothing_unsafe(file: Path):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    assert "trust_remote_code" not in text
    assert "torch.load(" not in text
    assert "object.__setattr__" not in text  # a frozen dataclass is not changed
    assert "pickle" not in text.replace("allow_pickle=False", "")


def test_only_one_module_removes_folders():
    removing = re.compile(r"\brmtree\b|\.rmdir\(|\bremovedirs\b|shutil\.move\(")
    assert [str(f) for f in FILES if f != PACKAGE / "disk" / "removal.py" and removing.search(f.read_text())] == []


def test_no_path_of_a_user_is_resolved_by_what_raises_on_a_loop_of_links():
    """Path.resolve raises RuntimeError there, which nobody expects of it; os.path.realpath does not."""
    resolving = re.compile(r"(?<!Path\(__file__\))(?<!directory)\.resolve\(")
    assert [str(f) for f in FILES if resolving.search(f.read_text())] == []


def test_models_and_processors_are_loaded_in_one_place():
    """Elsewhere a missing package, remote code or a damaged file would not be caught."""
    loaders = re.compile(r"Auto(Processor|Tokenizer|ImageProcessor|Config|Model\w*)$")
    at_home = PACKAGE / "model" / "families"
    elsewhere = {
        f"{file.relative_to(PACKAGE)}: {alias.name}"
        for file in FILES
        if file.parent != at_home
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if loaders.match(alias.name)
    }
    assert not elsewhere


def test_pictures_are_opened_in_one_place():
    """Elsewhere a turned, transparent or deep picture would be another one, and a damaged one a traceback."""
    opens = re.compile(r"\bImage\.open\(|import (open|Image) as\b|from PIL\.Image import|imread\(|decode_image\(")
    elsewhere = {f for f in FILES if opens.search(f.read_text())} - {PACKAGE / "data/pictures/opening.py"}
    assert not elsewhere


def test_no_folder_has_more_rooms_than_a_dozen():
    rooms = Counter(file.parent for file in FILES if file.name != "__init__.py")
    assert not {str(folder): count for folder, count in rooms.items() if count > 12}


@pytest.mark.parametrize(
    "module",
    [
        "mirage_dist.api",
        "mirage_dist.cli",
        "mirage_dist.config",
        "mirage_dist.ranks",
        "mirage_dist.inputs",
        "mirage_dist.demo",
    ],
)
def test_help_and_config_errors_load_no_heavy_library(module: str):
    heavy = "('torch', 'transformers', 'deepspeed', 'peft', 'matplotlib', 'wandb')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_report_needs_no_torch():
    code = "import sys, mirage_dist.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_two_files_of_tests_have_one_name():
    """pytest imports those outside of packages by their names alone, and leaves the second one out with an error."""
    files = [file for file in (REPOSITORY / "tests").rglob("test_*.py") if not (file.parent / "__init__.py").exists()]
    assert [name for name, count in Counter(file.name for file in files).items() if count > 1] == []
