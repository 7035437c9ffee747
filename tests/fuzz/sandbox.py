"""One case in a process of its own, forked from one that has imported the libraries; bounded in time and memory."""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.forkserver.server import IMPORTED

LIBRARIES = (
    "mirage_dist.cli",
    *IMPORTED,
    "mirage_dist.train.planning.plan",
    "mirage_dist.erasure.run",
    "mirage_dist.report",
    "mirage_dist.report.audit",
    "mirage_dist.demo",
    "pyarrow.parquet",
    "matplotlib.pyplot",
)
CPU_SECONDS = 20.0  # of one case and its processes; more is a hang
IDLE_SECONDS = 25.0  # without any CPU time
WALL_SECONDS = 150.0  # a busy machine
ADDRESSES = 8 << 30  # bytes of address space that a case may add
BUG = 99  # exit status of a case that raised


def warm() -> None:
    """Import what the verbs import, and leave one thread, so that a fork copies all of it."""
    from mirage_dist import ranks

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    ranks.name_accelerator()
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # a collection in a case would copy every page of the libraries
    atexit.register(gc.unfreeze)  # or what is still held at the end is reported as leaked


@dataclass(frozen=True)
class Outcome:
    """How a case ended. status: negative for a signal. hang, memory: it was stopped, or took too much."""

    status: int
    seconds: float
    stdout: str
    stderr: str
    hang: str = ""  # where it stood
    memory: int = 0  # bytes resident beyond those of the forking process


class Child:
    """A verb, or a function, in `folder`. logs: prefix of the files that hold what it prints."""

    def __init__(
        self, folder: Path, work: Sequence[str] | Callable[[], int], environment: Mapping[str, str], logs: Path
    ) -> None:
        self.out, self.err, self.stuck = (Path(f"{logs}.{end}") for end in ("out", "err", "stuck"))
        self.begin = self.moved = time.monotonic()
        self.cpu = 0.0
        self.resident = _resident()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._become(folder, work, environment)

    def _become(self, folder: Path, work: Sequence[str] | Callable[[], int], environment: Mapping[str, str]) -> None:
        status = BUG
        try:
            os.setsid()
            for target, file in ((1, self.out), (2, self.err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), target)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            faulthandler.register(signal.SIGUSR2, file=self.stuck.open("w"), all_threads=False)
            _place(folder, environment)
            addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
            status = _call(work)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def poll(self) -> Outcome | None:
        """The outcome when it has ended, or was stopped here because it hangs."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        hang = ""
        if not pid:
            now, cpu = time.monotonic(), _cpu_seconds(self.pid)
            if cpu > self.cpu + 0.05:
                self.cpu, self.moved = cpu, now
            if cpu < CPU_SECONDS and now - self.moved < IDLE_SECONDS and now - self.begin < WALL_SECONDS:
                return None
            hang = f"{cpu:.0f} s of CPU, {now - self.begin:.0f} s in all; " + self._where()
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            pid, status, usage = os.wait4(self.pid, 0)
        with suppress(ProcessLookupError):  # processes that it left
            os.killpg(self.pid, signal.SIGKILL)
        return Outcome(
            os.waitstatus_to_exitcode(status),
            time.monotonic() - self.begin,
            *(file.read_text(errors="backslashreplace") for file in (self.out, self.err)),
            hang,
            max(0, usage.ru_maxrss * 1024 - self.resident),
        )

    def wait(self) -> Outcome:
        while (outcome := self.poll()) is None:
            time.sleep(0.01)
        return outcome

    def _where(self) -> str:
        """The innermost frames of its main thread that are ours."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR2)
        time.sleep(1.0)
        frames = re.findall(r'"[^"]*/(mirage_dist/[^"]+)", line \d+ in (\S+)', self.stuck.read_text())
        return " < ".join(f"{file}:{function}" for file, function in frames[:3])


def _place(folder: Path, environment: Mapping[str, str]) -> None:
    os.chdir(folder)
    home = folder.parent / f"{folder.name}-home"
    home.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "DS_ACCELERATOR") if name in os.environ}
    os.environ.clear()
    os.environ.update(kept, HOME=str(home), TMPDIR=str(home), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    os.environ.update(WANDB_MODE="offline", MIRAGE_KILL_SECONDS="2")
    os.environ.update(environment)


def _call(work: Sequence[str] | Callable[[], int]) -> int:
    if callable(work):
        return work()
    from mirage_dist.cli import main

    sys.argv = ["mirage", *work]
    try:
        return main(work)
    except SystemExit as end:  # argparse, and ranks that end with another's status
        return end.code if isinstance(end.code, int) else BUG


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_seconds(pid: int) -> float:
    """Of a process, its threads, and its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
