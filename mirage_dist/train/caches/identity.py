"""What decides the samples of a run and all that their checks come to, without reading any data."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mirage_dist import __version__, disk
from mirage_dist import config as configs
from mirage_dist.config.home import PACKAGE
from mirage_dist.data import sources
from mirage_dist.disk import hashes
from mirage_dist.model import directory, environment, load
from mirage_dist.objectives.base import Needs
from mirage_dist.schema import ConfigError, TrainRecipe

FORMAT = 1  # of the tables; raised when what they hold changes
# Keys of `data` that decide how a step is made, not what the samples are.
NOT_THE_SAMPLES = ("workers", "verify", "cache_vision", "group_by_length", "group_by_modality")
# Distributions that read data, decode pictures, tokenise, and split texts into words for the audit.
LIBRARIES = (
    *("transformers", "tokenizers", "sentencepiece", "jinja2", "pillow", "numpy"),
    *("datasets", "pyarrow", "huggingface-hub", "regex"),
)
# Code of this package that does so; what a checkout changes has no other version.
CODE = ("config", "data", "model", "objectives", "train")

File = tuple[str, int, int, int, int]  # path, size, times of modification and change in ns, inode


def key(recipe: TrainRecipe, needs: Needs, processor: Any, files: Mapping[str, File | None]) -> str:
    """Hash of what decides the samples, their lengths, and what is logged of them.

    recipe: resolved. files: see `inputs`.
    """
    data = configs.to_dict(recipe.data)
    classes = {
        f"{type(source).__module__}:{type(source).__qualname__}"
        for own in recipe.data.streams.values()
        for source in own
    }
    decided_by = {
        "format": FORMAT,
        "data": {name: value for name, value in data.items() if name not in NOT_THE_SAMPLES},
        "formats": sorted(classes),
        "needs": [needs.streams, needs.paired, needs.unlearned, needs.audited],
        "model": [recipe.model.path, load.picture_token(recipe.model)],
        "working directory": os.getcwd(),  # of relative paths
        "files": files,
        "environment": asdict(environment.of(processor)),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "package": [__version__, _code()],
    }
    return disk.digest(decided_by)[:16]


def inputs(recipe: TrainRecipe) -> dict[str, File | None]:
    """Path -> identity of each file that decides the samples: of data, refusals and processor; None where there is no
    such file. Take it before the files are read: a later change then shows. Raises ConfigError as `sources.inputs`.
    """
    folder = directory.resolve(recipe.model.path)
    files = [*directory.processing_files(folder), folder / "config.json"]
    files += [file for own in recipe.data.streams.values() for source in own for file in sources.inputs(source)]
    files += [] if recipe.data.refusals is None else [Path(recipe.data.refusals)]
    return {os.path.abspath(file): _identity(file) for file in files}


def changed(before: Mapping[str, File | None], now: Mapping[str, File | None]) -> str | None:
    """A path whose identity differs; None when none does."""
    return next((path for path in {**before, **now} if before.get(path) != now.get(path)), None)


def _identity(file: Path) -> File | None:
    try:
        return str(file), *hashes.identity(file.stat())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _code() -> str:
    """SHA-256 of the sources that read, check and measure samples."""
    files = [file for name in CODE for file in (PACKAGE / name).rglob("*") if file.suffix in (".py", ".json")]
    return disk.sha256_files(files, PACKAGE)
