"""Bringing published files here: single files by URL, whole datasets through the hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

import httpx

from mirage_dist import disk
from mirage_dist.data.published import hub
from mirage_dist.data.published.catalogue import DATASETS, Dataset, File
from mirage_dist.progress import Progress, log
from mirage_dist.schema import ConfigError, RunError

SECONDS = 60.0  # without a byte, after which a transfer has broken off
TRIES = 3


def get(name: str, root: Path) -> list[str]:
    """Bring a dataset of the catalogue, by name, or one of the hub, by address; returns what the user does next.

    Files that are here stay as they are. Raises ConfigError for an unknown name and for a dataset that no command can
    download, saying where it is; RunError where a transfer breaks off: the next call goes on there.
    """
    if (where := hub.address(name)) is not None:
        return [f"{where}: commit {hub.download(where)} is in the cache of the hub"]
    dataset = DATASETS[name]
    lines = [f"{file.path}: {_file(file, root)}" for file in dataset.files if file.url is not None]
    if dataset.splits and dataset.hub is not None and (where := hub.address(dataset.hub)) is not None:
        lines.append(f"{where}: commit {hub.download(where)} is in the cache of the hub")
    if not lines:
        raise ConfigError(f"{name}: no command can download it; {_by_hand(dataset, root)}")
    return [*lines, *([f"by hand: {_by_hand(dataset, root)}"] if _rest(dataset) else [])]


def _rest(dataset: Dataset) -> list[str]:
    """What the user brings: path -> what goes there, in words."""
    files = [f"{file.path} ({file.holds})" for file in dataset.files if file.url is None and not dataset.splits]
    return [*files, *(f"{folder}/ ({content})" for folder, content in dataset.pictures.items())]


def _by_hand(dataset: Dataset, root: Path) -> str:
    return f"from {dataset.page} put under {root}/: {'; '.join(_rest(dataset))}"


def _file(file: File, root: Path) -> str:
    path = root / file.path
    if path.exists():
        return "is here already"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    for attempt in range(TRIES):
        try:
            _transfer(str(file.url), part)
            break
        except httpx.HTTPStatusError as error:
            raise RunError(f"{file.url}: {error.response.status_code} {error.response.reason_phrase}") from error
        except httpx.HTTPError as error:
            if attempt == TRIES - 1:
                why = str(error) or type(error).__name__
                raise RunError(
                    f"{file.url}: {why}; what has arrived is in {part}, and the next call goes on"
                ) from error
            log.info(f"{file.url}: {error}; once more")
    if file.sha256 is not None and (digest := disk.sha256(part)) != file.sha256:
        os.remove(part)
        raise RunError(f"{file.url}: what was downloaded has SHA-256 {digest}, expected {file.sha256}; it is removed")
    disk.publish(part, path)
    return "downloaded"


def _transfer(url: str, part: Path) -> None:
    """Append to `part` what it lacks of a file. A server that begins anew replaces it."""
    held = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={held}-", "Accept-Encoding": "identity"} if held else {"Accept-Encoding": "identity"}
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=SECONDS) as response:
        if response.status_code == 416:  # nothing is left to send
            return
        response.raise_for_status()
        more = response.status_code == 206
        size = int(response.headers.get("Content-Length", 0)) + (held if more else 0)
        with part.open("ab" if more else "wb") as output, Progress(size, part.stem, "B", leave=False) as bar:
            bar.update(held if more else 0)
            for content in response.iter_raw():
                output.write(content)
                bar.update(len(content))
    if size and part.stat().st_size != size:
        raise httpx.ReadError(f"{part.stat().st_size} of {size} bytes arrived")
