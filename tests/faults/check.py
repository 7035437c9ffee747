"""What a resumed run must have in common with the one that was never stopped: everything but the time it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirage_dist.train.measures.records import CLOCKED

TIMED = (*CLOCKED, "seal")


def differences(run: Path, whole: Path) -> list[str]:
    """In words, what of a finished run is not as in the never-stopped one; empty when all is."""
    faults = []
    steps, others = (_records(f) for f in (run, whole))
    if [m["step"] for m in steps] != [m["step"] for m in others]:
        faults.append(f"metrics.jsonl has steps {[m['step'] for m in steps]}")
    elif steps != others:
        first = next(m["step"] for m, other in zip(steps, others, strict=True) if m != other)
        faults.append(f"metrics.jsonl differs from step {first} on")
    kept, wanted = (sorted(f.name for f in (r / "checkpoints").glob("step-*")) for r in (run, whole))
    if kept != wanted:
        faults.append(f"checkpoints {kept}, wanted {wanted}")
    latest, last = ((r / "checkpoints/latest").read_text() for r in (run, whole))
    if latest != last:
        faults.append(f"latest names {latest}, wanted {last}")
    for folder in (f"checkpoints/{last}", "export", "reference"):
        faults += _unequal(run / folder, whole / folder)
    # What decides whether a run may go on; a half-written one would say so at the next start.
    for name in ("config.yaml", "data.json", "manifest.json"):
        if not (run / name).is_file() or not (run / name).read_text().strip():
            faults.append(f"{name} is missing or empty")
    litter = [*run.glob("work-*"), *run.rglob("*.tmp"), *run.rglob("*.gone"), *run.glob("owner.json")]
    return faults + [f"{file.relative_to(run)} was left behind" for file in sorted(set(litter))]


def _records(run: Path) -> list[dict[str, Any]]:
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def _unequal(mine: Path, other: Path) -> list[str]:
    """Files of one folder that are not bitwise those of the other, but for two that name the run itself."""
    names = sorted({str(f.relative_to(d)) for d in (mine, other) for f in d.rglob("*") if f.is_file()})
    return [
        f"{mine.name}/{name} is not that of the never-stopped run"
        for name in names
        if name not in ("manifest.json", "README.md") and _content(mine / name) != _content(other / name)
    ]


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
