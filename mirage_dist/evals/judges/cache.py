"""Verdicts on disk, one file for each judge: a row is not judged again by the same rules.

    verdicts/JUDGE.jsonl               the verdicts of the last complete judging, in the order of the rows
    verdicts/JUDGE.TOKEN.part.jsonl    a slow judge's verdicts so far, one file for each worker (see `sharing.claims`)

A worker removes its own part after success, and those of dead workers once their verdicts are in the judge's file.

A `failed` verdict is written and counted, and the next start judges that row again, unless the failure is final, as
that of a row which an endpoint's content filter blocks.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import compress
from pathlib import Path
from typing import IO, Any, NotRequired, TypedDict, cast, overload

from mirage_dist import disk, signals, state
from mirage_dist.evals.judges.base import Judge, Opinion, Row
from mirage_dist.evals.results import UNJUDGED, Unjudged, Verdict
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import Damage, blocked, whole_objects
from mirage_dist.liveness import Owner
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.schema import RunError
from mirage_dist.signals import StopRequested

WITHHELD = Opinion("refused", {"by": "filter"})  # of an answer that a filter withheld, ours or an endpoint's
Identity = bytes  # the row's key, then its answer's SHA-256: there may be a million of them


class Line(TypedDict):
    """One verdict on disk."""

    key: str  # the row's
    verdict: Verdict
    answer: str  # SHA-256 of the row's response
    rules: str  # the judge's fingerprint
    detail: NotRequired[dict[str, Any]]


def judged(suite: Path, judge: Judge, rows: Sequence[Row], claims: Claims | None = None) -> list[Opinion]:
    """The judge's opinion of each row, in their order; it judges those whose opinion is not on disk.

    claims: this worker's; without them it is the suite's only worker.

    Rows may lie on disk and are read one by one; those that a filter withheld or blocked are refused by every judge.
    Damaged and edited lines of verdicts are named in the log, and their rows judged again. Raises StopRequested when a
    signal arrives at a slow judge, after its current opinion; every opinion is on disk then. Raises RunError when the
    disk is full or the judge leaves rows out.
    """
    rules = judge.fingerprint
    cached = _read(suite, judge, rules)
    keys, opinions = [], list[Opinion | None]()
    for row in rows:
        keys.append(row["key"].encode() + bytes.fromhex(disk.sha256_text(row["response"])))
        opinions.append(WITHHELD if "withheld" in row or blocked(row) else cached.get(keys[-1]))
    del cached
    missing = [i for i, opinion in enumerate(opinions) if opinion is None]
    # Closed when a signal ends the loop, so that no further request is sent.
    with (
        disk.refusals(suite / "verdicts", "whole verdicts are kept, and the next start judges the rest"),
        _part(suite, judge, claims) as part,
        closing(judge.opinions(_Some(rows, missing), rows)) as judging,
    ):
        for place, opinion in judging:
            opinions[missing[place]] = opinion
            if not judge.slow:
                continue
            part.write(_line(keys[missing[place]], rules, opinion))
            part.flush()
            if name := signals.received():
                raise StopRequested(f"judge {judge.name}: stopped by {name}; every verdict so far is on disk")
        whole = [opinion for opinion in opinions if opinion is not None]
        if len(whole) < len(rows):
            raise RunError(f"judge {judge.name}: its opinions leave out {len(rows) - len(whole)} of {len(rows)} rows")
        lines = (_line(key, rules, opinion) for key, opinion in zip(keys, whole, strict=True))
        disk.write(suite / "verdicts" / f"{judge.name}.jsonl", lines, private=True)
    _report(judge, whole)
    return whole


class _Some(Sequence[Row]):
    """The rows at `places`, which ascend."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> _Some: ...
    def __getitem__(self, index: int | slice) -> Row | _Some:
        if isinstance(index, slice):
            return _Some(self.rows, self.places[index])
        return self.rows[self.places[index]]

    def __iter__(self) -> Iterator[Row]:
        wanted = bytearray(len(self.rows))
        for place in self.places:
            wanted[place] = 1
        return compress(self.rows, wanted)


def unjudged(opinions: Iterable[Opinion]) -> Unjudged:
    """Count the answers without a verdict."""
    opinions = list(opinions)
    reasons = Counter(o.detail["reason"] for o in opinions if o.verdict == "failed")
    return {
        "unparsed": sum(o.verdict == "unparsed" for o in opinions),
        "failed": sum(o.verdict == "failed" for o in opinions),
        "reasons": dict(sorted(reasons.items())),
    }


