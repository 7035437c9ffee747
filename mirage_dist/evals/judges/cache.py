"""Verdicts on disk, one judge a file: what was judged by the same rules is not judged again.

    verdicts/JUDGE.jsonl           the last whole judging, in the rows' order
    verdicts/JUDGE.*.part.jsonl    what a slow judge has said so far, a file a process; its own is removed at the end

`failed` is written and counted, but asked again at the next start.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from mirage_dist import signals
from mirage_dist.evals import files
from mirage_dist.evals.judges.base import Judge, Opinion, Row
from mirage_dist.signals import StopRequested

Identity = tuple[str, str, str]  # the row's key, its answer's hash, the judge's fingerprint


def judged(suite: Path, judge: Judge, rows: Sequence[Row]) -> list[Opinion]:
    """The judge's opinion of each row, in their order; asks for those that are not on disk.

    Raises StopRequested behind the opinion of a slow judge in which a signal came; what it said is on disk then.
    """
    fingerprint = judge.fingerprint
    keys = [(row["key"], hashlib.sha256(row["response"].encode()).hexdigest(), fingerprint) for row in rows]
    known = _read(suite, judge)
    missing = [i for i, key in enumerate(keys) if key not in known]
    asked = [row for row, key in zip(rows, keys, strict=True) if key not in known]
    # Closed when a signal ends the loop, so that questions not yet under way are not put.
    with _part(suite, judge) as part, closing(judge.opinions(asked, rows)) as opinions:
        for place, opinion in opinions:
            key = keys[missing[place]]
            known[key] = opinion
            if not judge.slow:
                continue
            part.write(_line(key, opinion))
            part.flush()
            if name := signals.received():
                raise StopRequested(f"judge {judge.name}: stopped by {name}; every verdict so far is on disk")
        whole = [known[key] for key in keys]
        text = "".join(_line(key, opinion) for key, opinion in zip(keys, whole, strict=True))
        files.write_atomically(suite / "verdicts" / f"{judge.name}.jsonl", text)
    _tell(judge, whole)
    return whole


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
    folder = suite / "verdicts"
    known = {}
    for file in [folder / f"{judge.name}.jsonl", *sorted(folder.glob(f"{judge.name}.*.part.jsonl"))]:
        for line in files.read_lines(file)[0]:
            if line["verdict"] != "failed":
                key = (line["key"], line["answer"], line["rules"])
                known[key] = Opinion(line["verdict"], line.get("detail", {}))
    return known


def _line(key: Identity, opinion: Opinion) -> str:
    detail = {"detail": opinion.detail} if opinion.detail else {}
    told = {"key": key[0], "verdict": opinion.verdict, "answer": key[1], "rules": key[2], **detail}
    return json.dumps(told) + "\n"


@contextmanager
def _part(suite: Path, judge: Judge) -> Iterator[IO[str]]:
    """A file that no other process writes; gone when all went well, since the whole judging has it then."""
    file = suite / "verdicts" / f"{judge.name}.{time.time_ns()}-{uuid.uuid4().hex[:8]}.part.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "x", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as handle:
        yield handle
    file.unlink(missing_ok=True)
