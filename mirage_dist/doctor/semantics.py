"""What claims, leases, caches and checkpoints need of a file system, tried on it.

`disk` writes by renaming over the old name; workers of an evaluation claim by hard links; two starts that come at once
decide by locks; a checkpoint survives a power failure by syncing its folder; a rank on another node has to see a
heartbeat, a claim or a takeover within seconds.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mirage_dist import liveness
from mirage_dist.doctor import peer
from mirage_dist.doctor.checks import Context, Verdict, failed, not_here, ok, warning
from mirage_dist.ranks import barrier, everyones
from mirage_dist.train.lease import BEATS_MISSED

RENAMES, CONTENDERS, ROUNDS = 200, 8, 5
COARSE = 0.1  # seconds; a file that changes twice within the granularity may look unchanged
CLOCK = 5.0  # seconds between this host's clock and the file server's
PAUSE, SEEN_WARNING = 0.02, 3.0  # seconds
PATIENCE = BEATS_MISSED * liveness.BEAT_SECONDS  # a living owner whose beat is seen later is taken for dead
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
UNWRITABLE = "not tried: nothing can be written there"
MOVE = "put run.dir on another file system (Lustre, GPFS, NFS 4, ext4, XFS), and --dir there"


def _peer(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", peer.__file__, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _own(context: Context, name: str) -> Path:
    """A new folder of this rank."""
    assert context.place is not None
    folder = context.place / f"{name}-{context.group.rank}"
    folder.mkdir()
    return folder


def rename(context: Context) -> Verdict:
    """A reader in another process while the file is replaced over and over."""
    if context.place is None:
        return not_here(UNWRITABLE)
    folder = _own(context, "rename")
    file, stop = folder / "file", folder / "stop"
    file.write_bytes(b"A" * peer.SIZE)
    reader = _peer("read", file, stop)
    assert reader.stdout is not None
    try:
        reader.stdout.readline()
        for number in range(RENAMES):
            (folder / "new").write_bytes(b"AB"[number % 2 :][:1] * peer.SIZE)
            os.replace(folder / "new", file)
    finally:
        stop.touch()
        output, errors = reader.communicate(timeout=60)
    if reader.returncode:
        return failed(f"the reader ended: {errors.strip().splitlines()[-1:]}", MOVE)
    counts = {name: int(count) for name, _, count in (word.partition("=") for word in output.split())}
    if counts["torn"] or counts["missing"]:
        return failed(
            f"a reader found the file missing {counts['missing']} and torn {counts['torn']} times while it was "
            f"replaced {RENAMES} times: a rename over a name is not one step here",
            MOVE,
            **counts,
        )
    return ok(f"over a name in one step: {counts['whole']} reads during {RENAMES} renames were whole", **counts)


def _contended(work: Callable[[int], bool]) -> list[int]:
    """How many of CONTENDERS succeeded at the same thing at once, in each of some rounds."""
    with ThreadPoolExecutor(CONTENDERS) as pool:
        return [sum(pool.map(work, range(number * CONTENDERS, (number + 1) * CONTENDERS))) for number in range(ROUNDS)]


def links(context: Context) -> Verdict:
    if context.place is None:
        return not_here(UNWRITABLE)
    folder = _own(context, "links")

    def link(number: int) -> bool:
        own = folder / f"own-{number}"
        own.write_text("")
        try:
            os.link(own, folder / f"claim-{number // CONTENDERS}")
        except FileExistsError:
            return False
        return True

    try:
        won = _contended(link)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return failed(f"no hard links here ({error.strerror}): workers of an evaluation claim by them", MOVE)
    if won != [1] * ROUNDS:
        return failed(f"of {CONTENDERS} that link one name at once, {won} succeed: claims would be given twice", MOVE)
    return ok(f"exclusive: of {CONTENDERS} at once one succeeds")


def exclusive(context: Context) -> Verdict:
    if context.place is None:
        return not_here(UNWRITABLE)
    folder = _own(context, "exclusive")

    def create(number: int) -> bool:
        try:
            with open(folder / f"file-{number // CONTENDERS}", "xb"):
                return True
        except FileExistsError:
            return False

    won = _contended(create)
    if won != [1] * ROUNDS:
        return failed(f"of {CONTENDERS} that create one name at once, {won} succeed (O_EXCL)", MOVE)
    return ok(f"of {CONTENDERS} at once one succeeds (O_EXCL)")


def locks(context: Context) -> Verdict:
    """The two kinds that this package uses: lockf on a file (a run's owner), flock on a folder (files of one kind)."""
    if context.place is None:
        return not_here(UNWRITABLE)
    folder = _own(context, "locks")
    file = folder / "file"
    file.touch()
    answers = {}
    for kind, path, take in (("lockf", file, fcntl.lockf), ("flock", folder, fcntl.flock)):
        descriptor = os.open(path, os.O_RDWR if kind == "lockf" else os.O_RDONLY)
        try:
            take(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            answers[kind] = _peer(kind, path).communicate(timeout=60)[0].strip()
        except OSError as error:
            answers[kind] = errno.errorcode.get(error.errno or 0, str(error.errno))
        finally:
            os.close(descriptor)
    if all(answer == "refused" for answer in answers.values()):
        return ok("a lock that one process holds is refused to another (lockf, flock)", **answers)
    text = ", ".join(f"{kind}: {'not kept' if answer == 'taken' else answer}" for kind, answer in answers.items())
    return warning(
        f"{text}: two starts that come in the same moment may both take a run directory",
        "mount it with locks (Lustre: -o flock; NFS: no local_lock), or submit one job a run directory",
        **answers,
    )


def folder_sync(context: Context) -> Verdict:
    if context.place is None:
        return not_here(UNWRITABLE)
    began = time.monotonic()
    descriptor = os.open(context.place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        return failed(f"a folder cannot be synced ({error.strerror}): a checkpoint cannot be committed", MOVE)
    finally:
        os.close(descriptor)
    return ok(f"{1000 * (time.monotonic() - began):.1f} ms", seconds=time.monotonic() - began)


def times(context: Context) -> Verdict:
    """How fine modification times are, and the file server's clock against this host's."""
    if context.place is None:
        return not_here(UNWRITABLE)
    file = _own(context, "times") / "file"
    seen: list[int] = []
    end = time.monotonic() + 2.5  # FAT counts in two seconds
    while time.monotonic() < end and len(seen) < 8:
        file.write_text(str(len(seen)))
        changed = file.stat().st_mtime_ns
        if not seen or changed != seen[-1]:
            seen.append(changed)
    ahead = file.stat().st_mtime - time.time()
    gaps = [b - a for a, b in itertools.pairwise(seen)]
    finest = min(gaps) / 1e9 if gaps else 2.5
    values = {"granularity_seconds": finest, "ahead_seconds": ahead}
    text = f"{1000 * finest:.2g} ms apart"
    if abs(ahead) > CLOCK:
        return warning(
            f"{text}, and {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this host's clock",
            "start the time service (chronyd, ntpd) on this host and on the file server",
            **values,
        )
    if finest > COARSE:
        return warning(
            f"{text}: a file that changes twice in that time looks unchanged",
            "wait as long between writing a model or data and starting a run on it",
            **values,
        )
    return ok(text, **values)


def seen_by_others(context: Context) -> Verdict:
    """A new name, a replaced content and a removed name by rank 0, each looked for by every other rank meanwhile.

    The others look before anything happens, as ranks do: a client that remembers what it saw is found out. And whether
    a lock of rank 0 is kept against other hosts.
    """
    group = context.group
    if group.size == 1:
        return not_here("one process; start it on several nodes: srun launch/node.sh doctor")
    if context.place is None:
        return not_here(UNWRITABLE)
    new, kept, lock = (context.place / name for name in ("seen-new", "seen-content", "seen-lock"))
    steps: dict[str, tuple[Callable[[], object], Callable[[], bool]]] = {
        "a new name": (new.touch, new.exists),
        "a replaced content": (lambda: _replace(kept, "2"), lambda: _content(kept) == "2"),
        "a removed name": (new.unlink, lambda: not new.exists()),
    }
    if group.main:
        kept.write_text("1")
        lock.touch()
    barrier(group, "files to look at")
    absent = not _wait(lambda: _content(kept) == "1")
    if absences := [p for p, gone in zip(context.peers, everyones(group, absent), strict=True) if gone]:
        return failed(
            f"{context.folder} of {context.here} is not that of {absences[0]}: each node has its own",
            "choose a file system that all nodes share",
        )
    worst: dict[str, float] = {}
    for what, (change, seen) in steps.items():
        seen()
        barrier(group, what)
        began = time.monotonic()
        if group.main:
            change()
        arrived = _wait(seen)
        seconds = everyones(group, time.monotonic() - began if arrived else float("inf"))
        worst[what] = max(seconds)
        if worst[what] == float("inf"):
            blind = context.peers[seconds.index(float("inf"))]
            return failed(
                f"{blind} did not see {what} of {context.peers[0]} within {PATIENCE:g} s: living owners would be taken "
                "for dead",
                "mount the file system with shorter caching (NFS: actimeo=3 or lookupcache=none), or use another one",
            )
    held = _kept_lock(context, lock)
    hosts = len({p.host for p in context.peers})
    text = f"{group.size} ranks on {hosts} host{'s' if hosts > 1 else ''} see changes of rank 0 within "
    text += f"{max(worst.values()):.2g} s"
    values = {"seconds": worst, "lock_kept": held}
    if max(worst.values()) > SEEN_WARNING:
        return warning(f"{text}: stops and takeovers wait as long", "NFS: mount with actimeo=1", **values)
    if not held:
        return warning(
            f"{text}, but a lock of rank 0 is not kept against them",
            "mount with locks (Lustre: -o flock; NFS: no local_lock), or submit one job a run directory",
            **values,
        )
    return ok(text, **values)


def _kept_lock(context: Context, file: Path) -> bool:
    """Whether a lock that rank 0 holds is refused to every other rank."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        refused = True
        if context.group.main:
            refused = _tried(descriptor) is None
        barrier(context.group, "a lock is held")
        if not context.group.main:
            refused = _tried(descriptor) in (errno.EAGAIN, errno.EACCES)
        return all(everyones(context.group, refused))
    finally:
        os.close(descriptor)


def _tried(descriptor: int) -> int | None:
    """The errno of taking a lock; None when it was taken."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno
    return None


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(f"{file.name}.new")
    beside.write_text(text)
    os.replace(beside, file)


def _content(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None


def _wait(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(PAUSE)
    return True