def require_verdicts(judge: Judge, opinions: Sequence[Opinion]) -> None:
    """Raise RunError when the judge's model gave no verdict at all, or was given up before it had seen every row."""
    by_model = [opinion for opinion in opinions if opinion.detail.get("by") not in ("list", "filter")]
    lost = [opinion for opinion in by_model if opinion.verdict in UNJUDGED]
    untried = [opinion for opinion in lost if opinion.detail.get("untried")]
    if untried:
        raise RunError(
            f"judge {judge.name}: {len(untried)} of {len(opinions)} answers were not sent to it, {untried[0].note}. "
            "Every verdict so far is on disk; the next start requests the others"
        )
    if lost and len(lost) == len(by_model):
        parts = [f"judge {judge.name}: none of {len(lost)} answers has a verdict ({_counted(lost)})"]
        if notes := Counter(opinion.note for opinion in lost if opinion.note):
            parts.append(f"the most frequent failure: {notes.most_common(1)[0][0]}")
        if shapes := Counter(opinion.detail["shape"] for opinion in lost if "shape" in opinion.detail):
            parts.append(f"the most frequent form of a reply, its letters hidden: {shapes.most_common(1)[0][0]}")
        parts.append("correct the judge's options (docs/judges.md), or choose another judge")
        raise RunError("; ".join(parts))


def _counted(opinions: Sequence[Opinion]) -> str:
    counts = unjudged(opinions)
    why = ", ".join(f"{reason} × {n}" for reason, n in counts["reasons"].items())
    return f"{counts['unparsed']} are unparsed and {counts['failed']} failed{f' ({why})' if why else ''}"


def _report(judge: Judge, opinions: Sequence[Opinion]) -> None:
    lost = [opinion for opinion in opinions if opinion.verdict in UNJUDGED]
    if not lost:
        return
    again = sum(opinion.verdict == "failed" and not opinion.detail.get("final") for opinion in lost)
    log.info(
        f"judge {judge.name}: of {len(opinions)} verdicts {_counted(lost)}"
        f"{f'; the next start judges {again} of them again' if again else ''}",
        extra=EVERY_RANK,
    )


def verdicts(file: Path, damage: Damage | None = None) -> Iterator[Line]:
    """The whole lines of a file of verdicts, none if it does not exist. damage: gets the others."""
    for line in whole_objects("verdict", file, damage):
        yield cast(Line, line)


def _read(suite: Path, judge: Judge, rules: str) -> dict[Identity, Opinion]:
    """The opinions on disk that were formed by the same rules, without failures that another request may mend."""
    opinions, shared, damage = {}, {}, Damage()
    for file in [suite / "verdicts" / f"{judge.name}.jsonl", *sorted(_parts(suite, judge).values())]:
        for line in verdicts(file, damage):
            if line["rules"] != rules or (line["verdict"] == "failed" and not line.get("detail", {}).get("final")):
                continue
            key = line["key"].encode() + bytes.fromhex(line["answer"])
            if "detail" in line:
                opinions[key] = Opinion(line["verdict"], line["detail"])
            else:
                opinions[key] = shared.setdefault(line["verdict"], Opinion(line["verdict"]))
    if damage:
        log.info(
            f"judge {judge.name}: {len(damage)} verdicts are damaged or edited, and their answers are judged again: "
            f"{damage}",
            extra=EVERY_RANK,
        )
    return opinions


def _line(key: Identity, rules: str, opinion: Opinion) -> str:
    line: Line = {"key": key[:-32].decode(), "verdict": opinion.verdict, "answer": key[-32:].hex(), "rules": rules}
    if opinion.detail:
        line["detail"] = opinion.detail
    return state.sealed("verdict", cast(dict[str, Any], line))


@contextmanager
def _part(suite: Path, judge: Judge, claims: Claims | None) -> Iterator[IO[str]]:
    """A file that no other process writes. After success, the judge's own file holds its content and that of the parts
    of dead workers, which are removed.
    """
    left = _parts(suite, judge)
    token = (claims.owner if claims else Owner.current()).token
    file = suite / "verdicts" / f"{judge.name}.{token}.part.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as handle:
        yield handle
    file.unlink(missing_ok=True)
    for owner, part in left.items():
        if owner != token and (claims is None or claims.gone(owner)):
            part.unlink(missing_ok=True)


def _parts(suite: Path, judge: Judge) -> dict[str, Path]:
    """The judge's parts, by the tokens of their owners."""
    name = re.compile(rf"{re.escape(judge.name)}\.([0-9a-f-]+)\.part\.jsonl")
    matches = ((name.fullmatch(file.name), file) for file in (suite / "verdicts").glob("*.part.jsonl"))
    return {match[1]: file for match, file in matches if match}
