"""Removal of what this package made: marked folders, leftovers of dead processes, what others still write into.

Nothing is removed for its name, which a user may have chosen too: a folder that this package may remove again holds a
file `.mirage_dist` with the process that made it (see `own`). No other module removes folders.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mirage_dist import liveness, signals
from mirage_dist.liveness import Owner
from mirage_dist.schema.errors import ConfigError

TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.(tmp|gone)")  # follows the name of the file or folder that was being written
MARK = ".mirage_dist"  # in a folder that this package made and may remove: its maker (see `liveness.Owner`), as JSON
UNFINISHED = f"{MARK}.part"  # becomes the mark when it is whole
REMOVAL_ATTEMPTS, REMOVAL_PAUSE = 20, 0.1  # seconds
ABANDONED_SECONDS = 3600.0  # after which a temporary folder without a readable mark is taken for abandoned
_searched: set[tuple[int, Path]] = set()  # process and folder (see `remove_leftovers_in`)


def sibling(path: Path, folder: Path | None = None, suffix: str = "tmp") -> Path:
    """A new random name for a temporary of `path`, in `folder` (default: its own)."""
    return (folder or path.parent) / f"{path.name}.{secrets.token_hex(4)}.{suffix}"


def own(folder: Path, owner: Owner | None = None, *, parents: bool = True) -> Path:
    """Make `folder` with the mark of `owner` (default: this process), and return it; `remove_own` may remove it.

    A folder that has the mark keeps it. Raises ConfigError when `folder` exists without the mark and is not empty.
    """
    while True:
        # Without a mark the folder is anybody's to remove: its maker may have died. A living one then starts again.
        folder.mkdir(parents=parents, exist_ok=True)
        if not owned(folder):
            if not os.path.lexists(folder):
                continue
            raise ConfigError(f"{folder} exists, and mirage_dist did not make it; move it away or choose another place")
        if (folder / MARK).exists():
            return folder
        with suppress(FileNotFoundError):
            (folder / UNFINISHED).write_text(json.dumps((owner or Owner.current()).record()) + "\n")
            os.rename(folder / UNFINISHED, folder / MARK)


def owned(folder: Path) -> bool:
    """Whether this package made the folder: it has the mark, or its maker or its removal ended before anything else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return (folder / MARK).is_file() or all(entry.name == UNFINISHED for entry in folder.iterdir())
    except FileNotFoundError:  # removed since the look
        return False


@contextmanager
def removed_in_the_end() -> Iterator[list[Path]]:
    """A list for folders with a mark (see `own`), which are removed at the end of the block, also by a signal."""
    made: list[Path] = []

    def clear() -> None:
        for folder in made:
            with suppress(OSError):
                remove_own(folder)

    with signals.before_end(clear):
        try:
            yield made
        finally:
            clear()


def remove_own(folder: Path) -> bool:
    """Remove a folder that has the mark, as `remove` does; False, and nothing is removed, where it has none."""
    if not owned(folder):
        return False
    if not (folder / MARK).exists():
        return _remove_unmarked(folder)
    try:
        gone = detach(folder)
    except FileNotFoundError:  # another process removes it too
        return False
    if not owned(gone):  # somebody has put another one there since the look
        os.rename(gone, folder)
        return False
    discard(gone)
    return True


def _remove_unmarked(folder: Path) -> bool:
    """Remove a folder that has no mark yet. False where it has got one meanwhile: its maker lives."""
    try:
        (folder / UNFINISHED).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return False
    return True


def leftovers(path: Path) -> list[Path]:
    """Folders beside `path` in which processes that have died since were writing it."""
    return [entry for entry in _temporaries(path) if _abandoned(entry)]


def remove_leftovers(path: Path) -> None:
    """Remove the leftovers of `path`."""
    for entry in _temporaries(path):
        _remove_leftover(entry)


def _temporaries(path: Path) -> list[Path]:
    """Folders of ours beside `path` in which processes, living or dead, write it."""
    beside = path.parent.glob(f"{glob.escape(path.name)}.*") if path.parent.is_dir() else ()
    return sorted(entry for entry in beside if TEMPORARY.fullmatch(entry.name, len(path.name)) and owned(entry))


def remove_leftovers_in(folder: Path) -> None:
    """Remove what dead processes have left of any name in a folder, at the first call of this process for it."""
    if (os.getpid(), folder) in _searched:
        return
    _searched.add((os.getpid(), folder))
    for entry in folder.iterdir() if folder.is_dir() else ():
        if TEMPORARY.search(entry.name, max(0, len(entry.name) - 13)) and owned(entry):
            _remove_leftover(entry)


def _remove_leftover(folder: Path) -> None:
    """Remove a folder of ours if its maker has died. One without a mark is never removed by `detach`, which would take
    the folder of a maker that marks it at this moment.
    """
    with suppress(OSError):  # another process removes it too
        if not (folder / MARK).exists():
            _remove_unmarked(folder)
        elif _abandoned(folder):
            remove_own(folder)


def _abandoned(folder: Path) -> bool:
    """Whether the maker of a folder has died. False where this process cannot see that, as from another host."""
    if not (folder / MARK).exists():
        return True  # see `own`
    record = liveness.read(folder / MARK)
    if record is None:  # cut by a power failure
        try:
            return time.time() - folder.stat().st_mtime > ABANDONED_SECONDS
        except FileNotFoundError:  # its maker has removed it since the look
            return False
    owner = Owner.from_record(record)
    return owner.superseded() or owner.alive() is False


def detach(path: Path, workspace: Path | None = None) -> Path:
    """Rename `path` in one step to a name that nobody reads, and return it; the caller then removes that.

    From then on no path of a former owner leads anywhere, so it can publish nothing, not even a folder half of whose
    files are gone. Raises FileNotFoundError when there is nothing at `path`.
    """
    # A name that is already detached does not grow with each attempt.
    name = TEMPORARY.sub("", path.name) if path.suffix == ".gone" else path.name
    gone = sibling(path.with_name(name), workspace, "gone")
    os.rename(path, gone)
    return gone


def remove(path: Path, workspace: Path | None = None) -> None:
    """Remove a file, a link or a folder if it exists, although a former owner may still be writing into it.

    For paths whose name and place are this package's own; `remove_own` is for those that a user may have made.
    A link is removed, never what it points to. Raises OSError when something keeps writing into the folder.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    try:
        gone = detach(path, workspace)
    except FileNotFoundError:
        return
    discard(gone)


def discard(gone: Path) -> None:
    """Remove what `detach` returned. Raises OSError when something keeps writing into it."""
    if gone.is_symlink() or not gone.is_dir():
        gone.unlink(missing_ok=True)
        return
    for _ in range(REMOVAL_ATTEMPTS):
        with suppress(OSError):
            clear(gone)
        if not gone.exists():
            return
        time.sleep(REMOVAL_PAUSE)
    raise OSError(f"{gone} cannot be removed: something keeps writing into it")


def clear(folder: Path) -> None:
    """Remove a folder, the mark last, so that the rest of an interrupted removal is still known as ours."""
    for entry in folder.iterdir():
        if entry.name == MARK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()
