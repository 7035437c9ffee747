"""How a case breaks a file: each change is a mapping with `do`, `file` (a pattern) and what the change needs."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz import values

PLACES = ("missing", "directory", "fifo", "dangling", "loop", "zero", "full", "socket", "inside-a-file", "sparse")
SPARSE = 8 << 30  # bytes


def apply(folder: Path, change: Mapping[str, Any]) -> None:
    """Break what the change names below `folder`. One that does not fit the file does nothing."""
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        _apply(folder, change)


def _apply(folder: Path, change: Mapping[str, Any]) -> None:
    if change["do"] == "foreign":
        foreign(folder / change["file"], change["what"])
        return
    files = sorted(p for p in folder.glob(change["file"]) if p.is_file() and p.stat().st_size < SPARSE)
    if not files:
        return
    file = files[change.get("pick", 0) % len(files)]
    if change["do"] == "place":
        place(file, change["what"])
    elif change["do"] == "swap":
        others = sorted(p for p in folder.glob(change["with"]) if p.is_file() and p.stat().st_size < SPARSE)
        if others:
            file.write_bytes(others[change.get("other", 0) % len(others)].read_bytes())
    elif change["do"] == "tree":
        tree(file, change)
    else:
        raw(file, change)


def raw(file: Path, change: Mapping[str, Any]) -> None:
    """Flip, cut, insert, append, double: bytes at fractions (in 1/1000) of the file."""
    data = bytearray(file.read_bytes())

    def at(share: int) -> int:
        return min(len(data) * share // 1000, max(len(data) - 1, 0))

    match change["do"]:
        case "flip" if data:
            for share, byte in change["bytes"]:
                data[at(share)] = byte
        case "cut":
            del data[at(change["at"]) :]
        case "head":
            data[: len(change["put"])] = bytes(change["put"])
        case "insert":
            data[at(change["at"]) : at(change["at"])] = encoded(values.whole(change["put"]))
        case "append":
            data += encoded(values.whole(change["put"]))
        case "double":
            data += bytes(data)
    file.write_bytes(data)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def tree(file: Path, change: Mapping[str, Any]) -> None:
    """Replace, remove, rename or add one node of a JSON, JSONL, YAML, Parquet or safetensors file."""
    if file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        number = change["line"] % max(len(lines), 1)
        if lines and (content := parsed(lines[number])) is not None:
            lines[number] = values.dumped(changed(content, change))
            file.write_bytes(encoded("\n".join(lines) + "\n"))
    elif file.suffix == ".safetensors":
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        if (content := parsed(data[8 : 8 + size].decode("utf-8", "replace"))) is not None:
            header = encoded(values.dumped(changed(content, change)))
            file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    elif file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = pq.read_table(file).to_pylist()
        rows = [changed(row, change) if i == change["line"] % len(rows) else row for i, row in enumerate(rows)]
        try:
            pq.write_table(pa.Table.from_pylist(rows), file)
        except (pa.ArrowException, AttributeError, OverflowError, TypeError, ValueError):  # no row of a table
            raw(file, {"do": "cut", "at": change["line"] % 1000})
    else:
        is_yaml = file.suffix == ".yaml"
        content = yaml.safe_load(file.read_text()) if is_yaml else parsed(file.read_text())
        if content is not None:
            file.write_bytes(encoded(values.dumped(changed(content, change), is_yaml)))


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def changed(content: Any, change: Mapping[str, Any]) -> Any:
    """The content with one node changed; `way` chooses a child at every level, by its number."""
    way = change["way"]
    children = list(content) if isinstance(content, dict) else list(range(len(content))) if list_of(content) else []
    if not children or not way:
        return change["value"]
    key = children[way[0] % len(children)]
    if len(way) > 1 and isinstance(content[key], (dict, list)) and content[key]:
        content[key] = changed(content[key], {**change, "way": way[1:]})
    elif change["how"] == "replace":
        content[key] = change["value"]
    elif change["how"] == "remove":
        del content[key]
    elif isinstance(content, list):
        content.insert(key, change["value"])
    elif change["how"] == "rename":
        content[f"{key}{change['name']}"] = content.pop(key)
    else:
        content[change["name"]] = change["value"]
    return content


def list_of(content: Any) -> bool:
    return isinstance(content, list) and bool(content)


def place(file: Path, what: str) -> None:
    """Put something else in a file's place."""
    file.unlink(missing_ok=True)
    if what == "directory":
        (file / "within").mkdir(parents=True)
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "dangling":
        file.symlink_to("no-such-target")
    elif what == "loop":
        file.symlink_to(file.name)
    elif what in ("zero", "full"):
        file.symlink_to(f"/dev/{what}")
    elif what == "socket":
        here = os.getcwd()
        os.chdir(file.parent)  # a socket's path has 107 characters
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(file.name)
        finally:
            os.chdir(here)
    elif what == "inside-a-file":
        parent = file.parent
        if parent.name in ("world", "data", "rows", "verdicts", "reference", "export", "model"):
            shutil.rmtree(parent)
            parent.write_text("a file where a folder belongs")
    elif what == "sparse":
        with file.open("wb") as out:
            out.truncate(SPARSE)


def foreign(file: Path, what: str) -> None:
    """Put something of a user's where a verb keeps its files, or where it will write."""
    if os.path.lexists(file) or not file.parent.is_dir():
        return
    if what == "folder":
        file.mkdir()
        (file / "mine.txt").write_text("written by a user")
    elif what == "file":
        file.write_text("written by a user")
    elif what == "link":
        file.symlink_to(os.path.relpath(file.anchor, file.parent))
    else:
        place(file, what)
