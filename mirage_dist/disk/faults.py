"""What an operating system refuses, in a sentence: a full disk, a path that cannot be made, an output without a reader.

A user and a machine can cause these; every other exception that reaches the command is a bug.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

NO_MORE_DATA = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a disk that accepts no more data
# Of a path, for whoever looks up, opens or makes it.
PATHS = (
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.ETXTBSY, errno.EXDEV, errno.EMLINK, errno.ENXIO),
    *(errno.ENODEV, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EOPNOTSUPP, errno.ENOTCONN),
)
RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers end the text of such an error
WORDS = {os.strerror(number): number for number in NO_MORE_DATA}
# Writers that count bytes instead of passing the error on: PyTorch's and NumPy's.
CUT_SHORT = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+|\d+ requested and \d+ written")


def no_more_data(error: BaseException) -> int | None:
    """The number (see `errno`) when an exception, or its cause, means that a disk accepts no more data."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in NO_MORE_DATA:
            return each.errno
        text = str(each)
        if (match := RUST.search(text)) and int(match[1]) in NO_MORE_DATA:
            return int(match[1])
        for words, number in WORDS.items():
            if words in text:
                return number
        if CUT_SHORT.search(text):
            return errno.ENOSPC
    return None


def check_place(path: Path) -> None:
    """Raise OSError when the missing `path` cannot be made, by its nearest existing parent. Makes nothing."""
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    number = 0
    if not parent.is_dir():
        number = errno.ENOTDIR
    elif not os.access(parent, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(parent).f_flag & os.ST_RDONLY else errno.EACCES
    if number:
        raise OSError(number, os.strerror(number), str(parent))


def sentence(error: BaseException) -> str | None:
    """What happened, to which path, and what to do; None for what only a bug can cause."""
    path = getattr(error, "filename", None)
    where = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes) else ""
    if isinstance(error, BrokenPipeError):
        return "the program that reads the standard output ended before everything was written to it"
    if (number := no_more_data(error)) is not None:
        return (
            f"{where}cannot be written ({os.strerror(number)}); nothing incomplete was left there. Make room or choose "
            "another place, then start again"
        )
    if isinstance(error, OSError) and error.errno in PATHS:
        second = f" -> {error.filename2}" if error.filename2 else ""
        return (
            f"{where}{error.strerror}{second}; check the path, its permissions and what already exists there, or "
            "choose another one"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {str(error) or 'the machine has no more'}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
