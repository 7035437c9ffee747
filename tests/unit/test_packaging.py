"""What is built and installed works without the checkout; what is imported is declared."""

import ast
import importlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from mirage_dist import __version__
from mirage_dist.config import REPOSITORY
from mirage_dist.doctor import software

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
COMMIT = "0123456789abcdef0123456789abcdef01234567+changes"
FOLDERS = {"configs": ("*.yaml", "*.json"), "launch": ("*.sh",), "slurm": ("*.sh",)}
SHIPPED = [f.relative_to(REPOSITORY) for d, kinds in FOLDERS.items() for k in kinds for f in (REPOSITORY / d).rglob(k)]
BUILD = "import setuptools.build_meta as b, sys; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
TINY = (
    "seed=12",
    "world.base_samples=24",
    "world.safety_samples=8",
    "world.general_samples=8",
    "world.eval_samples=4",
    "train.max_steps=1",
)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The sdist of this source, and the wheel that is built from the unpacked sdist."""
    root = tmp_path_factory.mktemp("build")
    names = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, text=True).stdout
    copied = [name for name in names.split("\0") if name and (REPOSITORY / name).is_file()]
    for name in copied:
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, root / "source" / name)
    (root / "source/commit.txt").write_text(f"{COMMIT}\n")
    build(root / "source", "sdist", root)
    (sdist,) = root.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(root / "sdist", filter="data")
    (unpacked,) = (root / "sdist").iterdir()
    build(unpacked, "wheel", root)
    (wheel,) = root.glob("*.whl")
    return copied, unpacked, wheel


def build(source: Path, kind: str, out: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """The folder of a virtual environment with the wheel, which also sees the libraries of this one."""
    environment = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet", "--no-deps"]
    # With the checkout on its path, pip would take that for the package.
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = ["--no-index", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, *options, str(archives[2])], check=True, env=without)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "zz_libraries.pth").write_text("".join(f"{folder}\n" for folder in site.getsitepackages()))
    return environment


@pytest.fixture
def mirage(installed, tmp_path):
    """The installed command in an empty directory, without a way to import the checkout."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MIRAGE", "SLURM", "PYTHON"))}
    inherited |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str, status: int = 0) -> str:
        command = [str(installed / "bin/mirage"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=inherited, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def packages_of(environment: Path) -> Path:
    (package,) = environment.glob("lib/python*/site-packages/mirage_dist")
    return package


def test_the_archives_have_every_file_that_the_checkout_has(archives):
    copied, unpacked, wheel = archives
    assert [name for name in copied if not (unpacked / name).is_file()] == []
    with zipfile.ZipFile(wheel) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        assert SHIPPED
        for file in (*SHIPPED, Path(".env.example")):
            assert archive.read(f"mirage_dist/resources/{file}") == (REPOSITORY / file).read_bytes()
    executable = {name.partition("resources/")[2] for name, mode in modes.items() if mode & 0o100}
    assert executable == {str(file) for file in SHIPPED if os.access(REPOSITORY / file, os.X_OK)}
    code = {str(f.relative_to(REPOSITORY)) for f in (REPOSITORY / "mirage_dist").rglob("*") if f.is_file()}
    assert {name for name in code if "__pycache__" not in name} <= set(modes)


def test_an_image_is_built_from_files_that_make_the_whole_wheel(archives, tmp_path):
    _, unpacked, wheel = archives
    for line in re.findall(r"^COPY (?!--)(.+) \S+$", (unpacked / "Dockerfile").read_text(), re.MULTILINE):
        for name in line.split():
            copy = shutil.copytree if (unpacked / name).is_dir() else shutil.copy2
            (tmp_path / "source").mkdir(exist_ok=True)
            copy(unpacked / name, tmp_path / "source" / name)
    (tmp_path / "source/commit.txt").write_text(f"{COMMIT}\n")  # as of --build-arg COMMIT
    build(tmp_path / "source", "wheel", tmp_path)
    (own,) = tmp_path.glob("*.whl")
    contents = []
    for file in (own, wheel):
        with zipfile.ZipFile(file) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []


def test_an_installed_package_has_its_version_commit_and_recipes(mirage, installed):
    lines = mirage("--version").splitlines()
    assert lines[0] == f"mirage-dist {__version__}, commit {COMMIT}"
    assert lines[1] == f"recipes and scripts: {packages_of(installed)}/resources"
    assert {line.split()[0] for line in lines[2:]} >= {"python", "torch", "transformers", "deepspeed", "peft"}
    listed = {line.split()[0] for line in mirage("list", "recipes").splitlines()}
    kinds = ("train", "prepare", "eval", "paper", "sweep")
    assert listed == {str(file) for file in SHIPPED if file.suffix == ".yaml" and file.parts[1] in kinds}
    assert "in order for 1 process" in mirage("train", "configs/train/demo_npo.yaml", "--check-recipe")
    assert "model.path=" in mirage("show", "configs/eval/pope.yaml", "run.dir=runs/npo")
    assert "no.yaml: no such file" in mirage("train", "no.yaml", "--ranks", "2", status=2)


def test_an_installed_package_makes_a_directory_whose_scripts_run_it(mirage, installed, tmp_path):
    assert "next:" in mirage("init", "work")
    for file in SHIPPED:
        assert (tmp_path / "work" / file).read_bytes() == (REPOSITORY / file).read_bytes()
        assert os.access(tmp_path / "work" / file, os.X_OK) == os.access(REPOSITORY / file, os.X_OK)
    stubs = {"scontrol": "[[ $1 != show ]] || echo 127.0.0.1", "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"'}
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o700)
    slurm = "JOB_ID=1 NNODES=1 NODEID=0 JOB_NODELIST=127.0.0.1 STEP_NODELIST=127.0.0.1 STEP_ID=0 PROCID=0 LOCALID=0"
    exports = " ".join(f"SLURM_{word}" for word in f"{slurm} NTASKS=1".split())
    outputs = {}
    for name, home in {"work": tmp_path / "work", "package": packages_of(installed) / "resources"}.items():
        script = (
            f"source work/.env.example; export {exports} MIRAGE_HOME={home}; bash {home}/slurm/sft.sh train.lr=much"
        )
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        outputs[name] = done.stdout + done.stderr
        assert done.returncode == 2, outputs[name]
        assert f"{home}/configs/train/sft.yaml" in outputs[name]
        assert "train.lr='much'" in outputs[name]


def test_the_first_stage_of_the_demo_runs_from_an_installed_package(mirage, installed, tmp_path):
    package = packages_of(installed)
    before = sorted(package.rglob("*"))
    (tmp_path / "configs/train").mkdir(parents=True)
    text = (REPOSITORY / "configs/train/demo_base.yaml").read_text()
    (tmp_path / "configs/train/demo_base.yaml").write_text(f"{text}\n# changed here\n")
    words = ("train", "configs/train/demo_base.yaml", "--ranks", "2", *TINY, "world.dir=world", "train.export=false")
    output = mirage(*words)
    assert f"configs/train/demo_base.yaml: the file here is used; the one in {package}/resources differs" in output
    assert "SFT() on 2 × cpu, 1 steps" in output
    assert json.loads((tmp_path / "world/base/manifest.json").read_text())["git_commit"] == COMMIT
    assert sorted(package.rglob("*")) == before  # it may belong to root


def distribution(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement)[0]).lower()


def test_every_package_that_is_imported_is_declared():
    """Libraries bring others with them, and may stop to: what this package imports itself, it asks for itself."""
    extras = [name for group in PROJECT["optional-dependencies"].values() for name in group]
    declared = {distribution(name) for name in (*PROJECT["dependencies"], *extras, *software.BESIDE)}
    known = packages_distributions() | {
        "bitsandbytes": ["bitsandbytes"],
        "vllm": ["vllm"],
        "flash_attn": ["flash-attn"],
    }
    missing = {}
    for file in (REPOSITORY / "mirage_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"mirage_dist"}:
                if not {distribution(owner) for owner in known.get(name, [name])} & declared:
                    missing[name] = str(file)
    assert not missing


@pytest.mark.parametrize("module", ["tensorboardX", "gguf", "triton", "shtab"])
def test_the_tested_extras_can_be_imported(module: str):
    assert importlib.import_module(module)


def test_one_version_stands_everywhere():
    assert f"\n## {__version__} " in (REPOSITORY / "CHANGELOG.md").read_text()
    assert f"\nversion: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
