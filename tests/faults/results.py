"""What a harness has found, as a line, a table and a file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from mirage_dist import disk
from mirage_dist.config import REPOSITORY
from tests.faults.kills import Outcome

LIBRARIES = ("torch", "transformers", "deepspeed", "safetensors")


class Measured(Protocol):
    """What a verb's case knows about a command that nobody killed."""

    life: float  # seconds
    not_compared: list[str]  # names whose content differs between two such commands


def line(out: Outcome, kills: int) -> str:
    """One round in words; kills: of the harness so far."""
    own = ", ".join(f"{kill['victim']} ({kill['phase']})" for kill in out.kills) or "no kill"
    return f"{kills}: {out.verb}: {own}: {'; '.join(out.wrong) or 'as if never killed'}, {out.seconds:.0f} s"


def by_verb(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for verb in dict.fromkeys(out.verb for out in outcomes):
        own = [out for out in outcomes if out.verb == verb]
        kills = [kill for out in own for kill in out.kills]
        table[verb] = {
            "kills": len(kills),
            "rounds": len(own),
            "starts": sum(out.starts for out in own),
            "refused_beside_orphans": sum(out.refused for out in own),
            "lost": sum(bool(out.lost) for out in own),
            "differing": sum(bool(out.differs) for out in own),
            "litter": sum(bool(out.litter) for out in own),
            "orphans": sum(bool(out.orphans) for out in own),
            "foreign_changed": sum(bool(out.foreign) for out in own),
            "longest_orphan_seconds": round(max((out.longest_orphan for out in own), default=0.0), 1),
            "victims": dict(Counter(kill["victim"] for kill in kills)),
            "phases": dict(sorted(Counter(kill["phase"] for kill in kills).items())),
        }
    return table


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts by verb, as lines."""
    names = ("kills", "rounds", "starts", "lost", "differing", "litter", "orphans", "foreign_changed")
    verbs = by_verb(outcomes)
    rows = [("", *names), *((verb, *(str(own[name]) for name in names)) for verb, own in verbs.items())]
    rows.append(("sum", *(str(sum(own[name] for own in verbs.values())) for name in names)))
    return "\n".join("".join(cell.rjust(16) if i else cell.ljust(16) for i, cell in enumerate(row)) for row in rows)


def about() -> dict[str, Any]:
    """The command, the machine and the code that figures come from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return {
        "command": "python -m tests.faults " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": {"machine": platform.machine(), "cpus": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "git_commit": commit.stdout.strip() or None,
    }


def summary(outcomes: Sequence[Outcome], cases: Mapping[str, Measured], seed: int, seconds: float) -> dict[str, Any]:
    verbs = by_verb(outcomes)
    names = ("kills", "lost", "differing", "litter", "orphans", "foreign_changed")
    for verb, own in verbs.items():
        own["never_killed_seconds"] = round(cases[verb].life, 1)
        own["not_compared"] = cases[verb].not_compared
    return {
        **about(),
        "seed": seed,
        "minutes": round(seconds / 60, 1),
        **{name: sum(own[name] for own in verbs.values()) for name in names},
        "verbs": verbs,
        "wrong": [asdict(out) for out in outcomes if out.wrong],
    }


def write(file: Path, content: Mapping[str, Any]) -> None:
    disk.write(file, json.dumps(content, indent=1) + "\n", durable=False)
