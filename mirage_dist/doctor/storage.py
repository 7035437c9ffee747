"""The disk under the run directories: speed of writing and reading, and space for what a recipe will write."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from mirage_dist.disk import faults
from mirage_dist.doctor.checks import Context, Verdict, failed, ok, warning
from mirage_dist.schema import ConfigError

MIB, GIB = 1 << 20, 1 << 30
PIECE, PIECES = 4 * MIB, 16
SECONDS = 3.0  # after which no further piece is written
SLOW = 100 * MIB  # bytes/s; a checkpoint of 7 billion parameters is 79 GiB
FEW_INODES = 10_000
LITTLE = GIB  # bytes free, where no recipe says what is needed


def existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def speed(context: Context) -> Verdict:
    """A file of up to 64 MiB written, synced and read back, on all hosts at once."""
    if context.place is None:
        return failed(
            f"{context.folder}: cannot be written: {context.fault}", "choose another --dir, or have it made writable"
        )
    file = context.place / f"speed-{context.group.rank}"
    piece, written = os.urandom(PIECE), 0
    try:
        with file.open("xb", buffering=0) as handle:
            began = time.monotonic()
            while written < PIECES * PIECE and time.monotonic() - began < SECONDS:
                written += _write(handle, piece)
            os.fsync(handle.fileno())
            writing = time.monotonic() - began
            # Otherwise memory is read, not the disk.
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, same = time.monotonic(), True
        with file.open("rb", buffering=0) as handle:
            for _ in range(written // PIECE):
                same = handle.read(PIECE) == piece and same
        reading = time.monotonic() - began
    except OSError as error:
        if (number := faults.no_more_data(error)) is None:
            raise
        return failed(
            f"{context.folder}: after {written / MIB:.0f} MiB the disk accepts no more ({os.strerror(number)})",
            "free space, ask for a larger quota, or choose another --dir",
        )
    finally:
        file.unlink(missing_ok=True)
    if not same:
        return failed(
            f"{context.folder}: what is read back is not what was written", "this disk damages data: leave it"
        )
    context.measured |= {"write": written / writing, "read": written / reading}
    text = (
        f"{context.folder}: {written / MIB / writing:.0f} MiB/s written and synced, "
        f"{written / MIB / reading:.0f} MiB/s read ({written / MIB:.0f} MiB)"
    )
    values = {"write_bytes_per_second": written / writing, "read_bytes_per_second": written / reading}
    if written / writing < SLOW:
        return warning(
            f"{text}: 79 GiB, a checkpoint of 7 B trained parameters, take {79 * GIB * writing / written / 60:.0f} min",
            "put run.dir on the cluster's fast file system; with train.save_in_background no step waits for it",
            **values,
        )
    return ok(text, **values)


def _write(handle: Any, piece: bytes) -> int:
    """A raw write may stop short of a limit; the next one then says why."""
    left = memoryview(piece)
    while left:
        left = left[handle.write(left) :]
    return len(piece)


def space(context: Context) -> Verdict:
    """Free space and inodes against what the recipe will write (see `mirage plan`)."""
    folder = existing(context.folder)
    disk, table = shutil.disk_usage(folder), os.statvfs(folder)
    free = disk.free
    values: dict[str, Any] = {"free": free, "total": disk.total, "inodes": table.f_favail if table.f_files else None}
    text = f"{context.folder}: {free / GIB:.1f} of {disk.total / GIB:.1f} GiB free"
    if table.f_files and table.f_favail < FEW_INODES:
        return warning(f"{text}, {table.f_favail} inodes left", "remove small files, or choose another --dir", **values)
    if context.recipe is None:
        if free < LITTLE:
            return warning(text, "free space; --recipe CONFIG compares it with what the run will write", **values)
        return ok(f"{text}; --recipe CONFIG compares it with what a run will write", **values)
    from mirage_dist.train.planning import check, plan

    try:
        check.check_recipe(context.recipe, context.group.size)  # which a plan would bend to suit the ranks
        planned = {name: size for name, (size, _) in plan.plan(context.recipe, context.group.size).disk.items()}
    except ConfigError as error:
        return failed(f"{text}; what the run will write is unknown: {error}", "mend the recipe, or prepare its data")
    if not context.recipe.data.cache_vision:
        planned.pop("vision features", None)  # the plan shows what they would take
    # The plan names the size of one checkpoint, and of those that are kept; one more exists while it is written.
    one = planned.get("a checkpoint", 0)
    needed = sum(planned.values())
    context.measured["checkpoint"] = one
    values |= {"needed": needed, "planned": planned}
    text += f"; the run writes up to {needed / GIB:.1f} GiB, {one / GIB:.1f} of them a checkpoint"
    if needed > free:
        return failed(
            text,
            "free space, or write less: train.keep_last, train.export=adapter, data.cache_vision=false",
            **values,
        )
    return ok(text, **values)
