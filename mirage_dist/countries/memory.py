"""How much memory a process can still take: in the machine, and in the control groups that a scheduler puts it in."""

from __future__ import annotations

import os
from pathlib import Path

# Control groups, versions 2 and 1: how a line of /proc/self/cgroup marks them, where they lie, files of limit and use.
GROUPS = (
    ("0::", "/sys/fs/cgroup", "memory.max", "memory.current"),
    (":memory:", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def at_hand(root: Path = Path("/")) -> int | None:
    """Bytes that are free; None where the system does not say. root: of the system's files."""
    known: list[int] = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        known += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        if "SC_PHYS_PAGES" in os.sysconf_names:  # a system without /proc: all memory, in use or not
            known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for mark, place, limit, used in GROUPS:
        own = next((line.partition(mark)[2] for line in lines if mark in line), None)
        if own is not None:
            known += _left(root / place.strip("/"), own, limit, used)
    return min(known, default=None)


def _left(top: Path, own: str, limit: str, used: str) -> list[int]:
    """What is left to a group and to each around it; page cache counts as free."""
    left, group = [], top / own.strip("/")
    for place in [group, *group.parents]:
        try:
            cached = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            taken = int((place / used).read_text()) - int(cached["inactive_file"])
            left.append(int((place / limit).read_text()) - taken)
        except (OSError, ValueError, KeyError):  # no limit here, or not to be read from within a container
            pass
        if place == top:
            break
    return left
