"""Files and folders that appear whole or not at all: writing, syncing, modes, digests, removal.

Every function writes to a temporary path with a random name and then renames or links it, so a reader sees the old
content or the new content, and an interrupted write leaves at most a file or folder named `NAME.HEX.tmp`.

Nothing is removed for its name, which a user may have chosen too: a folder that this package may remove again holds a
file `.mirage_dist` with the process that made it (see `own`). No other module removes folders.

Modes follow one rule. What holds model output on harmful questions is private: its owner alone may read it (0600 for
files, 0700 for folders), whatever the umask. Everything else, weights included, gets the mode that a plain `open` or
`mkdir` gives under the umask, also where a library made the file through a private temporary (safetensors does).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mirage_dist import liveness
from mirage_dist.liveness import Owner
from mirage_dist.schema.errors import ConfigError, RunError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors of a disk that accepts no more data
TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.(tmp|gone)")  # follows the name of the file or folder that was being written
MARK = ".mirage_dist"  # in a folder that this package made and may remove: its maker (see `liveness.Owner`), as JSON
CHUNK_BYTES = 1 << 24  # written and hashed at once
REMOVAL_ATTEMPTS, REMOVAL_PAUSE = 20, 0.1  # seconds
ABANDONED_SECONDS = 3600.0  # after which a temporary folder without a readable mark is taken for abandoned

Piece = str | bytes | bytearray | memoryview
Content = Piece | Iterable[Piece]


@dataclass(frozen=True)
class Written:
    """Size and SHA-256 of the content that a file was meant to get, computed while writing.

    A disk that stores something else is noticed when the file is hashed again.
    """

    bytes: int
    sha256: str


# ------------------------------------------------------------------------------------------------- writing files


def write(
    file: Path, content: Content, *, durable: bool = True, private: bool = False, workspace: Path | None = None
) -> Written:
    """Replace `file` atomically by `content`: text (encoded as UTF-8), bytes, or an iterable of either.

    durable: the file survives a power failure from the moment this returns.
    private: only the owner may read it (see the module's rule).
    workspace: the folder of the temporary, on the same file system; default: the file's own folder, which is made if
    it is missing. A workspace is never made: where another job has removed it, the write fails with FileNotFoundError.

    Raises OSError; `file` is then unchanged and the temporary is removed.
    """
    with writing(file, durable=durable, private=private, workspace=workspace) as handle:
        return _put(handle, content)


def create(
    file: Path, content: Content, *, durable: bool = True, private: bool = True, workspace: Path | None = None
) -> bool:
    """Write `file` as `write` does, but never replace: False when it exists.

    Of several processes that create one file at the same time, exactly one gets True, on NFS too.
    """
    with _temporary(file, durable, private, workspace) as (handle, temporary):
        _put(handle, content)
        _finish(handle, durable)
        try:
            os.link(temporary, file)  # atomic on NFS too; unlike a rename it never replaces
        except FileExistsError:
            return False
    if durable:
        sync_folder(file.parent)
    return True


@contextmanager
def writing(
    file: Path, *, durable: bool = True, private: bool = False, workspace: Path | None = None
) -> Iterator[BinaryIO]:
    """A seekable binary handle for content that a library streams; `file` is replaced when the block succeeds.

    Options and errors are those of `write`.
    """
    with _temporary(file, durable, private, workspace) as (handle, temporary):
        yield handle
        _finish(handle, durable)
        os.replace(temporary, file)
    if durable:
        sync_folder(file.parent)


def publish(path: Path, target: Path) -> None:
    """Sync the file or the folder `path` and rename it to `target`, replacing a file or an empty folder there.

    Of a folder, the entries are synced, not the files in it: whoever wrote these has synced them.
    """
    _sync(path)
    os.replace(path, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Sync the entries of a folder, so that a rename in it survives a power failure."""
    _sync(folder)


@contextmanager
def private_umask() -> Iterator[None]:
    """Files and folders that any code creates in the block are readable by their owner only. Not for threads."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def refusals(place: Path, kept: str) -> Iterator[None]:
    """Raise RunError when a write under `place` fails because the disk accepts no more data (full, quota, read-only).

    kept: says what is still whole, and completes the message. Other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno in REFUSALS:
            raise RunError(f"{place}: cannot be written ({error}); {kept}") from error
        raise


@contextmanager
def _temporary(file: Path, durable: bool, private: bool, workspace: Path | None) -> Iterator[tuple[BinaryIO, Path]]:
    if workspace is None:
        file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(file, workspace)
    try:
        with open(temporary, "xb", opener=_private_opener if private else None) as handle:
            yield handle, temporary
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _sibling(path: Path, workspace: Path | None, suffix: str = "tmp") -> Path:
    return (workspace or path.parent) / f"{path.name}.{secrets.token_hex(4)}.{suffix}"


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _put(handle: BinaryIO, content: Content) -> Written:
    pieces = [content] if isinstance(content, str | bytes | bytearray | memoryview) else content
    size, sha256 = 0, hashlib.sha256()
    for piece in pieces:
        view = memoryview(piece.encode() if isinstance(piece, str) else piece).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            handle.write(chunk)
            sha256.update(chunk)
        size += len(view)
    return Written(size, sha256.hexdigest())


def _finish(handle: BinaryIO, durable: bool) -> None:
    """Close the file before it gets its name: on some network file systems only that reports a full disk."""
    handle.flush()
    if durable:
        os.fsync(handle.fileno())
    handle.close()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ writing folders


@contextmanager
def folder(
    out: Path, *, workspace: Path | None = None, durable: bool = True, private: bool = False, shared: bool = False
) -> Iterator[Path]:
    """A new temporary folder to fill, which becomes `out` when the block succeeds and is removed otherwise.

    workspace: the folder of the temporary (see `write`). durable: every file in it is synced first.
    shared: other processes may write the same content at the same time; the first one wins, and `out` may exist.

    Files in it get the modes of the module's rule, however they were made. An empty folder `out` is replaced. What
    processes that have died since left of their attempts at `out` is removed first.
    Raises ConfigError when `out` exists (unless shared), before the block starts or after it; RunError when the
    temporary was removed while it was filled, as happens to a job whose workspace another job has taken over.
    """
    if not shared and _occupied(out):
        raise ConfigError(f"{out} exists; choose a new directory")
    if workspace is None:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
    outer = own(_sibling(out, workspace), parents=False)
    temporary = outer / out.name
    temporary.mkdir(mode=0o700 if private else 0o777)
    made = temporary.stat()
    try:
        yield temporary
        # Libraries make folders that are missing: one that was removed may exist again, with half of its files.
        if not temporary.is_dir() or not os.path.samestat(made, temporary.stat()):
            raise RunError(f"{outer}: was removed while it was written; nothing was put at {out}")
        _settle(temporary, made.st_mode, durable)
        try:
            os.rename(temporary, out)
        except OSError:
            if not _occupied(out):
                raise
            if not shared:
                raise ConfigError(f"{out} exists; another process has written it meanwhile") from None
    finally:
        with suppress(OSError):
            _remove_tree(outer)
    if durable:
        sync_folder(out.parent)


def _occupied(out: Path) -> bool:
    return out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir()))


