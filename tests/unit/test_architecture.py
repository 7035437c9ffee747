"""The house's rules, held over the source: imports run one way, light commands stay light, nothing unsafe loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mirage_dist.config import REPOSITORY

PACKAGE = REPOSITORY / "mirage_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
EVERYWHERE = {"schema", "disk", "progress"}
# Part -> the parts that it may import besides itself and those that are allowed everywhere.
ALLOWED = {
    "schema": set(),
    "disk": set(),
    "progress": set(),
    "config": set(),
    "signals": set(),
    "stats": set(),
    "liveness": {"disk"},
    "world": {"config", "signals"},
    "launching": {"config", "signals"},
    "data": {"config", "stats", "world"},
    "kernels": {"config"},
    "model": {"config", "world", "data", "kernels"},
    "objectives": {"config", "kernels"},
    "train": {"config", "signals", "liveness", "world", "data", "kernels", "model", "objectives"},
    "evals": {"config", "signals", "liveness", "stats", "world", "data", "model"},
    "robustness": {
        *("config", "signals", "launching", "liveness", "stats", "world"),
        *("data", "model", "objectives", "train", "evals"),
    },
    "report": {"config", "stats", "data", "evals"},
    "demo": {
        *("config", "signals", "launching", "world", "data", "model", "evals", "report", "train", "robustness"),
    },
    "cli": {"config", "signals", "world", "demo", "data", "model", "train", "evals", "robustness", "report"},
}


def part(module: str) -> str:
    return module.split(".")[1]


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    used = {part(name) for name in imports(file) if name.startswith("mirage_dist.")}
    allowed = ALLOWED[own] | EVERYWHERE | {own}
    assert used <= allowed, f"{own} may not import {used - allowed}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_is_one_thing_and_loads_nothing_unsafe(file: Path):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    assert "trust_remote_code" not in text
    assert "torch.load(" not in text
    assert "pickle" not in text.replace("allow_pickle=False", "")


@pytest.mark.parametrize("module", ["mirage_dist.cli", "mirage_dist.config", "mirage_dist.ranks", "mirage_dist.demo"])
def test_help_and_config_errors_load_no_heavy_library(module: str):
    heavy = "('torch', 'transformers', 'deepspeed', 'peft', 'matplotlib', 'wandb')"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_report_needs_no_torch():
    code = "import sys, mirage_dist.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
