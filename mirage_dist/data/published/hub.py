"""Datasets of the Hugging Face hub, `hf://OWNER/NAME[@REVISION]`: which files of the cache a configuration's split has.

Reading takes what the cache holds and never downloads, so that the nodes of a job need no network: `mirage data get`
downloads. The hub's cache keeps a revision as a folder of files; the card (README.md) or the files' names say which
belong to which configuration and split, and `datasets` reads that.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mirage_dist.schema import ConfigError, RunError

SCHEME = "hf://"
ADDRESS = re.compile(r"hf://(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
SHARD = re.compile(r"(?P<start>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.\w+)")


@dataclass(frozen=True)
class Address:
    """A dataset on the hub. revision: a commit, tag or branch; None for `main`."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}{'' if self.revision is None else f'@{self.revision}'}"


@dataclass(frozen=True)
class Split:
    """One split of a dataset in the cache. commit: 40 hexadecimal digits. rows: as the card counts them, if it does."""

    commit: str
    files: tuple[Path, ...]
    rows: int | None


def address(path: str) -> Address | None:
    """The dataset that a path names; None for a path of this machine. Raises ConfigError for a malformed one."""
    if not path.startswith(SCHEME):
        return None
    if (match := ADDRESS.fullmatch(path)) is None:
        raise ConfigError(f"{path}: expected {SCHEME}OWNER/NAME, or {SCHEME}OWNER/NAME@REVISION")
    return Address(match["name"], match["revision"])


@lru_cache(maxsize=64)
def split(where: Address, config: str | None, name: str | None) -> Split:
    """The files of a split, of the only one where `name` is None. config: None for the dataset's default.

    Raises ConfigError for a dataset or revision that is not in the cache, a configuration or split that the dataset
    does not have, a choice that is missing, and a split of which the cache holds only a part.
    """
    folder = snapshot(where)
    builder = _builder(where, folder, config)
    splits = {str(key): [Path(file) for file in files] for key, files in (builder.config.data_files or {}).items()}
    if name is None and len(splits) == 1:
        name = next(iter(splits))
    if name is None or name not in splits:
        given = "several splits" if name is None else f"no split {name!r}"
        raise ConfigError(f"{where}: {given} in configuration {builder.config.name!r}; split: {', '.join(splits)}")
    files = tuple(splits[name])
    if outside := [file for file in files if not file.is_relative_to(folder)]:
        raise ConfigError(f"{where}: {outside[0]}, a file of split {name!r}, lies outside of the dataset")
    _check_whole(where, files)
    counted = (builder.info.splits or {}).get(name)
    return Split(folder.name, files, None if counted is None else counted.num_examples)


def download(where: Address) -> str:
    """Bring a dataset into the cache, whole; returns its commit. What the cache has of it is not downloaded again.

    Raises ConfigError for a dataset or revision that the hub does not have or does not give to this user, RunError
    where the hub cannot be reached or a transfer breaks off: the same call goes on there.
    """
    from huggingface_hub import HfApi, constants, errors

    try:
        # The commit first: a hub that cannot be reached would go unnoticed where the cache holds an older one.
        commit = HfApi().dataset_info(where.name, revision=where.revision).sha
        folder = HfApi().snapshot_download(where.name, repo_type="dataset", revision=where.revision)
        if Path(folder).name != commit:
            raise OSError(f"the hub has {commit}, the cache {Path(folder).name}")
    except errors.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/datasets/{where.name}"
        raise ConfigError(
            f"{where}: its owners ask who downloads it. Accept their terms on {page}, and set HF_TOKEN to your token"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        missing = "revision" if isinstance(error, errors.RevisionNotFoundError) else "dataset, or it is private"
        raise ConfigError(f"{where}: the hub has no such {missing}") from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    except errors.OfflineModeIsEnabled as error:
        raise ConfigError(f"{where}: HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it") from error
    # The base class of whichever HTTP client the hub's library uses.
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{where}: {why}; `mirage data get {where}` goes on where it stopped") from error
    split.cache_clear()
    return str(commit)


def snapshot(where: Address) -> Path:
    """The folder of a dataset's revision in the cache. Raises ConfigError where the cache has none."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(where.name, repo_type="dataset", revision=where.revision, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{where}: not in the cache of the hub ({_cache()}); `mirage data get {where}` downloads it, also on "
            "another machine with the same cache"
        ) from error
    except (errors.HFValidationError, OSError, ValueError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _builder(where: Address, folder: Path, config: str | None) -> Any:
    """What `datasets` makes of a snapshot: nothing is downloaded or prepared, and no code of the dataset runs."""
    import datasets

    try:
        with tempfile.TemporaryDirectory() as nowhere:  # where it leaves lock files
            return datasets.load_dataset_builder(str(folder), name=config, cache_dir=nowhere)
    except Exception as error:  # whatever a damaged card makes of YAML and patterns
        available = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{where}: config={config}: {available}") from error


def _check_whole(where: Address, files: tuple[Path, ...]) -> None:
    """Raise ConfigError for shards of which some are missing, and for links whose blobs are."""
    if gone := [file for file in files if not file.exists()]:
        raise ConfigError(f"{where}: {gone[0].name} is not in the cache; `mirage data get {where}` completes it")
    shards: dict[tuple[Path, str, str, int], set[int]] = {}
    for file in files:
        if match := SHARD.fullmatch(file.name):
            key = file.parent, match["start"], match["end"], int(match["count"])
            shards.setdefault(key, set()).add(int(match["number"]))
    for (_, start, end, count), numbers in shards.items():
        if missing := sorted(set(range(count)) - numbers):
            raise ConfigError(
                f"{where}: {start}-{missing[0]:05}-of-{count:05}{end} is not in the cache, and {len(missing) - 1} "
                f"others; `mirage data get {where}` completes it"
            )
