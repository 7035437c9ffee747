"""Files and folders that appear whole or not at all: writing, syncing, modes.

Every function writes in a temporary folder with a random name and then renames or links what it holds, so a reader sees
the old content or the new content. A process that is killed leaves at most that folder, `NAME.HEX.tmp`; the first write
of a later process beside it removes it. An error of the operating system names the path that was to be written, not the
temporary, also where a library wrote and raised an exception of its own.

Modes follow one rule. What holds model output on harmful questions is private: its owner alone may read it (0600 for
files, 0700 for folders), whatever the umask. Everything else, weights included, gets the mode that a plain `open` or
`mkdir` gives under the umask, also where a library made the file through a private temporary (safetensors does).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mirage_dist.disk import faults, removal
from mirage_dist.disk.digests import digest as digest
from mirage_dist.disk.digests import sha256 as sha256
from mirage_dist.disk.digests import sha256_files as sha256_files
from mirage_dist.disk.digests import sha256_text as sha256_text
from mirage_dist.disk.faults import check_place as check_place
from mirage_dist.disk.removal import MARK as MARK
from mirage_dist.disk.removal import detach as detach
from mirage_dist.disk.removal import discard as discard
from mirage_dist.disk.removal import leftovers as leftovers
from mirage_dist.disk.removal import own as own
from mirage_dist.disk.removal import owned as owned
from mirage_dist.disk.removal import remove as remove
from mirage_dist.disk.removal import remove_leftovers as remove_leftovers
from mirage_dist.disk.removal import remove_leftovers_in as remove_leftovers_in
from mirage_dist.disk.removal import remove_own as remove_own
from mirage_dist.schema import documents
from mirage_dist.schema.errors import ConfigError, RunError

REFUSALS = faults.NO_MORE_DATA
CHUNK_BYTES = 1 << 24  # written and hashed at once

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
    workspace: the folder of the temporary file, on the same file system; default: a new one beside `file`, whose folder
    is made if it is missing. A workspace is never made: where another job has removed it, the write fails with
    FileNotFoundError.

    Raises OSError with the name of `file`, which is then unchanged; the temporary is removed.
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
    except (ConfigError, RunError):
        raise
    except Exception as error:
        if (number := faults.no_more_data(error)) is None:
            raise
        reason = f"[Errno {number}] {os.strerror(number)}"
        raise RunError(f"{place}: cannot be written ({reason}); {kept}") from error


@contextmanager
def _temporary(file: Path, durable: bool, private: bool, workspace: Path | None) -> Iterator[tuple[BinaryIO, Path]]:
    with _beside(file, workspace is None) as outer:
        temporary = outer / file.name if workspace is None else removal.sibling(file, workspace)
        try:
            with (
                _naming(file, temporary),
                open(temporary, "xb", opener=_private_opener if private else None) as handle,
            ):
                yield handle, temporary
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def _beside(path: Path, wanted: bool) -> Iterator[Path]:
    """A temporary folder beside `path` with this process's mark, removed in the end. Not wanted: the folder of `path`.

    The first such block of a process at a place removes what dead processes have left of theirs.
    """
    if not wanted:
        yield path.parent
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    removal.remove_leftovers_in(path.parent)
    outer = removal.sibling(path)
    try:
        with _naming(path, outer):
            own(outer, parents=False)
        yield outer
    finally:
        with suppress(OSError):
            removal.clear(outer)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Let an error of writing name `path` instead of the temporary, and be an OSError, whatever a library raised."""
    try:
        yield
    except OSError as error:
        named = error.filename is not None and not str(error.filename).startswith(str(temporary))
        if not named and error.errno in (*REFUSALS, *faults.PATHS):
            error.filename, error.filename2 = str(path), None
        raise
    except (ConfigError, RunError):
        raise
    except Exception as error:
        if (number := faults.no_more_data(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


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
    if workspace is None:
        remove_leftovers(out)  # also where `out` is whole: a process may be killed just after it has got its name
    if not shared and _occupied(out):
        raise ConfigError(f"{out} exists; choose a new directory")
    with _beside(out, workspace is None) as outer:
        if workspace is None:
            yield from _filled(outer, out, durable, private, shared)
            return
        outer = own(removal.sibling(out, workspace), parents=False)
        try:
            yield from _filled(outer, out, durable, private, shared)
        finally:
            with suppress(OSError):
                removal.clear(outer)


def _filled(outer: Path, out: Path, durable: bool, private: bool, shared: bool) -> Iterator[Path]:
    temporary = outer / out.name
    with _naming(out, outer):
        temporary.mkdir(mode=0o700 if private else 0o777)
        made = temporary.stat()
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
    if durable:
        sync_folder(out.parent)


def _occupied(out: Path) -> bool:
    """Whether something else than an empty folder lies at `out`, be it a link that leads nowhere."""
    if out.is_symlink() or not out.is_dir():
        return os.path.lexists(out)
    return any(out.iterdir())


@contextmanager
def files(out: Path, sign: tuple[str, str], others: Sequence[str] = (), *, private: bool = False) -> Iterator[Path]:
    """A new temporary folder for files, which become those of `out` when the block succeeds: all of them, or none.

    sign: one of the files and how it begins, which shows whether files of these names in `out` were written here, and
    may be replaced, or are somebody else's. others: names that only some calls write; what an earlier one wrote goes.

    Files of other names in `out` stay. Of two processes the second waits for the first one's renames. No reader finds
    new files beside earlier ones, nor does a kill leave them so: the earlier ones are removed, all but the sign, before
    the new ones are renamed, the sign first. Meanwhile, and after a kill until the next call, some are missing.

    Raises OSError, and ConfigError where a folder or somebody else's file lies in the way of a file; `out` is
    then unchanged.
    """
    new = not os.path.lexists(out)
    remove_leftovers(out)
    with _beside(out if new else out / "files", True) as outer, _naming(out, outer):
        temporary = outer / "files"
        temporary.mkdir(mode=0o700 if private else 0o777)
        yield temporary
        _settle(temporary, temporary.stat().st_mode, durable=True)
        try:
            if new:
                os.rename(temporary, out)
        except OSError:
            if not os.path.lexists(out):
                raise
        if temporary.is_dir():  # `out` exists, or another process was first
            _replace(temporary, out, sign, others)
    sync_folder(out.parent)


def _replace(source: Path, out: Path, sign: tuple[str, str], others: Sequence[str]) -> None:
    """Rename the files of a folder into `out`, the sign first: an interrupted call is still known as ours."""
    names = sorted((entry.name for entry in source.iterdir()), key=lambda name: (name != sign[0], name))
    for name in names:
        if (out / name).is_dir() and not (out / name).is_symlink():
            raise ConfigError(f"{out / name} is a folder, where a file is to be written; choose another place")
    with alone(out):
        if (theirs := next((name for name in names if (out / name).exists()), None)) and not _begins(out, sign):
            raise ConfigError(f"{out / theirs} exists, and mirage_dist did not write it; choose another place")
        if _begins(out, sign):
            for name in {*names, *others} - {sign[0]}:
                with suppress(IsADirectoryError):  # a user's, of a name that this call does not write
                    (out / name).unlink(missing_ok=True)
        for name in names:
            os.replace(source / name, out / name)
    sync_folder(out)


def _begins(folder: Path, sign: tuple[str, str]) -> bool:
    try:
        with documents.open_file(folder / sign[0]) as handle:
            return handle.read(len(sign[1].encode())) == sign[1].encode()
    except (ConfigError, OSError):
        return False


@contextmanager
def alone(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Of all processes, one at a time is in such a block of a folder, where the file system has locks.

    wait: for the process that is; otherwise False at once, and the caller must not go on. A process that dies frees the
    folder. Raises OSError when there is no folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _locked(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        pass
    return True


def _settle(root: Path, mode: int, durable: bool) -> None:
    """Give every entry below `root` the mode that `root` got from the umask, and sync it."""
    for place, _, files in os.walk(root, topdown=False):
        for name in files:
            file = Path(place, name)
            if not file.is_symlink():
                file.chmod(mode & (0o777 if file.stat().st_mode & 0o100 else 0o666))  # a script stays one
                if durable:
                    _sync(file)
        Path(place).chmod(mode & 0o7777)
        if durable:
            _sync(Path(place))
