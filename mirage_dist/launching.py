"""Starting a training run of several processes on this machine: beside this process, or in its place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from mirage_dist import liveness, signals
from mirage_dist.config import HOME
from mirage_dist.progress import handler, show_warnings
from mirage_dist.ranks import place
from mirage_dist.schema import ConfigError, RunError

LAUNCHER = HOME / "launch" / "local.sh"
# Variables that make a process a rank of a job; a run that such a process starts must not inherit them.
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
POLL_SECONDS = 0.1
# How a process of ours names its fault; the same word begins the line that says which signal has come.
_FAULT = re.compile(r"mirage: (?!SIG\w+ received: )(.*)")


class Relay:
    """A process, and what it prints passed on to `log` line by line, standard error among standard output.

    With `log` None there is nothing to pass on: the process prints where this one does, or its standard output goes to
    the file `kept`.
    """

    def __init__(
        self,
        words: Sequence[str],
        variables: Mapping[str, str],
        log: Callable[[str], None] | None,
        kept: TextIO | None = None,
    ) -> None:
        """Start `words` with these variables as its environment."""
        out, error = (kept, None) if log is None else (subprocess.PIPE, subprocess.STDOUT)
        self.process = subprocess.Popen(words, env=variables, bufsize=0, stdout=out, stderr=error)
        self.log = log
        self._rest = b""
        self._faults: dict[str, None] = {}
        if self.process.stdout is not None:
            os.set_blocking(self.process.stdout.fileno(), False)

    def take(self) -> None:
        """Pass on the whole lines that there are now, and the last one of a process that has ended. Never waits."""
        stream = self.process.stdout
        if stream is None or stream.closed:
            return
        # Not to the stream's end: a process that this one has left behind may hold it open.
        ended = self.process.poll() is not None
        while block := stream.read(1 << 16):  # None where nothing is there yet
            *lines, self._rest = (self._rest + block).split(b"\n")
            self._pass_on(lines)
        if ended:
            self._pass_on([self._rest] if self._rest else [])
            stream.close()

    def _pass_on(self, lines: Sequence[bytes]) -> None:
        assert self.log is not None
        for line in (line.decode(errors="replace") for line in lines):
            self.log(line)
            if fault := _FAULT.match(line):
                self._faults[fault[1]] = None

    def discard(self) -> None:
        """From now on read what the process prints, so that no full pipe holds it, and pass on nothing."""
        self.log = lambda line: None

    def fault(self, otherwise: str) -> str:
        """What the process and those that it started named as their faults; `otherwise` where they named none."""
        return "\n".join(self._faults) or otherwise


def replace(ranks: int, file: str, overrides: Sequence[str] = ()) -> NoReturn:
    """Become `launch/local.sh RANKS train FILE …`: its signals, its exit status and its ranks are this process's.

    Raises ConfigError in a process that is itself one of several ranks, and RunError where there is no bash.
    """
    if (size := place()[2]) > 1:
        raise ConfigError(f"--ranks {ranks} starts processes, and this one is already one of {size}; leave --ranks out")
    variables = {k: v for k, v in os.environ.items() if k not in (*LAUNCH_VARIABLES[:3], "MASTER_ADDR")}
    variables["MIRAGE_PYTHON"] = sys.executable
    try:
        os.execvpe("bash", command(ranks, file, overrides), variables)
    except FileNotFoundError as error:
        raise RunError("--ranks needs bash, which is not on PATH") from error


def train(ranks: int, file: str, overrides: Sequence[str] = (), log: Callable[[str], None] | None = None) -> None:
    """Run `launch/local.sh RANKS train FILE …` to its end; a signal is passed on to it, and its ranks end with this
    process. Where the log is kept in a file, its standard output goes there, and its warnings are shown at its end. An
    exception here, such as an interrupt, stops the ranks in order first.

    log: takes each line that the run prints; None: it prints where this process does.
    Raises StopRequested after a signal to this process or to the run, ConfigError when the run ends for bad input, and
    RunError when it fails; with `log` the errors say what the run named as its fault.
    """
    words, kept = command(ranks, file, overrides), handler.kept
    start = 0 if kept is None else os.path.getsize(kept.name)
    with signals.at_stop_points():
        relay = Relay(words, environment(ranks), log, kept)
        process = relay.process
        try:
            _wait(relay, until_signal=True)
            if process.poll() is None:
                process.terminate()
                _wait(relay)
        finally:
            # Only after an exception, which may be one of `log`: it would raise here again, and leave ranks running.
            if process.poll() is None:
                relay.discard()
                process.terminate()
                _wait(relay)
    if kept is not None:
        show_warnings(Path(kept.name), start)
    if name := signals.received():
        raise signals.StopRequested(f"{name} arrived during a training run; its committed checkpoints are kept")
    if process.returncode == signals.STOPPED:
        raise signals.StopRequested("the training run was stopped on request; its committed checkpoints are kept")
    if process.returncode:
        failed = ConfigError if process.returncode == ConfigError.status else RunError
        where = "above" if kept is None else f"above and {kept.name}"
        raise failed(relay.fault(f"training stopped with an error (see {where}): {' '.join(words)}"))


def _wait(relay: Relay, until_signal: bool = False) -> None:
    """Until the process has ended, or (until_signal) this one has received a signal."""
    while relay.process.poll() is None and not (until_signal and signals.received()):
        relay.take()
        time.sleep(POLL_SECONDS)
    relay.take()


def command(ranks: int, file: str, overrides: Sequence[str] = ()) -> list[str]:
    """The command line of such a run."""
    return ["bash", str(LAUNCHER), str(ranks), "train", file, *overrides]


def environment(ranks: int) -> dict[str, str]:
    """The variables that it starts with."""
    variables = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES and "ELASTIC" not in k}
    variables.update(MIRAGE_PYTHON=sys.executable, **liveness.child_environment(), **_gpus_for(ranks))
    return variables


def _gpus_for(ranks: int) -> dict[str, str]:
    """The variable that keeps the processes off the GPUs where there is less than one GPU for each."""
    import torch

    return {} if torch.cuda.device_count() >= ranks else {"CUDA_VISIBLE_DEVICES": ""}
