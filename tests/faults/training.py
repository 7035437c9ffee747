"""Training, killed: one run on two ranks that is never stopped, and runs that are killed and started again."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from mirage_dist.config import REPOSITORY
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from tests.faults import moments
from tests.faults.check import differences
from tests.faults.kills import QUIET_SECONDS, Outcome
from tests.faults.processes import VICTIMS, Start, end, running, send
from tests.toy import Toy

RANKS, STEPS, SAVE_EVERY, KEEP = 2, 24, 2, 2
ORPHANS = "orphans"  # ranks that had not yet ended after their launcher was killed
LIMIT = 300.0  # seconds that one start may take
LEFT_BEHIND = " was left behind"
SHARDED = {"zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0}}


class Training:
    """The embedded world, the command, and the run that nobody stops."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.not_compared: list[str] = []  # `differences` excludes clocks itself
        folder.mkdir()
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
        self.whole = folder / "whole"
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

    def round(self, number: int) -> Outcome:
        """Kill a run, once or several times, start it until it has finished, and compare."""
        rng, begin = random.Random(f"{self.seed}/{number}"), time.monotonic()
        out, self.background = Outcome("train", number), rng.random() > 0.25
        run = self.run = self.folder / f"run-{number:03d}"
        kills, finished = rng.choices((1, 2, 3, 4), (4, 3, 2, 1))[0], False
        while len(out.kills) < kills and not finished and not out.lost:
            moment = moments.draw(rng, number % 2 == 1, self.life, SAVE_EVERY, STEPS, KEEP)
            victim = rng.choices(VICTIMS, (2, 2, 1))[0]
            finished = self.killed(run, out, moment, victim, rng.randrange(RANKS), freeze=rng.random() < 0.5)
            if finished and not out.kills and not out.lost:
                self.forget()  # it was quicker than its moment: once more from the beginning
                finished = False
        # A finished run is started again as well: there must be nothing left to do or to spoil.
        if not out.lost:
            self.unkilled(run, out)
        if not out.lost:
            listed = differences(run, self.whole)
            out.litter = {words.removesuffix(LEFT_BEHIND): 1 for words in listed if words.endswith(LEFT_BEHIND)}
            out.differs = [words for words in listed if not words.endswith(LEFT_BEHIND)]
        out.seconds = time.monotonic() - begin
        return out

    def killed(self, run: Path, out: Outcome, moment: moments.Moment, victim: str, rank: int, freeze: bool) -> bool:
        """One start and its end by SIGKILL; whether the run has finished nevertheless."""
        before, start, begin = moments.look(run), self.start(run, self.background, self.log(out)), time.monotonic()
        try:
            moment.wait(run, start.alive, begin + LIMIT)
        except TimeoutError as error:
            start.wait(0)
            out.lost.append(str(error))
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
            out.lost.append(f"{start.log}: still running {LIMIT:g} s after a kill of {victim}")
        if orphans and not out.lost:
            return self.orphaned(run, out, orphans, before, freeze)
        return status == 0

    def orphaned(self, run: Path, out: Outcome, orphans: list[int], before: moments.Now, frozen: bool) -> bool:
        """A start beside ranks that lost their launcher: it is refused by name, or the directory is its own.

        Those that are not frozen end by themselves.
        """
        begin, start = time.monotonic(), self.start(run, self.background, self.log(out))
        status = start.wait(LIMIT)
        refused = re.search(r"belongs to a job on (\S+), process (\d+), .* which is running", start.log.read_text())
        if status == 1 and refused and refused[1] == socket.gethostname() and int(refused[2]) in orphans:
            out.refused += 1
        elif status != 0:
            out.lost.append(f"{start.log}: ended with status {status} beside the orphans {orphans}")
        while not frozen and any(map(running, orphans)) and time.monotonic() - begin < QUIET_SECONDS:
            time.sleep(0.01)
        if not frozen and any(map(running, orphans)):
            out.orphans.append(f"{start.log}: ranks are alive {QUIET_SECONDS:g} s after their launcher was killed")
        elif not frozen:
            out.longest_orphan = max(out.longest_orphan, time.monotonic() - begin)
        if end(orphans) and status != 0:
            out.kills.append(self.kill_record(moments.look(run), before, ORPHANS, "after a refused start"))
        return status == 0

    def ended(self, start: Start, out: Outcome, seconds: float) -> bool:
        """A start that was quicker than its moment."""
        status = start.wait(LIMIT)
        if status != 0:
            out.lost.append(f"{start.log}: ended with status {status}")
        if not out.kills:
            self.life = min(self.life, seconds)
        return True

    def unkilled(self, run: Path, out: Outcome) -> None:
        start = self.start(run, self.background, self.log(out))
        status = start.wait(LIMIT)
        if status != 0:
            out.lost.append(f"{start.log}: ended with status {status}")

    def log(self, out: Outcome) -> str:
        out.starts += 1
        return f"run-{out.number:03d}-start-{out.starts}.log"

    def kill_record(self, now: moments.Now, before: moments.Now, victim: str, moment: str) -> dict[str, str]:
        return {"victim": victim, "phase": moments.phase(now, before, KEEP, STEPS), "moment": moment}

    def forget(self) -> None:
        """Remove the last run, in which nothing was wrong."""
        shutil.rmtree(self.run, ignore_errors=True)
        for log in self.folder.glob(f"{self.run.name}-*.log"):
            log.unlink()
