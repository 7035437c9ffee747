"""One verb, killed several times and started again until it has finished, against the same command never killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mirage_dist.config import REPOSITORY
from tests.faults import events, trees
from tests.faults.processes import marked, send, worker
from tests.faults.verbs import ALL, CHILD, MAIN, Verb

MARKER = "MIRAGE_FAULTS"  # a variable that every process of one start inherits
QUIET_SECONDS = 60.0  # after a kill, until no process of the command may be alive
FOREIGN = "a user's own\n"


@dataclass
class Outcome:
    """One command: how it was killed, and what was wrong afterwards."""

    verb: str
    number: int
    kills: list[dict[str, str]] = field(default_factory=list)
    starts: int = 0
    refused: int = 0  # starts that named the process that still ran
    seconds: float = 0.0
    longest_orphan: float = 0.0  # seconds from a kill to the end of the command's last process
    lost: list[str] = field(default_factory=list)  # it could not finish, or a part of its output is missing
    differs: list[str] = field(default_factory=list)
    litter: dict[str, int] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # a user's own that has changed

    @property
    def wrong(self) -> list[str]:
        litter = [f"{name} × {count} was left behind" for name, count in self.litter.items()]
        return [*self.lost, *(f"{name} differs" for name in self.differs), *litter, *self.orphans, *self.foreign]


class Start:
    """A command in a process group of its own, its output in a file, its processes known by a variable."""

    def __init__(self, arguments: Sequence[str], python: str, temporary: Path, log: Path) -> None:
        self.log, self.mark = log, f"{os.getpid()}-{time.monotonic_ns()}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment |= {MARKER: self.mark, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"MIRAGE_KILL_SECONDS": "2", "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1"}
        command = [python, "-m", "mirage_dist.cli", *arguments]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=REPOSITORY, start_new_session=True
            )

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self, victim: str, rng: random.Random) -> str:
        """SIGKILL; the victim, which is the process itself where it has no child."""
        children = sorted(marked(MARKER, self.mark) - {self.process.pid})
        if victim == CHILD and children:
            victims = [rng.choice(children)]
        else:
            victims = [self.process.pid, *(children if victim == ALL else ())]
            victim = victim if children else MAIN
        for number in victims:
            with suppress(OSError):  # it has ended meanwhile
                send(worker(number) or number, signal.SIGKILL)
        return victim

    def quiet(self) -> float | None:
        """Seconds until no process of the command is alive; None, with all of them killed, when that takes too long."""
        begin = time.monotonic()
        while time.monotonic() - begin < QUIET_SECONDS:
            self.process.poll()
            if not marked(MARKER, self.mark):
                self.process.wait()
                return time.monotonic() - begin
            time.sleep(0.02)
        self.end()
        return None

    def end(self) -> None:
        for number in marked(MARKER, self.mark):
            with suppress(OSError):
                send(worker(number) or number, signal.SIGKILL)
                send(number, signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float) -> int | None:
        """The exit status; None, with all its processes killed, when it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            return None

    def last(self) -> str:
        """The end of its output."""
        return self.log.read_text(errors="replace")[-2000:]


