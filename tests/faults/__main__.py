"""The harness: kills over all verbs until so many have been made or so many minutes have passed.

    python -m tests.faults --kills 300 --minutes 60          every verb
    python -m tests.faults --verbs eval,demo --minutes 10    two of them
    python -m tests.faults --memory                          memory and descriptors over a long run and many rows

The result file is written after each round, so an interrupted harness leaves what it has found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tests.forkserver as forkserver
from mirage_dist.config import REPOSITORY
from tests.faults import memory, results
from tests.faults.kills import Case, Outcome
from tests.faults.training import Training
from tests.faults.verbs import Inputs

TRAIN = "train"
TRAIN_WEIGHT = 4


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults", description="Kills at random moments.")
    parser.add_argument("--verbs", help="a comma-separated list; default: all")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results/faults.json")
    parser.add_argument("--memory", action="store_true", help="measure memory and descriptors in place of kills")
    parsed = parser.parse_args()
    if parsed.memory:
        return memory.main(REPOSITORY / "benchmarks/results/memory.json")
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    python = _warm(folder)
    if run(folder, parsed, python):
        print(f"what is left: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def _warm(folder: Path) -> str:
    """The program that stands for Python: processes forked from a server that has imported the libraries."""
    if forkserver.VARIABLE not in os.environ:
        (folder / "forkserver").mkdir()
        (folder / "forkserver/session").write_text(str(os.getpid()))
        os.environ[forkserver.VARIABLE] = str(folder / "forkserver")
    return os.environ.get("MIRAGE_PYTHON") or forkserver.python()


def run(folder: Path, parsed: argparse.Namespace, python: str) -> bool:
    """Rounds of the verb that lacks most of its share, until enough; whether something was wrong."""
    begin = time.monotonic()
    end = begin + parsed.minutes * 60

    def mirage(*arguments: str) -> None:
        subprocess.run(
            [python, "-m", "mirage_dist.cli", *arguments],
            check=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )

    os.environ["MIRAGE_PYTHON"] = python
    wanted = None if parsed.verbs is None else [name.strip() for name in parsed.verbs.split(",")]
    known, weights, cases = {}, {}, {}
    if wanted != [TRAIN]:
        known = dict(Inputs(folder, mirage).verbs())
    names = wanted or [TRAIN, *known]
    if unknown := set(names) - {TRAIN, *known}:
        raise SystemExit(f"no verb {', '.join(sorted(unknown))}; those of the harness: {TRAIN}, {', '.join(known)}")
    for name in names:
        case = (
            Training(folder / "train", parsed.seed)
            if name == TRAIN
            else Case(known[name], folder / name.replace(" ", ""), parsed.seed, python)
        )
        weights[name], cases[name] = TRAIN_WEIGHT if name == TRAIN else known[name].weight, case
        print(f"{name}, never killed: {case.life:.1f} s", flush=True)
        if case.not_compared:
            print(f"  differs between two runs, and is not compared: {', '.join(case.not_compared)}", flush=True)
    outcomes: list[Outcome] = []
    killed, rounds = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    while sum(killed.values()) < parsed.kills and time.monotonic() < end:
        # A verb that ends before its moments counts a round as well.
        name = min(names, key=lambda n: (killed[n] + 0.1 * rounds[n]) / weights[n])
        out = cases[name].round(rounds[name])
        outcomes.append(out)
        rounds[name] += 1
        killed[name] += len(out.kills)
        print(results.line(out, sum(killed.values())), flush=True)
        if not out.wrong:
            cases[name].forget()
        results.write(parsed.out, results.summary(outcomes, cases, parsed.seed, time.monotonic() - begin))
    print(results.table(outcomes))
    print(parsed.out)
    return any(out.wrong for out in outcomes)


if __name__ == "__main__":
    sys.exit(main())
