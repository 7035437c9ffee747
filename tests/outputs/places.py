"""Places where no output can be made, and what lies in a folder, for tests of every verb."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FILLED = "filler"  # in a full file system; without it there is room again
KIBIBYTES = 12  # of a full file system: what a verb notes of itself fits, what it makes does not


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[bool]:
    """A small file system at `folder`; False where this machine permits none, such as without CAP_SYS_ADMIN."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tree(folder: Path) -> dict[str, str]:
    """Path -> what it is and holds, of everything below; links are not followed. Empty where there is no folder."""
    entries = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry = Path(place, name)
            if entry.is_symlink():
                held = f"-> {os.readlink(entry)}"
            elif entry.is_file():
                held = hashlib.sha256(entry.read_bytes()).hexdigest()
            else:
                held = "a folder" if entry.is_dir() else "neither file nor folder"
            entries[str(entry.relative_to(folder))] = held
    return entries


def litter(folder: Path) -> list[str]:
    """What a verb may have below a folder while it runs, but not afterwards."""
    return [name for name in tree(folder) if name.endswith((".tmp", ".gone", ".part.jsonl")) or ".mirage_dist" in name]


def file_in_the_way(out: Path) -> None:
    out.write_text("theirs")


def file_for_a_parent(out: Path) -> None:
    out.parent.rmdir()
    out.parent.write_text("theirs")


def link_to_nowhere(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


def pipe(out: Path) -> None:
    os.mkfifo(out)


def folder_with_files(out: Path) -> None:
    (out / "theirs").mkdir(parents=True)
    (out / "theirs" / "notes.tmp").write_text("theirs")
    (out / "work-2024.csv").write_text("theirs")


def linked_folder_with_files(out: Path) -> None:
    folder_with_files(out.parent / "elsewhere")
    out.symlink_to(out.parent / "elsewhere")


IN_THE_WAY: tuple[Callable[[Path], None], ...] = (
    file_in_the_way,
    file_for_a_parent,
    link_to_nowhere,
    pipe,
    folder_with_files,
    linked_folder_with_files,
)
