"""How often the files of a folder are opened, by whatever library: counted by the kernel (inotify)."""

import ctypes
import os
import struct
from collections import Counter
from pathlib import Path

IN_OPEN, IN_ISDIR = 0x20, 0x40000000  # of <sys/inotify.h>
EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows


class Opens:
    """A block in which opens of the files in `folder` are counted; afterwards `names` has them by the file's name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, Counter()

    def __enter__(self) -> "Opens":
        libc = ctypes.CDLL(None, use_errno=True)
        self.events = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self.events >= 0, os.strerror(ctypes.get_errno())
        assert libc.inotify_add_watch(self.events, os.fsencode(self.folder), IN_OPEN) >= 0
        return self

    def __exit__(self, *_: object) -> None:
        while True:
            try:
                raw = os.read(self.events, 1 << 16)
            except BlockingIOError:
                break
            at = 0
            while at < len(raw):
                _, mask, _, length = EVENT.unpack_from(raw, at)
                name = raw[at + EVENT.size : at + EVENT.size + length].rstrip(b"\0").decode()
                if not mask & IN_ISDIR:
                    self.names[name] += 1
                at += EVENT.size + length
        os.close(self.events)

    @property
    def count(self) -> int:
        return sum(self.names.values())
