"""Verdicts on disk, one judge a file: what was judged by the same rules is not judged again.

    verdicts/JUDGE.jsonl           the last whole judging, in the rows' order
    verdicts/JUDGE.*.part.jsonl    what a slow judge has said so far, a file a process; its own is removed at the end

`failed` is written and counted, but asked again at the next start.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import compress
from pathlib import Path
from typing import IO, Any, overload

from mirage_dist import disk, signals
from mirage_dist.evals.judges.base import Judge, Opinion, Row
from mirage_dist.evals.sharing import files
from mirage_dist.signals import StopRequested

Identity = bytes  # the row's key, then its answer's SHA-256: there may be a million of them


def judged(suite: Path, judge: Judge, rows: Sequence[Row]) -> list[Opinion]:
    """The judge's opinion of each row, in their order; asks for those that are not on disk.

    Rows may lie on disk; they are read one by one. Raises StopRequested behind the opinion of a slow judge in which a
    signal came; what it said is on disk then.
    """
    keys = [row["key"].encode() + hashlib.sha256(row["response"].encode()).digest() for row in rows]
    known = _read(suite, judge)
    found = [known.get(key) for key in keys]
    del known
    missing = [i for i, opinion in enumerate(found) if opinion is None]
    # Closed when a signal ends the loop, so that questions not yet under way are not put.
    with _part(suite, judge) as part, closing(judge.opinions(_Some(rows, missing), rows)) as opinions:
        for place, opinion in opinions:
            found[missing[place]] = opinion
            if not judge.slow:
                continue
            part.write(_line(keys[missing[place]], judge.fingerprint, opinion))
            part.flush()
            if name := signals.received():
                raise StopRequested(f"judge {judge.name}: stopped by {name}; every verdict so far is on disk")
        whole = [opinion for opinion in found if opinion is not None]
        told = (_line(key, judge.fingerprint, opinion) for key, opinion in zip(keys, whole, strict=True))
        files.write(suite / "verdicts" / f"{judge.name}.jsonl", told)
    _tell(judge, whole)
    return whole


class _Some(Sequence[Row]):
    """Those of the rows that stand at `places`, which ascend."""

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


def unjudged(opinions: Iterable[Opinion]) -> dict[str, Any]:
    """{"unparsed": n, "failed": n, "reasons": {reason: n}}."""
    opinions = list(opinions)
    reasons = Counter(o.detail["reason"] for o in opinions if o.verdict == "failed")
    counts = {name: sum(o.verdict == name for o in opinions) for name in ("unparsed", "failed")}
    return {**counts, "reasons": dict(sorted(reasons.items()))}


def _tell(judge: Judge, opinions: Sequence[Opinion]) -> None:
    found = unjudged(opinions)
    if found["unparsed"] or found["failed"]:
        why = ", ".join(f"{reason} × {n}" for reason, n in found["reasons"].items())
        print(
            f"judge {judge.name}: of {len(opinions)} verdicts {found['unparsed']} are unparsed and {found['failed']} "
            f"failed{f' ({why}); the next start asks for these again' if why else ''}",
            flush=True,
        )


def _read(suite: Path, judge: Judge) -> dict[Identity, Opinion]:
    """What was judged by the same rules and did not fail."""
    folder, fingerprint = suite / "verdicts", judge.fingerprint
    known, plain = {}, {}
    for file in [folder / f"{judge.name}.jsonl", *sorted(folder.glob(f"{judge.name}.*.part.jsonl"))]:
        for line in files.whole_objects(file):
            if line["verdict"] == "failed" or line["rules"] != fingerprint:
                continue
            key = line["key"].encode() + bytes.fromhex(line["answer"])
            if "detail" in line:
                known[key] = Opinion(line["verdict"], line["detail"])
            else:
                known[key] = plain.setdefault(line["verdict"], Opinion(line["verdict"]))
    return known


def _line(key: Identity, rules: str, opinion: Opinion) -> str:
    detail = {"detail": opinion.detail} if opinion.detail else {}
    told = {"key": key[:-32].decode(), "verdict": opinion.verdict, "answer": key[-32:].hex(), "rules": rules, **detail}
    return json.dumps(told) + "\n"


@contextmanager
def _part(suite: Path, judge: Judge) -> Iterator[IO[str]]:
    """A file that no other process writes; gone when all went well, since the whole judging has it then."""
    file = suite / "verdicts" / f"{judge.name}.{time.time_ns()}-{uuid.uuid4().hex[:8]}.part.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    private = disk.private_opener
    with disk.refusals(file.parent, files.KEPT), open(file, "x", encoding="utf-8", opener=private) as handle:
        yield handle
    file.unlink(missing_ok=True)
