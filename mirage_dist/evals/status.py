"""`mirage eval CONFIG --status`: how far a suite is, from its files alone and on any machine that sees them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirage_dist.evals.sharing.files import KEY, lines, suite_dir
from mirage_dist.liveness import Owner, read
from mirage_dist.schema import ConfigError, EvalRecipe

# JSON escapes quotes within strings, so that no text of a row can look like one of its fields.
CONDITION = re.compile(rb'"set": ("(?:[^"\\]|\\.)*"), .*?"attack": ("(?:[^"\\]|\\.)*")')


@dataclass
class Count:
    """Questions of one set and attack: all, answered, and claimed by workers that may be alive."""

    total: int
    done: int = 0
    claimed: int = 0

    @property
    def missing(self) -> int:
        return self.total - self.done - self.claimed


@dataclass
class Status:
    """counts: by set and attack. workers: those that are not known to be dead. rows_per_s: of these together."""

    counts: dict[tuple[str, str], Count]
    workers: int = 0
    rows_per_s: float = 0.0
    broken: int = 0
    repeated: int = 0
    measured: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return sum(count.done for count in self.counts.values())

    @property
    def total(self) -> int:
        return sum(count.total for count in self.counts.values())

    def text(self) -> str:
        """A Markdown table and a line on who is at work."""
        table = ["| set | attack | done | claimed | missing |", "|---|---|---:|---:|---:|"]
        for (name, attack), c in self.counts.items():
            table.append(f"| {name} | {attack} | {c.done} of {c.total} | {c.claimed} | {c.missing} |")
        rate = f"{self.workers} workers at work, {self.rows_per_s:.2f} rows/s"
        left = self.total - self.done
        if left and self.rows_per_s:
            rate += f", {left / self.rows_per_s / 60:.0f} minutes left"
        end = "metrics.json is written" if self.measured else "not judged yet"
        told = f"{self.done} of {self.total} answers ({self.done / self.total:.1%}); {rate}; {end}"
        return "\n".join([*table, "", told, *self.notes])


def report(recipe: EvalRecipe) -> str:
    """What is to be told of a suite, or of each step's where a run is followed."""
    suite = suite_dir(recipe)
    if recipe.follow is None:
        return status(suite).text()
    steps = sorted(suite.glob("step-*"))
    told = [f"{step.name}\n{status(step).text()}" for step in steps if (step / "manifest.json").is_file()]
    return "\n\n".join([f"{len(steps)} checkpoints of {recipe.follow}", *told])


def status(suite: Path) -> Status:
    """Memory is that of the keys. Raises ConfigError when the suite has asked nothing yet."""
    file = suite / "manifest.json"
    if not file.is_file():
        made = {f.stem: sum(1 for _ in lines(f)) for f in sorted((suite / "rewrites").glob("*.jsonl"))}
        told = ", ".join(f"{name}: {count} lines" for name, count in made.items())
        why = f"rewrites are being made first ({told})" if made else "this evaluation was not started yet"
        raise ConfigError(f"{suite}: no manifest.json; {why}")
    asks = json.loads(file.read_text(encoding="utf-8"))["asks"]
    counts = {(name, attack): Count(n) for name, attacks in asks.items() for attack, n in attacks.items()}
    found = Status(counts, measured=(suite / "metrics.json").is_file())
    _count_rows(suite, found)
    _count_claims(suite, found)
    if found.broken:
        found.notes.append(f"{found.broken} half-written lines of workers that died; they are answered again")
    if found.repeated:
        found.notes.append(f"{found.repeated} rows were answered again; each counts once")
    return found


def _count_rows(suite: Path, found: Status) -> None:
    seen: set[bytes] = set()
    places: dict[tuple[bytes, ...], Count | None] = {}
    for file in sorted((suite / "rows").glob("worker-*.jsonl")):
        end = 0
        for offset, line in lines(file):
            end = offset + len(line)
            key, condition = KEY.fullmatch(line), CONDITION.search(line)
            if key is None or condition is None:
                found.broken += 1
                continue
            identity = bytes.fromhex(key[1].decode())
            if identity in seen:
                found.repeated += 1
                continue
            seen.add(identity)
            raw = condition.groups()
            if raw not in places:
                place = (json.loads(raw[0]), json.loads(raw[1]))
                places[raw] = found.counts.get(place)
            if count := places[raw]:
                count.done += 1
        found.broken += file.stat().st_size > end


def _count_claims(suite: Path, found: Status) -> None:
    for record in _last_claims(suite / "claims"):
        if Owner.from_record(record).alive() is not False:
            for name, attacks in record.get("rows", {}).items():
                for attack, n in attacks.items():
                    count = found.counts[name, attack]
                    # A batch may have been appended whose claim is not given back yet.
                    count.claimed = min(count.claimed + n, count.total - count.done)
    for file in (suite / "claims").glob("*.worker"):
        worker = read(file)
        if worker is not None and Owner.from_record(worker).alive() is not False:
            beat = read(file.with_suffix(".beat")) or {"rows": 0, "seconds": 1.0}
            found.workers += 1
            found.rows_per_s += beat["rows"] / beat["seconds"]


def _last_claims(folder: Path) -> Iterator[dict[str, Any]]:
    """Of each name the claim with the highest number."""
    last: dict[str, int] = {}
    for file in folder.glob("*.*"):
        if file.suffix[1:].isdecimal():
            last[file.stem] = max(last.get(file.stem, 0), int(file.suffix[1:]))
    for name, number in last.items():
        if record := read(folder / f"{name}.{number}"):
            yield record
