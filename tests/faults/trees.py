"""The folder of a command as something to compare: contents without clocks, names without random parts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mirage_dist.train.measures.records import CLOCKED as OF_A_STEP
from tests.faults.events import steady

# What differs between two runs of one command that nobody stops: clocks, processes, and checksums over them.
CLOCKED = frozenset(
    {
        *OF_A_STEP,
        *("wall_seconds", "seconds", "since", "time", "date", "created"),
        *("started", "pid", "process", "token", "wandb_id", "seal", "command"),
    }
)
SECONDS = re.compile(rb"[0-9.]+ s\b")  # how long a demo took, in its page
STARTS = "starts.jsonl"  # a line a start, of which a killed run has more
# One file for each start that had something to add: the content of all together counts.
MERGED = ("rows/worker-#-#.jsonl",)

Tree = dict[str, Any]  # steady name -> what the file or the files of that name hold; None: a folder


def read(root: Path) -> Tree:
    """Every file and folder below `root`."""
    tree: Tree = {}
    for path in sorted(root.rglob("*")):
        name = steady(str(path.relative_to(root)))
        if path.is_dir() and not path.is_symlink():
            tree.setdefault(name, None)
        elif name.endswith(MERGED):
            lines = {*tree.get(name, ()), *path.read_text().splitlines()}
            tree[name] = sorted(lines)
        else:
            tree.setdefault(name, []).append(_content(path))
    return tree


def _content(file: Path) -> Any:
    if file.is_symlink():
        return f"-> {file.readlink()}"
    if file.name == STARTS:
        return None
    data = file.read_bytes()
    try:
        if file.suffix == ".json":
            return _timeless(json.loads(data))
        if file.suffix == ".jsonl":
            return [_timeless(json.loads(line)) for line in data.splitlines()]
    except ValueError:
        pass
    if file.suffix == ".html":
        data = SECONDS.sub(b"", data)
    return hashlib.sha256(data).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        # A checkpoint's manifest has a checksum of itself, and so of the random id in it.
        left_out = {*CLOCKED, "sha256"} if "wandb_id" in value else CLOCKED
        return {key: _timeless(own) for key, own in value.items() if key not in left_out}
    return [_timeless(own) for own in value] if isinstance(value, list) else value


def unequal(mine: Tree, other: Tree) -> list[str]:
    """The names in both whose content differs."""
    return sorted(name for name in mine.keys() & other.keys() if mine[name] != other[name])


def missing(mine: Tree, other: Tree) -> list[str]:
    """The names that only `other` has."""
    return sorted(other.keys() - mine.keys())


def more(mine: Tree, other: Tree) -> dict[str, int]:
    """What only `mine` has, and how many of each name: litter."""
    extra = Counter({name: len(own or [0]) for name, own in mine.items() if name not in other})
    for name, own in mine.items():
        if other.get(name) is not None and own is not None and not name.endswith(MERGED):
            extra[name] += max(0, len(own) - len(other[name]))
    return dict(+extra)