def _settle(root: Path, mode: int, durable: bool) -> None:
    """Give every entry below `root` the mode that `root` got from the umask, and sync it."""
    for place, _, files in os.walk(root, topdown=False):
        for name in files:
            file = Path(place, name)
            if not file.is_symlink():
                file.chmod(mode & 0o666)
                if durable:
                    _sync(file)
        Path(place).chmod(mode & 0o7777)
        if durable:
            _sync(Path(place))


# ------------------------------------------------------------------------------------------------------- removal


def own(folder: Path, owner: Owner | None = None, *, parents: bool = True) -> Path:
    """Make `folder` with the mark of `owner` (default: this process), and return it; `remove_own` may remove it.

    A folder that has the mark keeps it. Raises ConfigError when `folder` exists without the mark and is not empty.
    """
    folder.mkdir(parents=parents, exist_ok=True)
    if not owned(folder):
        raise ConfigError(f"{folder} exists, and mirage_dist did not make it; move it away or choose another place")
    if not (folder / MARK).exists():
        (folder / MARK).write_text(json.dumps((owner or Owner.current()).record()) + "\n")
    return folder


def owned(folder: Path) -> bool:
    """Whether this package made the folder: it has the mark, or its maker or its removal ended before anything else."""
    return not folder.is_symlink() and folder.is_dir() and ((folder / MARK).is_file() or not any(folder.iterdir()))


