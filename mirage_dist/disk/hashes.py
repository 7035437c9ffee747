"""SHA-256 of files that are hashed again and again, remembered from one process to the next.

    $MIRAGE_CACHE/hashes/0123456789abcdef….json     of the files of one folder, by name

What is remembered counts as long as a file has the same size, inode, and times of modification and change. A file that
was changed shortly before it was hashed is not remembered: it could change again within one tick of the file system's
clock, and nothing but its content would show it (git calls such entries racy). Of the processes that want a large
folder's hashes at the same time, one reads the files, where the file system has locks.

The store saves time and decides nothing: one that is damaged, foreign, locked for ever or not writable is as one that
is empty. MIRAGE_CACHE is `$XDG_CACHE_HOME/mirage_dist` or `~/.cache/mirage_dist` unless it is set; MIRAGE_REHASH=1 has
every file read.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from mirage_dist import disk, state
from mirage_dist.disk import digests
from mirage_dist.schema.errors import ConfigError, RunError

PLACE, INSIST = "MIRAGE_CACHE", "MIRAGE_REHASH"  # environment variables
# A file that was left alone for so long is remembered: the clocks of file systems tick every 2 s (FAT) or less.
SETTLED_SECONDS = 5.0
SHARED_BYTES = 1 << 28  # for so much to read, processes wait for each other, and a young file is given time to settle
SLOWEST = 1 << 25  # bytes a second; who reads slower is not waited for
POLL_SECONDS = 0.1
RECORDS = 512  # folders that are remembered; the ones that were written longest ago go
THREADS = 8
DIGEST = re.compile(r"[0-9a-f]{64}")

Identity = tuple[int, int, int, int]  # size, times of modification and change in ns, inode


class _Entry(NamedTuple):
    identity: Identity
    digest: str


def sha256(file: str | Path) -> str:
    """SHA-256 of a regular file's content, read unless it is known. Raises OSError."""
    return sha256s([file])[str(file)]


def sha256s(files: Iterable[str | Path], otherwise: Callable[[str], str] = disk.sha256) -> dict[str, str]:
    """Path as given -> SHA-256 of the file's content; files that are not known are read by several threads.

    otherwise: hashes what is no file of its own, such as a table's row; also what raises for a path that leads nowhere.
    Raises OSError.
    """
    digests: dict[str, str] = {}
    folders: dict[str, list[str]] = {}
    for path in dict.fromkeys(map(str, files)):
        if os.path.isfile(path):
            folders.setdefault(os.path.dirname(os.path.abspath(path)), []).append(path)
        else:
            digests[path] = otherwise(path)
    for folder, paths in folders.items():
        digests |= _of_folder(folder, paths)
    return digests


def _of_folder(folder: str, paths: list[str]) -> dict[str, str]:
    record = _record(folder)
    digests, unknown = _known(record, folder, paths)
    if not unknown:
        return digests
    sizes = [os.stat(path).st_size for path in unknown]
    with _waiting_for_others(record, sum(sizes)) as waited:
        if waited:
            more, unknown = _known(record, folder, unknown)
            digests |= more
        if sum(sizes) >= SHARED_BYTES:
            _let_settle(unknown)
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            hashed = dict(zip(unknown, pool.map(_hash, unknown), strict=True))
        entries = {os.path.basename(path): entry for path, (_, entry) in hashed.items() if entry is not None}
        if record is not None and entries:
            _remember(record, folder, entries)
    return digests | {path: digest for path, (digest, _) in hashed.items()}


def _known(record: Path | None, folder: str, paths: list[str]) -> tuple[dict[str, str], list[str]]:
    """The hashes that are remembered, and the paths of the others."""
    if record is None or os.environ.get(INSIST, "0") not in ("", "0"):
        return {}, paths
    entries, known = _read(record, folder), {}
    for path in paths:
        entry = entries.get(os.path.basename(path))
        if entry is not None and entry.identity == _identity(os.stat(path)):
            known[path] = entry.digest
    return known, [path for path in paths if path not in known]


