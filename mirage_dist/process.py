"""Which process is which on this host: numbers are used again, start times are not."""

from __future__ import annotations

from pathlib import Path


def started(pid: int) -> str | None:
    """When the process with this number started, in ticks since boot. None where no process lives."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # a zombie is dead, whoever was to reap it


def boot() -> str:
    """The id of this boot of this host, the same in all its containers; empty where there is none to read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
