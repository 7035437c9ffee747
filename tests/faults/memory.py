"""Memory and open descriptors of a process over time: flat, or what a leak would show."""

from __future__ import annotations

from pathlib import Path


def main(out: Path) -> int:
    raise SystemExit("not written yet")
