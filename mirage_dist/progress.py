"""Progress bars on a terminal, plain lines in a log, and the package's one logger.

`log` writes plain text to the current standard output. Rank 0 alone speaks, except in records that carry EVERY_RANK,
and the text of a warning appears once a process:

    log.info(f"{name}: 3 of 10 answers are on disk")
    log.warning(f"{file}: unreadable, computed again ({error})", extra=EVERY_RANK)
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from mirage_dist.schema import secrets
from mirage_dist.schema.documents import whole_number
from mirage_dist.schema.errors import RunError

# By the word with which `LogHandler` begins the lines of a level.
_SHOWN = {logging.getLevelName(level): level for level in (logging.WARNING, logging.ERROR, logging.CRITICAL)}
LONGEST = 4000  # characters of a line on standard error
LINES = 10  # at most, of one task in a log
EVERY_RANK = {"every_rank": True}  # `extra` of a record that concerns one rank only, whichever it is
NOTE = {"note": True}  # `extra` of a record that is shown once, also where others go to a file alone (see `kept_in`)
ON_STDERR = {"on_stderr": True}  # `extra` of a record of a command whose standard output is its result

log = logging.getLogger("mirage_dist")


# What data could move the cursor, recolour the terminal, break or reorder a line with, what is invisible (such as tags,
# which can hold a hidden text), and what UTF-8 cannot hold.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    """`text` for a terminal: control characters other than line breaks and tabs are shown as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def show(*lines: object, error: bool = False) -> None:
    """Print a command's result, or (error) its fault on standard error, without control characters from data, and a
    fault without what looks like a key and without the middle of long lines, which repeat a value that is too long.

    Raises RunError when the result cannot be printed; a fault has its status in any case.
    """
    text = "".join(f"{printable(line)}\n" for line in lines)
    if not error:
        put(text)
    elif sys.stderr is not None:
        try:
            sys.stderr.write("".join(map(_abridged, secrets.masked(text).splitlines(keepends=True))))
            sys.stderr.flush()
        except (OSError, ValueError):
            _discard(sys.stderr)


def _abridged(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 4 :]}"


def put(text: str) -> None:
    """Write text to the standard output and flush it: as it is, or on a terminal without control characters.

    Raises RunError when the standard output is closed, its reader has ended, or its disk is full, now or at an earlier
    line of the log.
    """
    if sys.stdout is None:
        raise RunError("the standard output is closed; the result has nowhere to go")
    try:
        if handler.lost is not None:
            raise handler.lost
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _discard(sys.stdout)
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"the standard output cannot be written ({reason}); the result was not shown") from error


def _discard(stream: TextIO) -> None:
    """Let what is still buffered go nowhere, or the interpreter fails on it when it ends."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # no file, as in a test
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def rank() -> int:
    """This process's rank according to its launcher, 0 without one; never an error, unlike the launch itself."""
    names = ("RANK", "SLURM_PROCID") if "SLURM_STEP_ID" in os.environ else ("RANK",)
    for name in names:
        if (value := whole_number(os.environ.get(name, ""))) is not None:
            return value
    return 0


class LogHandler(logging.Handler):
    """Writes records to what `sys.stdout` is at that moment, flushed, since a killed process loses what it buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: set[str] = set()
        self.lost: OSError | None = None  # why the standard output takes no more lines
        self.kept: TextIO | None = None  # see `kept_in`

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        """Whether the record is written: see the module's rules on ranks and on repeated warnings."""
        if rank() != 0 and not getattr(record, "every_rank", False):
            return False
        if record.levelno == logging.WARNING:
            text = record.getMessage()
            if text in self.warnings:
                return False
            self.warnings.add(text)
        return super().filter(record)

    def format(self, record: logging.LogRecord) -> str:
        text = printable(secrets.masked(super().format(record)))
        return f"{record.levelname}: {text}" if record.levelno >= logging.WARNING else text

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if getattr(record, "on_stderr", False) else sys.stdout
        if stream is None:  # closed by whoever started this process
            return
        try:
            text = self.format(record) + "\n"
            if self.kept is not None and not self._keep(record, text):
                return
            if Progress.bars:  # a bar on the terminal is cleared first and drawn again below the line
                tqdm.write(text, file=stream, end="")
            else:
                stream.write(text)
            stream.flush()
        except OSError as error:  # work of hours does not end for its log
            _discard(stream)
            if stream is not sys.stderr:
                self.lost = error
                show(f"mirage: the log cannot be written any more ({error.strerror}); the work goes on", error=True)
        except Exception:  # as every handler of the standard library does
            self.handleError(record)

    def _keep(self, record: logging.LogRecord, text: str) -> bool:
        """Write a line into the file of `kept_in`; whether it is shown too."""
        assert self.kept is not None
        try:
            self.kept.write(text)
            self.kept.flush()
        except OSError:  # a full disk: what it cannot hold is shown
            return True
        if not getattr(record, "note", False):
            return record.levelno >= logging.WARNING
        repeated = text in self.warnings
        self.warnings.add(text)
        return not repeated


