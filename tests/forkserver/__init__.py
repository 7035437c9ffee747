"""An interpreter that has imported the libraries already: what a test starts with it is a process of its own, soon.

A rank imports torch, DeepSpeed and transformers for longer than it trains in most tests. `python()` names a program
that takes the place of `sys.executable` in a command line. A server, which has imported the libraries and nothing else,
forks the process that runs the command: with the caller's arguments, environment, working directory and open
descriptors 0 to 2, without threads, and with its own process group, CUDA or DeepSpeed state still to be set up.

client.py    what runs in the caller's process table in place of Python: passes signals on, ends as the process ends
server.py    imports, then forks a process for each client; ranks of even and of odd number have a server each, so that
             the order of sets differs between ranks, as it does between two processes that start from nothing

Every launcher has a test whose processes start from nothing as well (`launch(…, fresh=True)`, tests/distributed/
test_launchers.py and tests/slurm/test_runs.py).
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
VARIABLE = "MIRAGE_TEST_FORKSERVER"  # the folder of the servers of one session of tests
SERVERS = 2


def python() -> str:
    """The program to start instead of `sys.executable`, which it is itself where a process may not be forked.

    The first call of a session starts the servers; a client that is too early waits for them.
    """
    # CUDA does not survive a fork, and a server could initialize it while it imports.
    if VARIABLE not in os.environ or torch.cuda.is_available():
        return sys.executable
    folder = Path(os.environ[VARIABLE])
    program = folder / "python"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            for number in range(SERVERS):
                _start(folder, number)
            program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -IS '{HERE}/client.py' '{folder}' \"$@\"\n")
            program.chmod(0o700)
    return str(program)


def _start(folder: Path, number: int) -> None:
    """A server, and return when its socket exists."""
    command = [sys.executable, str(HERE / "server.py"), str(folder), str(number)]
    # What the libraries read when they are imported, as launch() and `mirage` itself set it.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    log = (folder / f"server-{number}.log").open("w")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": log}
    server = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True, **pipes)
    assert server.stdout is not None
    ready = server.stdout.readline()
    assert ready, (folder / f"server-{number}.log").read_text()