def remove_own(folder: Path) -> bool:
    """Remove a folder that has the mark, as `remove` does; False, and nothing is removed, where it has none."""
    if not owned(folder):
        return False
    remove(folder)
    return True


def leftovers(path: Path) -> list[Path]:
    """Folders beside `path` in which processes that have died since were writing it."""
    beside = path.parent.glob(f"{glob.escape(path.name)}.*") if path.parent.is_dir() else ()
    names = (entry for entry in beside if TEMPORARY.fullmatch(entry.name, len(path.name)))
    return sorted(entry for entry in names if owned(entry) and _abandoned(entry))


def remove_leftovers(path: Path) -> None:
    """Remove the leftovers of `path`."""
    for entry in leftovers(path):
        with suppress(OSError):  # another process removes them too
            remove_own(entry)


def _abandoned(folder: Path) -> bool:
    """Whether the maker of a folder has died. False where this process cannot see that, as from another host."""
    record = liveness.read(folder / MARK)
    if record is None:  # empty, or cut by a power failure
        return time.time() - folder.stat().st_mtime > ABANDONED_SECONDS
    owner = Owner.from_record(record)
    return owner.superseded() or owner.alive() is False


def detach(path: Path, workspace: Path | None = None) -> Path:
    """Rename `path` in one step to a name that nobody reads, and return it; the caller then removes that.

    From then on no path of a former owner leads anywhere, so it can publish nothing, not even a folder half of whose
    files are gone. Raises FileNotFoundError when there is nothing at `path`.
    """
    # A name that is already detached does not grow with each attempt.
    name = TEMPORARY.sub("", path.name) if path.suffix == ".gone" else path.name
    gone = _sibling(path.with_name(name), workspace, "gone")
    os.rename(path, gone)
    return gone


def remove(path: Path, workspace: Path | None = None) -> None:
    """Remove a file, a link or a folder if it exists, although a former owner may still be writing into it.

    For paths whose name and place are this package's own; `remove_own` is for those that a user may have made.
    A link is removed, never what it points to. Raises OSError when something keeps writing into the folder.
    """
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
            _remove_tree(gone)
        if not gone.exists():
            return
        time.sleep(REMOVAL_PAUSE)
    raise OSError(f"{gone} cannot be removed: something keeps writing into it")


def _remove_tree(folder: Path) -> None:
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


# ------------------------------------------------------------------------------------------------------- digests


def sha256(file: str | Path) -> str:
    """SHA-256 of a file's content. Raises OSError."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_text(text: str | bytes) -> str:
    """SHA-256 of a text in UTF-8, or of bytes."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def sha256_files(files: Iterable[Path], folder: Path) -> str:
    """SHA-256 over files in the order of their names: name, a zero byte and the binary SHA-256 of the content, each.

    A name is the path within `folder`. Raises OSError.
    """
    total = hashlib.sha256()
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        total.update(os.fsencode(name) + b"\0" + bytes.fromhex(sha256(file)))
    return total.hexdigest()


def digest(tree: Any, default: Callable[[Any], Any] | None = None) -> str:
    """SHA-256 of a tree as JSON with sorted keys.

    default: turns what JSON cannot hold into what it can (see `json.dumps`); without it TypeError is raised.
    """
    return sha256_text(json.dumps(tree, sort_keys=True, default=default))
