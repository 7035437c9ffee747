"""Pictures that are stored in a table: TABLE/COLUMN/ROW, as if the table were a folder, stands for the bytes of one.

Nothing can lie below a file, so such a reference is the path of no picture file, and it stays what it is where a path
is made absolute or its links are followed. Parquet is read a row group at a time, Arrow is mapped into memory; nothing
is unpacked to disk.
"""

from __future__ import annotations

import bisect
import importlib
import os
import stat
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple, Protocol

from mirage_dist.schema.limits import ROW_GROUP

OPEN = 64  # tables that stay open, of each process
GROUPS = 2  # row groups whose pictures stay in memory
PARQUET, ARROW = b"PAR1", b"ARROW1"  # what their files begin with; an Arrow stream has no mark


class Reference(str):
    """Where a picture is stored: what a record has in place of a picture's path (see `data.tables`)."""

    def __new__(cls, table: Path, column: str, row: int) -> Reference:
        return super().__new__(cls, f"{table}/{column}/{row}")


class Place(NamedTuple):
    table: Path
    column: str
    row: int


class Unreadable(Exception):
    """Why the bytes of a picture cannot be had, in a clause."""


def place(name: str) -> Place | None:
    """The table, column and row that a reference names; None for a path."""
    path = Path(name)
    if not (path.name.isascii() and path.name.isdecimal()):
        return None
    for parent in list(path.parents)[1:]:
        with suppress(OSError, ValueError):
            mode = os.stat(parent).st_mode
            regular = stat.S_ISREG(mode)
            return Place(parent, path.parent.relative_to(parent).as_posix(), int(path.name)) if regular else None
    return None


def content(where: Place) -> bytes:
    """The bytes of a stored picture. Raises Unreadable, also for a table that has changed since it was first read."""
    with _LOCK:
        table = _table(where.table)
        try:
            value = table.value(where.column, where.row)
        except Unreadable:
            raise
        except Exception as error:  # on damaged bytes and rare types a reader may raise anything
            raise Unreadable(f"broken: {where.table} cannot be read: {error or type(error).__name__}") from error
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise Unreadable(f"no picture is stored in column {where.column!r}, row {where.row}, of {where.table}")
    return value


def read_anew(table: Path) -> None:
    """From now on references mean the table as it is now: its records are about to be read."""
    with _LOCK:
        _OPEN.pop(table, None)
        _FIRST.pop(table, None)


# ----------------------------------------------------------------------------------------------------- tables


class _Table(Protocol):
    def value(self, column: str, row: int) -> Any: ...


class _Parquet:
    """A Parquet file. Of a picture's column, the bytes of its row group are read whole."""

    def __init__(self, file: Path) -> None:
        self.file = pyarrow("parquet").ParquetFile(str(file), pre_buffer=False)
        groups = range(self.file.metadata.num_row_groups)
        self.starts = [0]
        for group in groups:
            self.starts.append(self.starts[-1] + self.file.metadata.row_group(group).num_rows)
        self.leaves = [self.file.schema.column(i).path for i in range(len(self.file.schema))]
        self.read: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def value(self, column: str, row: int) -> Any:
        if not 0 <= row < self.starts[-1]:
            raise Unreadable(f"the table has {self.starts[-1]} rows")
        group = bisect.bisect_right(self.starts, row) - 1
        return self._column(column, group)[row - self.starts[group]].as_py()

    def _column(self, column: str, group: int) -> Any:
        key = column, group
        if key not in self.read:
            leaf = f"{column}.bytes" if f"{column}.bytes" in self.leaves else column
            if leaf not in self.leaves:
                raise Unreadable(f"the table has no column {column!r} of pictures")
            size = self.file.metadata.row_group(group).column(self.leaves.index(leaf)).total_uncompressed_size
            if size > ROW_GROUP.value:
                raise Unreadable(
                    f"a row group holds {size >> 20} MiB of pictures, which are read together; expected at most "
                    f"{ROW_GROUP}. Write the file anew with fewer rows a group (row_group_size=100)"
                )
            read = self.file.read_row_group(group, columns=[leaf], use_threads=False).column(0)
            self.read[key] = read
            if len(self.read) > GROUPS:
                self.read.popitem(last=False)
        self.read.move_to_end(key)
        return self.read[key]


class _Arrow:
    """An Arrow file or stream, mapped into memory."""

    def __init__(self, file: Path, stream: bool) -> None:
        ipc, source = pyarrow("ipc"), pyarrow("lib").memory_map(str(file))
        self.table = (ipc.open_stream if stream else ipc.open_file)(source).read_all()

    def value(self, column: str, row: int) -> Any:
        if column not in self.table.column_names:
            raise Unreadable(f"the table has no column {column!r}")
        if not 0 <= row < len(self.table):
            raise Unreadable(f"the table has {len(self.table)} rows")
        return self.table[column][row].as_py()


_LOCK = RLock()
_OPEN: OrderedDict[Path, _Table] = OrderedDict()
_FIRST: dict[Path, tuple[int, ...]] = {}  # what each table was when a picture of it was first read


def _table(file: Path) -> _Table:
    if file not in _OPEN:
        _OPEN[file] = _opened(file)
        if len(_OPEN) > OPEN:
            _OPEN.popitem(last=False)
    state = os.stat(file)
    now = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
    if _FIRST.setdefault(file, now) != now:
        raise Unreadable(f"{file} has changed since it was first read; start again")
    _OPEN.move_to_end(file)
    return _OPEN[file]


def _opened(file: Path) -> _Table:
    try:
        with open(file, "rb") as handle:
            mark = handle.read(len(ARROW))
        return _Parquet(file) if mark.startswith(PARQUET) else _Arrow(file, stream=mark != ARROW)
    except Exception as error:
        raise Unreadable(f"broken: {file} is no table that can be read: {error or type(error).__name__}") from error


def pyarrow(part: str) -> Any:
    """A module of pyarrow, for which there are no types."""
    return importlib.import_module(f"pyarrow.{part}")


def _forget() -> None:
    """In a forked process: a lock that another thread held, and files whose readers have threads, stay behind."""
    global _LOCK
    _LOCK = RLock()
    _OPEN.clear()


os.register_at_fork(after_in_child=_forget)
