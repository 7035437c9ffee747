"""A directory to work in: the recipes, scripts and settings that a user edits, as this package has them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from mirage_dist import disk
from mirage_dist.config import home
from mirage_dist.schema import ConfigError

FOLDERS = ("configs", "launch", "slurm")
SETTINGS = ".env.example"


def make(folder: Path) -> list[Path]:
    """Copy recipes, scripts and an example of settings into `folder`, which is made if it is missing; returns them.

    Raises ConfigError, naming them, where files or folders of these names are in the way, and where `folder` is a file.
    After an error `folder` is as it was.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a folder, or a name that is free")
    targets = [folder / name for name in (*FOLDERS, SETTINGS)]
    if present := [str(target) for target in targets if os.path.lexists(target)]:
        raise ConfigError(
            f"{', '.join(present)}: in the way, and nothing was copied; choose another folder, or move "
            f"{'these' if len(present) > 1 else 'this'} away"
        )
    settings = (home.HOME / SETTINGS).read_text(encoding="utf-8").replace("=PYTHON", f"={shlex.quote(sys.executable)}")
    if not os.path.lexists(folder):
        with disk.folder(folder) as new:
            for name in FOLDERS:
                _copy(name, new / name)
            (new / SETTINGS).write_text(settings, encoding="utf-8")
        return targets
    published: list[Path] = []
    try:
        _publish(targets[:-1], published)
        if not disk.create(targets[-1], settings, private=False):
            raise ConfigError(f"{targets[-1]} exists; another process has written it meanwhile")
    except BaseException:
        for target in published:
            disk.remove(target)
        raise
    return targets


def _publish(targets: list[Path], published: list[Path]) -> None:
    """Copy a folder to each target; all copies are whole before the first of them gets its name."""
    if targets:
        with disk.folder(targets[0]) as new:
            _copy(targets[0].name, new)
            _publish(targets[1:], published)
        published.append(targets[0])


def _copy(name: str, new: Path) -> None:
    shutil.copytree(home.HOME / name, new, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
