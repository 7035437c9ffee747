"""The command: `python -m tests.fuzz --minutes 30 [--cases N] [--seed S] [--verbs V …] [--out FILE]`, or
`--case ID|JSON`.

The minutes begin when the small world exists and every verb has run on it once.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import argparse
import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hypothesis.configuration import set_hypothesis_home_dir

from mirage_dist.config import REPOSITORY
from tests.fuzz import cases, changes, findings, sandbox, values, verbs, world
from tests.fuzz.findings import Finding

PACKAGES = ("mirage-dist", "torch", "transformers", "deepspeed", "hypothesis")
RECORDED = Path(__file__).parent / "found.json"  # cases that once failed


class Harness:
    """The world, and the cases that run on copies of it."""

    def __init__(self, folder: Path, keep: bool = False) -> None:
        self.folder, self.keep = folder, keep
        self.original = folder / "world"
        world.make(self.original)
        self.counted: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.number = 0
        self.wanted: dict[str, Any] = {}

    def whole(self, names: list[str]) -> list[dict[str, Any]]:
        """Each verb on the world as it is; what is wrong even so."""
        failed = []
        for name in names:
            own = Running(self, f"whole-{name}", {"verb": name, "overrides": [], "environment": {}, "changes": []})
            outcome = own.child.wait()
            made = own.findings(outcome)
            if outcome.status != (1 if name == "demo" else 0):
                made.append(Finding("whole", name, f"status {outcome.status} without a fault\n{outcome.stderr}"))
            elif own.verb.result:
                self.wanted[name] = own.verb.result(own.folder)
            failed += [record(own, finding) for finding in made]
            own.remove()
        return failed

    def count(self, case: cases.Case, status: int) -> None:
        self.counted[case["verb"]] += 1
        self.by_kind.update(cases.kinds(case))
        self.statuses[str(status)] += 1


class Running:
    """One case on its own copy of the world."""

    def __init__(self, harness: Harness, name: str, case: cases.Case) -> None:
        harness.number += 1
        self.harness, self.name, self.case = harness, name, case
        self.verb = verbs.VERBS[case["verb"]]
        self.folder = harness.folder / f"case-{harness.number}"
        world.copy(harness.original, self.folder)
        for change in case["changes"]:
            changes.apply(self.folder, change)
        self.before = findings.tree(self.folder)
        words = [*self.verb.words, *map(values.whole, case["overrides"]), *self.verb.last]
        self.child = sandbox.Child(self.folder, words, case["environment"], self.folder.with_name(self.folder.name))

    def findings(self, outcome: sandbox.Outcome) -> list[Finding]:
        wanted = self.harness.wanted.get(self.case["verb"])
        return findings.of(self.case, self.verb, outcome, self.folder, self.before, wanted)

    def remove(self) -> None:
        if not self.harness.keep:
            for path in self.folder.parent.glob(f"{self.folder.name}[.-]*"):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            shutil.rmtree(self.folder)


def endless(seed: int, names: list[str]) -> Iterator[tuple[str, cases.Case]]:
    """Cases of all verbs in turn, by their weights."""
    waiting: dict[str, list[tuple[str, cases.Case]]] = {name: [] for name in names}
    batches: Counter[str] = Counter()
    while True:
        # A verb of weight 4 has four cases in a round; they are spread over it.
        rounds = sorted((i / verbs.VERBS[name].weight, name) for name in names for i in range(verbs.VERBS[name].weight))
        for _, name in rounds:
            if not waiting[name]:
                waiting[name] = cases.batch(seed, name, batches[name])[::-1]
                batches[name] += 1
            yield waiting[name].pop()


def run(harness: Harness, stream: Iterator[tuple[str, cases.Case]], until: float, jobs: int) -> list[dict[str, Any]]:
    """Run cases until the stream or the time ends; the failed ones, each with what is wrong."""
    running: list[Running] = []
    failed: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    more = True
    while more or running:
        while more and len(running) < jobs:
            if time.monotonic() > until or (drawn := next(stream, None)) is None:
                more = False
            else:
                running.append(Running(harness, *drawn))
        for own in running[:]:
            if (outcome := own.child.poll()) is None:
                continue
            running.remove(own)
            harness.count(own.case, outcome.status)
            for finding in own.findings(outcome):
                failed.append(record(own, finding, (finding.kind, finding.where) not in seen))
                seen.add((finding.kind, finding.where))
            own.remove()
        time.sleep(0.005)
    return failed


def record(own: Running, finding: Finding, full: bool = True) -> dict[str, Any]:
    """A finding as it is kept. full: print it too."""
    if full:
        print(
            f"\n=== {finding.kind}: {finding.where}\n{own.name} {json.dumps(own.case)}", finding.text.strip(), sep="\n"
        )
        sys.stdout.flush()
    return {"id": own.name, "kind": finding.kind, "where": finding.where, "case": own.case}


def one(harness: Harness, name: str, case: cases.Case) -> int:
    """Run one case in full view."""
    print(json.dumps(case, indent=1))
    own = Running(harness, name, case)
    outcome = own.child.wait()
    print(f"status {outcome.status}, {outcome.seconds:.1f} s\n{outcome.stdout}{outcome.stderr}{outcome.hang}")
    made = own.findings(outcome)
    for finding in made:
        print(f"=== {finding.kind}: {finding.where}\n{finding.text}")
    own.remove()
    return 1 if made else 0


def summary(
    harness: Harness, failed: list[dict[str, Any]], arguments: argparse.Namespace, begin: float
) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    kinds = Counter(entry["kind"] for entry in failed)
    return {
        "command": "python -m tests.fuzz " + " ".join(sys.argv[1:]),
        "seed": arguments.seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpu": None},
        "versions": {
            name: version(name) for name in ("mirage-dist", "torch", "transformers", "deepspeed", "hypothesis")
        },
        "git_commit": commit.stdout.strip() or None,
        "cases": sum(harness.counted.values()),
        "cases_by_verb": dict(sorted(harness.counted.items())),
        "cases_by_mutation": dict(sorted(harness.by_kind.items())),
        "cases_by_status": dict(sorted(harness.statuses.items())),
        "tracebacks": kinds["traceback"],
        "hangs": kinds["hang"],
        "foreign_files_changed": kinds["changed"],
        "other_findings": {k: n for k, n in sorted(kinds.items()) if k not in ("traceback", "hang", "changed")},
        "each": failed,
    }


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, help="at most so many, beside those that once failed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbs", nargs="+", choices=sorted(verbs.VERBS), default=list(verbs.VERBS))
    parser.add_argument("--case", help="run this case alone: an id, or JSON")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the cases")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    arguments = parser.parse_args()
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mirage-fuzz-"))
    set_hypothesis_home_dir(folder / "hypothesis")
    try:
        sandbox.warm()
        harness = Harness(folder, arguments.keep)
        if arguments.case:
            given = arguments.case.startswith("{")
            case = json.loads(arguments.case) if given else cases.of_id(arguments.case)
            harness.whole([case["verb"]])
            return one(harness, arguments.case, case)
        failed = harness.whole(arguments.verbs)
        print(f"the world was made in {time.monotonic() - begin:.0f} s", flush=True)
        recorded = json.loads(RECORDED.read_text())
        known = iter([(f"found-{i}", case) for i, case in enumerate(recorded) if case["verb"] in arguments.verbs])
        failed += run(harness, known, float("inf"), arguments.jobs)
        until = time.monotonic() + arguments.minutes * 60
        drawn = itertools.islice(endless(arguments.seed, arguments.verbs), arguments.cases)
        failed += run(harness, drawn, until, arguments.jobs)
    finally:
        if arguments.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    result = summary(harness, failed, arguments, begin)
    print(json.dumps({name: value for name, value in result.items() if name != "each"}, indent=1))
    for (kind, where), count in Counter((e["kind"], e["where"]) for e in failed).most_common():
        print(f"{count:5} {kind}: {where}")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