def _hash(path: str) -> tuple[str, _Entry | None]:
    """SHA-256 of a file, and what may be remembered of it: nothing if it is young or changed while it was read."""
    began = time.time()
    with digests.open_regular(path) as handle:
        before = os.fstat(handle.fileno())
        digest = digests.digest_of(handle)
        after = os.fstat(handle.fileno())
    whole = _identity(before) == _identity(after) and _age(before, began) >= SETTLED_SECONDS
    return digest, _Entry(_identity(before), digest) if whole else None


def _identity(status: os.stat_result) -> Identity:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _age(status: os.stat_result, now: float) -> float:
    """Seconds since a file was changed; negative for one from the future, whose clock says nothing."""
    return now - max(status.st_mtime, status.st_ctime)


def _let_settle(paths: list[str]) -> None:
    """Wait until files that were written a moment ago may be remembered: cheaper than to read them again."""
    ages = [_age(os.stat(path), time.time()) for path in paths]
    time.sleep(max((SETTLED_SECONDS - age for age in ages if 0 <= age < SETTLED_SECONDS), default=0.0))


# ------------------------------------------------------------------------------------------------------ the store


def place() -> Path | None:
    """The folder of the store; None where this user has none."""
    if given := os.environ.get(PLACE):
        return Path(given).absolute()
    base, home = os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative ones ignored
        return Path(base) / "mirage_dist"
    return Path(home) / ".cache" / "mirage_dist" if os.path.isabs(home) else None


def _record(folder: str) -> Path | None:
    where = place()
    return where and where / "hashes" / f"{disk.sha256_text(os.fsencode(folder))[:32]}.json"


def _read(record: Path, folder: str) -> dict[str, _Entry]:
    """What is remembered of a folder's files; nothing where that cannot be read, or where another user wrote it."""
    try:
        if record.stat().st_uid != os.geteuid():
            return {}
        content = state.read("hashes", record)
        entries = {name: _Entry(tuple(map(int, of[:4])), of[4]) for name, of in content["files"].items()}  # type: ignore[arg-type]
        return entries if content["folder"] == folder and all(map(_sound, entries.values())) else {}
    except (OSError, ConfigError, RunError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return {}


def _sound(entry: _Entry) -> bool:
    return len(entry.identity) == 4 and bool(DIGEST.fullmatch(entry.digest))


def _remember(record: Path, folder: str, entries: Mapping[str, _Entry]) -> None:
    """Add entries to a record. Of two writers at the same time the second may undo the first: that costs a reading."""
    try:
        present = {entry.name for entry in os.scandir(folder)}
        files = {**_read(record, folder), **entries}
        rows = {name: [*files[name].identity, files[name].digest] for name in sorted(files.keys() & present)}
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = state.sealed("hashes", {"folder": folder, "files": rows}, compact=True)
        disk.write(record, text, durable=False, private=True)
        _limit(record.parent)
    except (OSError, ConfigError, RunError):
        return


def _limit(folder: Path) -> None:
    records = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for record in records[:-RECORDS]:
        record.unlink(missing_ok=True)
        record.with_suffix(".lock").unlink(missing_ok=True)


@contextmanager
def _waiting_for_others(record: Path | None, size: int) -> Iterator[bool]:
    """Of processes that are to read `size` bytes of a folder, one at a time is in such a block, if these are many.

    Yields whether this process has waited for another one, which may have left what it needs. A process that dies lets
    the next one in, and nobody waits much longer than reading takes.
    """
    lock = None if record is None or size < SHARED_BYTES else _open_lock(record.with_suffix(".lock"))
    waited = False
    try:
        end = time.monotonic() + SETTLED_SECONDS + size / SLOWEST
        while lock is not None and time.monotonic() < end:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = True
                time.sleep(POLL_SECONDS)
            except OSError:  # a network file system without locks
                break
        yield waited
    finally:
        if lock is not None:
            os.close(lock)


def _open_lock(file: Path) -> int | None:
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return None