class Case:
    """A verb's command at one path, its output when nobody kills it, and rounds of kills."""

    def __init__(self, verb: Verb, folder: Path, seed: int, python: str = sys.executable) -> None:
        self.verb, self.folder, self.seed, self.python = verb, folder, seed, python
        self.root, self.temporary = folder / "root", folder / "tmp"
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self.life, self.counts = 0.0, Counter[str]()
        first = self._unkilled()
        self.not_compared = trees.unequal(first, whole := self._unkilled())
        self.whole = {name: own for name, own in whole.items() if name not in self.not_compared}
        self.whole |= dict.fromkeys(self.not_compared)

    def _unkilled(self) -> trees.Tree:
        self._place()
        begin = time.monotonic()
        with events.Watch(self.root) as watch:
            start = self._start("unkilled.log")
            while start.alive() and time.monotonic() - begin < self.verb.seconds:
                watch.look(0.05)
            status = start.wait(0.1)
            watch.look(0)
        if status != 0:
            raise SystemExit(f"{self.verb.name}, which nobody killed, ended with status {status}:\n{start.last()}")
        self.life, self.counts = time.monotonic() - begin, watch.counts
        return trees.read(self.root)

    def _place(self) -> None:
        """An empty folder, but for what a user keeps beside what the command makes, with similar names."""
        for folder in (self.root, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for place in self.verb.places:
            for suffix in (".0123abcd.tmp", ".0123abcd.gone", ".tmp-1", "-notes"):
                folder = self.root / f"{place}{suffix}"
                folder.mkdir(parents=True)
                (folder / "note.txt").write_text(FOREIGN)

    def _foreign(self) -> list[str]:
        """What of it has changed."""
        changed = []
        for place in self.verb.places:
            for suffix in (".0123abcd.tmp", ".0123abcd.gone", ".tmp-1", "-notes"):
                file = self.root / f"{place}{suffix}" / "note.txt"
                if not file.is_file() or file.read_text() != FOREIGN:
                    changed.append(f"{file.relative_to(self.root)}, a user's own, has changed")
        return changed

    def _start(self, log: str) -> Start:
        return Start(self.verb.arguments(self.root), self.python, self.temporary, self.logs / log)

    def round(self, number: int) -> Outcome:
        """Kill the command several times, start it until it has finished, and compare."""
        rng, begin = random.Random(f"{self.seed}/{self.verb.name}/{number}"), time.monotonic()
        out = Outcome(self.verb.name, number)
        self._place()
        for _ in range(rng.randint((self.verb.kills + 1) // 2, self.verb.kills)):
            if not self._killed(out, rng):
                break
        if not out.lost:
            start = self._start(self._log(out))
            if not self._well(status := start.wait(self.verb.seconds), start):
                out.lost.append(f"{start.log}: ended with status {status}: {start.last()}")
            elif (left := start.quiet()) is None or left > 1.0:
                out.orphans.append(f"{start.log}: processes ran on after the command had ended")
        if not out.lost:
            tree = trees.read(self.root)
            out.lost += [f"{name} is missing" for name in trees.missing(tree, self.whole)]
            out.differs = [n for n in trees.unequal(tree, self.whole) if n not in self.not_compared]
            out.litter = trees.more(tree, self.whole)
            out.litter |= {
                f"TMPDIR/{name}": count for name, count in trees.more(trees.read(self.temporary), {}).items()
            }
        out.foreign = self._foreign()
        out.seconds = time.monotonic() - begin
        return out

    def _killed(self, out: Outcome, rng: random.Random) -> bool:
        """One start and its kill; False when it ended first or something is wrong."""
        moment, victim = events.draw(rng, self.life * self.verb.span, self.counts), rng.choice(self.verb.victims)
        with events.Watch(self.root) as watch:
            start = self._start(self._log(out))
            try:
                in_time = moment.wait(watch, start.alive, self.verb.seconds)
            except TimeoutError as error:
                start.end()
                out.lost.append(f"{start.log}: {error}")
                return False
            if in_time:
                victim = start.kill(victim, rng)
                phase = watch.last or "set-up"
                out.kills.append({"victim": victim, "phase": phase, "moment": str(moment)})
        if not in_time:
            if not self._well(status := start.wait(1.0), start):
                out.lost.append(f"{start.log}: ended with status {status}: {start.last()}")
            return False
        return self._survived(start, victim, out)

    def _well(self, status: int | None, start: Start) -> bool:
        """Whether a start has ended as it should: also one that is refused because its output is whole."""
        return status == 0 or bool(status == 2 and self.verb.whole and self.verb.whole in start.last())

    def _survived(self, start: Start, victim: str, out: Outcome) -> bool:
        """After a kill: wait for the command's other processes, which end by themselves or finish its work."""
        if victim == CHILD and start.wait(self.verb.seconds) is None:
            out.lost.append(f"{start.log}: still running {self.verb.seconds:g} s after a child was killed")
            return False
        if (seconds := start.quiet()) is None:
            out.orphans.append(f"{start.log}: processes are alive {QUIET_SECONDS:g} s after a kill of {victim}")
            return False
        out.longest_orphan = max(out.longest_orphan, seconds)
        return True

    def _log(self, out: Outcome) -> str:
        out.starts += 1
        return f"{out.number:03d}-{out.starts}.log"

    def forget(self) -> None:
        """Remove the logs of rounds in which nothing was wrong."""
        for log in self.logs.iterdir():
            log.unlink()
