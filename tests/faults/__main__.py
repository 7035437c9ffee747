"""The harness: one run that is never stopped, and N that are killed and started again until they have finished."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mirage_dist.config import REPOSITORY
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from tests.faults import moments
from tests.faults.check import differences
from tests.faults.processes import VICTIMS, Start, end, send
from tests.toy import Toy

RANKS, STEPS, SAVE_EVERY, KEEP = 2, 24, 2, 2
ORPHANS = "orphans"  # ranks that went on behind a killed launcher
LIMIT = 300.0  # seconds that one start may take
SHARDED = {"zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0}}


@dataclass
class Outcome:
    """One run: how it was killed, and what was wrong with it afterwards."""

    run: int
    background: bool
    kills: list[dict[str, str]] = field(default_factory=list)
    refused: int = 0  # starts that named the owner that still ran
    starts: int = 0
    seconds: float = 0.0
    not_resumed: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)


class Harness:
    """The embedded world, the command, and the run that nobody stops."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.toy = Toy(folder / "toy")
        base = sources.read(formats.source("llava", f"{folder}/toy/world/base.json", f"{folder}/toy/world")).samples
        # Enough for two parts of the reference cache on each rank.
        write_samples(self.toy.root / "forget.jsonl", base[:64])
        write_samples(self.toy.root / "retain.jsonl", base[64:96])
        (folder / "deepspeed.json").write_text(json.dumps(SHARDED))
        # A Slurm job's own restarts are counted and bounded; these are not restarts of the job this may run in.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
            "MIRAGE_PYTHON": os.environ.get("MIRAGE_PYTHON", sys.executable),
            "MIRAGE_KILL_SECONDS": "2",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.whole, self.life = folder / "whole", 0.0

    def never_stopped(self) -> None:
        begin = time.monotonic()
        status = self.start(self.whole, True, "whole.log").wait(LIMIT)
        if status != 0:
            raise SystemExit(
                f"the run without a kill ended with status {status}:\n{(self.folder / 'whole.log').read_text()}"
            )
        self.life = time.monotonic() - begin

    def start(self, run: Path, background: bool, log: str) -> Start:
        overrides = [
            *self.toy.overrides("npo", run),
            f"deepspeed={self.folder}/deepspeed.json",
            f"train.max_steps={STEPS}",
            "train.global_batch=4",
            "train.micro_batch=1",
            f"train.save_every={SAVE_EVERY}",
            f"train.keep_last={KEEP}",
            f"train.save_in_background={str(background).lower()}",
        ]
        command = [f"{REPOSITORY}/launch/local.sh", str(RANKS), "train", "configs/train/demo_npo.yaml", *overrides]
        return Start(command, self.environment, self.folder / log)

    def run(self, number: int) -> Outcome:
        """Kill a run, once or several times, start it until it has finished, and compare."""
        rng, begin = random.Random(f"{self.seed}/{number}"), time.monotonic()
        out = Outcome(number, background=rng.random() > 0.25)
        run = self.folder / f"run-{number:03d}"
        kills, finished = rng.choices((1, 2, 3), (16, 3, 1))[0], False
        while len(out.kills) < kills and not finished and not out.not_resumed:
            moment = moments.draw(rng, number % 2 == 1, self.life, SAVE_EVERY, STEPS, KEEP)
            victim = rng.choices(VICTIMS, (2, 2, 1))[0]
            finished = self.killed(run, out, moment, victim, rng.randrange(RANKS), freeze=rng.random() < 0.5)
            if finished and not out.kills and not out.not_resumed:
                self.forget(number)  # it was quicker than its moment: once more from the beginning
                finished = False
        # A finished run is started again as well: there must be nothing left to do or to spoil.
        if not out.not_resumed:
            self.unkilled(run, out)
        if not out.not_resumed:
            out.differs = differences(run, self.whole)
        out.seconds = time.monotonic() - begin
        return out

    def killed(self, run: Path, out: Outcome, moment: moments.Moment, victim: str, rank: int, freeze: bool) -> bool:
        """One start and its end by SIGKILL; whether the run has finished nevertheless."""
        before, start, begin = moments.look(run), self.start(run, out.background, self.log(out)), time.monotonic()
        try:
            moment.wait(run, start.alive, begin + LIMIT)
        except TimeoutError as error:
            start.wait(0)
            out.not_resumed.append(str(error))
            return False
        if not start.alive():
            return self.ended(start, out, time.monotonic() - begin)
        now = moments.look(run)
        orphans = start.kill(victim, rank)
        if victim == "all ranks" or (victim == "a rank" and rank == 0):
            now = moments.look(run)  # nobody writes there any more: what is seen is what there was
        out.kills.append(self.kill_record(now, before, victim, str(moment)))
        if freeze:
            for number in orphans:
                send(number, signal.SIGSTOP)
        status = start.wait(LIMIT)
        if status is None:
            out.not_resumed.append(f"{start.log}: still running {LIMIT:g} s after a kill of {victim}")
        if orphans and not out.not_resumed:
            return self.orphaned(run, out, orphans, before)
        return status == 0

    def orphaned(self, run: Path, out: Outcome, orphans: list[int], before: moments.Now) -> bool:
        """A start beside ranks that lost their launcher: it is refused by name, or the directory is its own."""
        start = self.start(run, out.background, self.log(out))
        status = start.wait(LIMIT)
        refused = re.search(r"belongs to a job on (\S+), process (\d+), .* which is running", start.log.read_text())
        if status == 1 and refused and refused[1] == socket.gethostname() and int(refused[2]) in orphans:
            out.refused += 1
        elif status != 0:
            out.not_resumed.append(f"{start.log}: ended with status {status} beside the orphans {orphans}")
        if end(orphans) and status != 0:
            out.kills.append(self.kill_record(moments.look(run), before, ORPHANS, "behind a refused start"))
        return status == 0

    def ended(self, start: Start, out: Outcome, seconds: float) -> bool:
        """A start that was quicker than its moment."""
        status = start.wait(LIMIT)
        if status != 0:
            out.not_resumed.append(f"{start.log}: ended with status {status}")
        if not out.kills:
            self.life = min(self.life, seconds)
        return True

    def unkilled(self, run: Path, out: Outcome) -> None:
        start = self.start(run, out.background, self.log(out))
        status = start.wait(LIMIT)
        if status != 0:
            out.not_resumed.append(f"{start.log}: ended with status {status}")

    def log(self, out: Outcome) -> str:
        out.starts += 1
        return f"run-{out.run:03d}-start-{out.starts}.log"

    def kill_record(self, now: moments.Now, before: moments.Now, victim: str, moment: str) -> dict[str, str]:
        return {"victim": victim, "phase": moments.phase(now, before, KEEP, STEPS), "moment": moment}

    def forget(self, number: int) -> None:
        """Remove a run in which nothing was wrong."""
        shutil.rmtree(self.folder / f"run-{number:03d}", ignore_errors=True)
        for log in self.folder.glob(f"run-{number:03d}-*.log"):
            log.unlink()


