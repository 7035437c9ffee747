"""What happens in a folder, name by name, as the kernel reports it (inotify), and moments drawn from it."""

from __future__ import annotations

import ctypes
import os
import random
import re
import select
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# linux/inotify.h
MODIFY, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, ISDIR = 0x2, 0x8, 0x40, 0x80, 0x100, 0x200, 0x40000000
OPERATIONS = {
    CREATE: "create",
    MODIFY: "write",
    CLOSE_WRITE: "close",
    MOVED_FROM: "rename from",
    MOVED_TO: "rename to",
    DELETE: "delete",
}
HEADER = struct.Struct("iIII")
# What is drawn at random in the names that the package makes: hexadecimal tokens and times in nanoseconds.
DRAWN = re.compile(r"(?<![0-9a-z])(?:[0-9a-f]{12}|[0-9a-f]{8}|\d{15,})(?![0-9a-z])")
C = ctypes.CDLL(None, use_errno=True)


def steady(name: str) -> str:
    """A name without what differs between two runs of one command."""
    return DRAWN.sub("#", name)


def kind(operation: str, name: str) -> str:
    """Events of one kind concern files that differ in numbers only, such as the pictures of a world."""
    return f"{operation} {re.sub('[0-9]+', '0', steady(name))}"


class Watch:
    """Counts the events below a folder, by kind. Closes with its block."""

    def __init__(self, root: Path) -> None:
        self.root, self.last, self.counts = root, "", Counter[str]()
        self.folders: dict[int, str] = {}

    def __enter__(self) -> Watch:
        self.descriptor = C.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._add("", synthetic=False)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def look(self, seconds: float) -> list[str]:
        """The kinds of the events since the last look, after waiting for one for so many seconds at most."""
        if not select.select([self.descriptor], [], [], seconds)[0]:
            return []
        try:
            data = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return []
        seen, at = [], 0
        while at < len(data):
            watch, mask, _, length = HEADER.unpack_from(data, at)
            at += HEADER.size + length
            name = data[at - length : at].rstrip(b"\0").decode(errors="replace")
            if watch not in self.folders or not (operation := OPERATIONS.get(mask & 0xFFF)):
                continue
            path = os.path.join(self.folders[watch], name)
            seen.append(kind(operation, path))
            if mask & ISDIR and operation in ("create", "rename to"):
                seen += self._add(path, synthetic=operation == "create")
        self.counts.update(seen)
        self.last = seen[-1] if seen else self.last
        return seen

    def _add(self, folder: str, synthetic: bool) -> list[str]:
        """Watch a folder and those in it; what was made in it before counts as an event (synthetic)."""
        watch = C.inotify_add_watch(self.descriptor, os.fsencode(self.root / folder), sum(OPERATIONS))
        seen: list[str] = []
        if watch < 0:  # it has gone
            return seen
        self.folders[watch] = folder
        with suppress(OSError):
            for entry in os.scandir(self.root / folder):
                path = os.path.join(folder, entry.name)
                if synthetic:
                    seen.append(kind("create", path))
                if entry.is_dir(follow_symlinks=False):
                    seen += self._add(path, synthetic)
        return seen


@dataclass(frozen=True)
class Moment:
    """`after` seconds into a start, or after the `number`-th event of a kind in it."""

    after: float
    kind: str = ""
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind} ({self.number}) + {self.after * 1e3:.1f} ms" if self.kind else f"{self.after:.2f} s"

    def wait(self, watch: Watch, alive: Callable[[], bool], seconds: float) -> bool:
        """Return at the moment; False when the process ends first. Raises TimeoutError after so many seconds."""
        begin = time.monotonic()
        while alive():
            now = time.monotonic() - begin
            if now > seconds:
                raise TimeoutError(f"still running after {now:.0f} s, and no {self} yet")
            if not self.kind and now >= self.after:
                return True
            watch.look(min(0.05, self.after - now) if not self.kind else 0.05)
            if self.kind and watch.counts[self.kind] >= self.number:
                time.sleep(self.after)
                return alive()
        return False


def draw(rng: random.Random, life: float, counts: Mapping[str, int]) -> Moment:
    """Half of the moments are uniform over a life of so many seconds; half follow an event, uniform over the kinds.

    counts: the events of a start that nobody killed. Of those after an event, half come at once.
    """
    if rng.random() < 0.5 or not counts:
        return Moment(rng.uniform(0, life))
    chosen = rng.choice(sorted(counts))
    return Moment(rng.choice((0.0, rng.uniform(0, 0.01))), chosen, rng.randint(1, counts[chosen]))
