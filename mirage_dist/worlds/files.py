"""A world's folder: made once, checked against its configuration, and opened again.

world.json      the configuration, and the SHA-256 of labels.jsonl; a directory without it is no world
labels.jsonl    what each picture shows, one object a line
safety-0.95/    a safety set; one folder for each `spurious`
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mirage_dist import config as configs
from mirage_dist import disk, state
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, WorldConfig, limits

# Keys that do not change the data: where they lie, the safety set in use, how the base model is trained.
NOT_DATA = ("dir", "spurious", "base_recipe")
LABELS = "labels.jsonl"
T = TypeVar("T")

_AGAIN = "Move {} away, and it is made again, or choose another world.dir"


def make(
    config: WorldConfig,
    write_world: Callable[[Path], Iterable[Mapping[str, Any]]],
    write_safety: Callable[[Path], object],
) -> None:
    """Write a world to `config.dir`, or add the safety set for `config.spurious` to the world that exists there.

    write_world: writes everything else into a folder, and returns the labels. write_safety: writes the safety set into
    a folder. Both must be pure functions of the configuration: a directory is whole or absent, and several processes
    may make the same one at once. Raises ConfigError when the directory holds something else.
    """
    root, safety = Path(config.dir), safety_dir(config)
    disk.remove_leftovers(root)
    for folder in (root, safety):  # also of what `inputs` makes in them
        disk.remove_leftovers_in(folder)
    if not root.is_dir() or not any(root.iterdir()):
        start = time.monotonic()
        log.info(f"world: drawing pictures and questions for {root}")
        with disk.folder(root, shared=True, durable=False) as folder:  # what power failures cut is made again
            labels = "".join(json.dumps(label) + "\n" for label in write_world(folder))
            (folder / LABELS).write_text(labels, encoding="utf-8")
            # Last: a folder with a header is whole even on file systems whose renames are not atomic.
            header = {**_data_config(config), "labels": disk.sha256_text(labels)}
            (folder / "world.json").write_text(state.sealed("world", header, indent=1), encoding="utf-8")
        log.info(f"world: done in {time.monotonic() - start:.1f} s")
    written = {name: value for name, value in header_of(root).items() if name != "labels"}
    changed = configs.differences(_data_config(config), written, "world")
    if changed:
        raise ConfigError(f"{root} holds a world of another configuration; choose another world.dir ({changed})")
    if not safety.is_dir():
        with disk.folder(safety, shared=True, durable=False) as folder:
            write_safety(folder)


def safety_dir(config: WorldConfig) -> Path:
    """The folder of the safety set (`train.json`) that `config.spurious` names."""
    return Path(config.dir) / f"safety-{config.spurious:.2f}"


def load(root: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the labels of the world in a directory.

    Raises ConfigError when the directory holds no world, state.Damaged when its files are not as they were written.
    """
    written, labels = header_of(root), labels_of(root)
    if disk.sha256_text(labels) != written["labels"]:
        raise state.Damaged(f"{root / LABELS}: is not as it was written. {_AGAIN.format(root)}")
    return written, [json.loads(line) for line in labels.splitlines()]


def labels_of(root: Path) -> bytes:
    """The content of labels.jsonl, unchecked. Raises state.Damaged where it cannot be read."""
    return state.content(root / LABELS, limits.LABELS, _AGAIN.format(root))


def label(labels: Mapping[str, T], image: str | Path, root: Path) -> T:
    """What a picture of the world in `root` shows, by its file name. Raises ConfigError for any other picture."""
    name = Path(image).name
    if name not in labels:
        raise ConfigError(f"{image}: no picture of the world in {root}; see its {LABELS}")
    return labels[name]


def header_of(root: Path) -> dict[str, Any]:
    """The content of world.json: the configuration without NOT_DATA, and `labels`. Raises as `load`."""
    try:
        return state.read("world", root / "world.json", _AGAIN.format(root))
    except FileNotFoundError:
        raise ConfigError(f"{root}: no world here (world.json is missing); choose another world.dir") from None


def _data_config(config: WorldConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_DATA}
