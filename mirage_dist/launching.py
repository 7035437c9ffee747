"""Starting a training run of several processes on this machine: beside this process, or in its place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mirage_dist import liveness, signals
from mirage_dist.config import HOME
from mirage_dist.progress import handler, show_warnings
from mirage_dist.ranks import place
from mirage_dist.schema import ConfigError, RunError

LAUNCHER = HOME / "launch" / "local.sh"
# Variables that make a process a rank of a job; a run that such a process starts must not inherit them.
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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


def train(ranks: int, file: str, overrides: Sequence[str] = ()) -> None:
    """Run `launch/local.sh RANKS train FILE …` to its end; a signal is passed on to it, and its ranks end with this
    process. Where the log is kept in a file, its standard output goes there, and its warnings are shown at its end.

    Raises StopRequested after a signal, ConfigError when the run ends for bad input, and RunError when it fails.
    """
    words, kept = command(ranks, file, overrides), handler.kept
    start = 0 if kept is None else os.path.getsize(kept.name)
    with signals.at_stop_points():
        process = subprocess.Popen(words, env=environment(ranks), stdout=kept)
        while process.poll() is None:
            if signals.received():
                process.terminate()
                process.wait()
            time.sleep(0.1)
    if kept is not None:
        show_warnings(Path(kept.name), start)
    if name := signals.received():
        raise signals.StopRequested(f"{name} arrived during a training run; its committed checkpoints are kept")
    if process.returncode:
        failed = ConfigError if process.returncode == ConfigError.status else RunError
        where = "above" if kept is None else f"above and {kept.name}"
        raise failed(f"training stopped with an error (see {where}): {' '.join(words)}")


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
