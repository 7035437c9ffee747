"""Builds what pyproject.toml describes, with the folders at the top of a checkout inside the package.

A user of the checkout knows configs/, launch/ and slurm/ by their places at its top; an installed package has them in
`mirage_dist/resources`, which exists in what is built and never in a checkout (see mirage_dist/config/home.py).
"""

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
FOLDERS = {"configs": ("*.yaml", "*.json"), "launch": ("*.sh",), "slurm": ("*.sh",), "docs": ("*.md",)}


def commit() -> str:
    """That of the checkout, marked where its files are others; of an sdist, the one that it was made from."""
    if (HERE / ".git").exists():
        with suppress(OSError, subprocess.CalledProcessError):
            state = ["git", "-C", str(HERE), "status", "--porcelain", "--untracked-files=no"]
            changes = subprocess.run(state, capture_output=True, text=True, check=True).stdout
            head = subprocess.run([*state[:3], "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
            return head.strip() + ("+changes" if changes else "")
    with suppress(OSError):
        return (HERE / "commit.txt").read_text(encoding="utf-8").strip()
    return ""


class BuildPackage(build_py):
    """Copies the folders, and writes the commit; not for an editable installation, which has the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "mirage_dist" / "resources"
        if target.exists():  # of an earlier build, which may have had files that are no longer there
            shutil.rmtree(target)
        target.mkdir(parents=True)
        for file in _resources():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / file, target / file)
        (target / "commit.txt").write_text(f"{commit()}\n", encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        target = Path(self.build_lib) / "mirage_dist" / "resources"
        own = [] if self.editable_mode else [str(target / file) for file in [*_resources(), "commit.txt"]]
        return [*super().get_outputs(include_bytecode), *own]


def _resources() -> list[Path]:
    """Relative to the checkout."""
    found = [f for name, kinds in FOLDERS.items() for kind in kinds for f in sorted((HERE / name).rglob(kind))]
    return [*(file.relative_to(HERE) for file in found), Path(".env.example")]


class SourceArchive(sdist):
    """Has the commit in commit.txt."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / "commit.txt").unlink(missing_ok=True)  # it may be a hard link to the source's
        (Path(base_dir) / "commit.txt").write_text(f"{commit()}\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildPackage, "sdist": SourceArchive})