@contextmanager
def kept_in(file: Path) -> Iterator[None]:
    """Within the block the log goes to the end of `file`; warnings, and each NOTE once, are shown as well.

    The standard output of processes that `launching` starts goes there too (see `show_warnings`). Raises OSError when
    the file cannot be opened.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        before, handler.kept = handler.kept, stream
        try:
            yield
        finally:
            handler.kept = before


def show_warnings(file: Path, start: int) -> None:
    """Log what another process warned of in a log from byte `start` on, once a process, and each error there."""
    with file.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode(errors="replace").splitlines()
    before, handler.kept = handler.kept, None  # where they are already
    try:
        for line in lines:
            level, colon, text = line.partition(": ")
            if colon and level in _SHOWN:
                log.log(_SHOWN[level], text)
    finally:
        handler.kept = before


class Progress:
    """How far a task is: a bar where standard error is a terminal, otherwise at most LINES lines in the log.

    A context manager. Only rank 0 shows anything. Use `update` for what has been added, `show` for the sum.
    """

    bars = 0  # on the terminal now

    def __init__(
        self,
        total: float | None,
        what: str,
        unit: str = "step",
        *,
        initial: float = 0,
        delay: float = 0.0,
        pause: float = 0.0,
        lines: int = LINES,
        leave: bool = True,
        disable: bool = False,
        on_stderr: bool = False,
    ) -> None:
        """total: in units, None where it is unknown (lines then come at intervals that double). initial: units that
        an earlier start has done.

        unit: singular, or "B" for bytes. delay: seconds before a bar appears. pause: seconds before the first line and
        between two. lines: at most so many; 0 for a caller that writes its own. leave: the bar stays when it is full.
        on_stderr: lines go to standard error, for a command whose standard output is its result.
        """
        self.total, self.what, self.unit, self.done = total, printable(what), unit, initial
        self._lines, self._pause, self._extra = lines, pause, ON_STDERR if on_stderr else None
        self._shown, self._last = self._part(), time.monotonic()
        self.silent = disable or rank() != 0
        self.bar: tqdm | None = None
        if not self.silent and sys.stderr is not None and sys.stderr.isatty():
            scale = unit == "B"
            options = {"delay": delay, "leave": leave, "unit": unit, "unit_scale": scale, "file": sys.stderr}
            self.bar = tqdm(total=total, initial=initial, desc=self.what, **options)
            Progress.bars += 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, n: float = 1, text: str = "") -> None:
        """Add `n` units. text: the latest values, shown after the bar or in the line."""
        self.show(self.done + n, text)

    def show(self, done: float, text: str = "") -> None:
        """Set the units done so far, by this process and by others."""
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(printable(text), refresh=False)
            self.bar.update(done - self.done)
        self.done = done
        if self.bar is None and not self.silent and self._line_is_due():
            log.info(f"{self.what}: {self._amount()}{text and f'  {text}'}", extra=self._extra)

    def close(self) -> None:
        """Take the bar off or leave it as it is; more than once does no harm."""
        if self.bar is not None:
            Progress.bars -= 1
            self.bar.close()
            self.bar, self.silent = None, True

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        part, pause = self._part(), self._pause
        if self.total is None:
            part, pause = self._shown + 1, (pause or 30.0) * 2**self._shown
        if part <= self._shown or part > self._lines or now - self._last < pause:
            return False
        self._shown, self._last = part, now
        return True

    def _part(self) -> int:
        """Of `lines` equal parts of the total, how many are done."""
        return int(self.done * self._lines // self.total) if self.total else 0

    def _amount(self) -> str:
        if self.unit == "B":
            done, total, unit = f"{self.done / 1e6:.0f}", f"{(self.total or 0) / 1e6:.0f}", "MB"
        else:
            done, total, unit = f"{self.done:g}", f"{self.total or 0:g}", f"{self.unit}s"
        return f"{done} {unit}" if self.total is None else f"{done} of {total} {unit}"


handler = LogHandler()
log.addHandler(handler)
log.setLevel(logging.INFO)