def table(outcomes: list[Outcome]) -> str:
    """Kills by phase and victim, as lines."""
    victims = (*VICTIMS, ORPHANS)
    counted = Counter((kill["phase"], kill["victim"]) for out in outcomes for kill in out.kills)
    rows: list[tuple[str, ...]] = [("kills", *victims, "sum")]
    for phase in moments.PHASES:
        row = [counted[phase, victim] for victim in victims]
        rows.append((phase, *map(str, row), str(sum(row))))
    return "\n".join("".join(cell.rjust(14) if i else cell.ljust(14) for i, cell in enumerate(row)) for row in rows)


def summary(harness: Harness, outcomes: list[Outcome], begin: datetime) -> dict[str, Any]:
    manifest = json.loads((harness.whole / "manifest.json").read_text())
    by_phase = {
        phase: dict(Counter(k["victim"] for out in outcomes for k in out.kills if k["phase"] == phase))
        for phase in moments.PHASES
    }
    return {
        "command": "python -m tests.faults " + " ".join(sys.argv[1:]),
        "seed": harness.seed,
        "date": begin.strftime("%Y-%m-%d"),
        "minutes": round((datetime.now(UTC) - begin).total_seconds() / 60, 1),
        "hardware": manifest["hardware"],
        "versions": manifest["versions"],
        "git_commit": manifest["git_commit"],
        "ranks": RANKS,
        "steps": STEPS,
        "runs": len(outcomes),
        "kills": sum(len(out.kills) for out in outcomes),
        "kills_by_phase": by_phase,
        "refused_beside_orphans": sum(out.refused for out in outcomes),
        "could_not_resume": sum(bool(out.not_resumed) for out in outcomes),
        "differ": sum(bool(out.differs) for out in outcomes),
        "each": [asdict(out) for out in outcomes],
    }


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results/faults.json")
    parsed = parser.parse_args()
    begin, folder = datetime.now(UTC), Path(tempfile.mkdtemp(prefix="faults-"))
    harness = Harness(folder, parsed.seed)
    harness.never_stopped()
    print(f"never stopped: {STEPS} steps on {RANKS} ranks in {harness.life:.1f} s", flush=True)
    outcomes: list[Outcome] = []
    for number in range(parsed.runs):
        out = harness.run(number)
        outcomes.append(out)
        wrong = [*out.not_resumed, *out.differs]
        kills = ", ".join(f"{k['victim']} {k['phase']} ({k['moment']})" for k in out.kills)
        print(f"{number + 1}/{parsed.runs}: {kills}: {'; '.join(wrong) or 'resumed'}, {out.seconds:.0f} s", flush=True)
        if not wrong:
            harness.forget(number)
    results = summary(harness, outcomes, begin)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(outcomes))
    failed = results["could_not_resume"] + results["differ"]
    counts = f"{results['runs']} runs, {results['could_not_resume']} could not resume, {results['differ']} differ"
    print(f"{counts}; {parsed.out}")
    if failed:
        print(f"what is left of them: {folder}")
    else:
        shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
