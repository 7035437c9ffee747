"""Which errors are another rank's, and who speaks about a signal."""

import subprocess
import sys

import pytest

from mirage_dist import ranks
from mirage_dist.schema import ConfigError, RunError

CONSEQUENCES = {
    "[/pytorch/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:13498: Connection reset by peer. "
    "This is typically caused by a remote worker hanging": "Read error [127.0.0.1]:13498: Connection reset by peer",
    "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv": (
        "Timed out waiting 1800000ms for recv"
    ),
    "NCCL error in: /pytorch/NCCLUtils.hpp:268, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a network error": (
        "NCCL error in: /pytorch/NCCLUtils.hpp:268, remote process exited or there was a network error"
    ),
    "failed to recv, got 0 bytes": "failed to recv, got 0 bytes",
    "sendBytes failed on SocketImpl(fd=3): Broken pipe": "sendBytes failed on SocketImpl(fd=3): Broken pipe",
}
CAUSES = [
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("NCCL error in: /pytorch/NCCLUtils.hpp:268, invalid usage, Duplicate GPU detected"),
    RuntimeError("ranks are not at the same point (rank 0: step 3; rank 1: save)"),
    RuntimeError(""),
    ConnectionResetError(104, "Connection reset by peer"),  # of somebody else's server
    RunError("runs/x: cannot be written (Broken pipe); every checkpoint in it is whole"),
    ValueError("gloo/transport"),
]


@pytest.mark.parametrize(("message", "reason"), CONSEQUENCES.items())
def test_a_broken_connection_is_another_ranks_fault(message, reason):
    assert ranks.peer_lost(RuntimeError(message)) == reason


@pytest.mark.parametrize("error", CAUSES, ids=str)
def test_every_other_error_is_this_ranks_own(error):
    assert ranks.peer_lost(error) is None


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_signal_to_all_ranks_is_reported_once(monkeypatch, rank, lines):
    monkeypatch.setenv("RANK", rank)
    code = (
        "import os, signal; from mirage_dist import signals; signals.install(); assert not signals.wait(0.0)\n"
        "for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert signals.wait(60.0); print(signals.received())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "SIGTERM\n"
    assert done.stderr.count("SIGTERM received: stopping in order") == lines


LAUNCHERS = {
    "srun --pty": {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    "mpiexec": {"PMI_RANK": "1", "MPI_LOCALRANKID": "1", "PMI_SIZE": "2"},
    "by hand": {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
}


@pytest.fixture
def launched(monkeypatch):
    """A function that makes this process one that was started with these variables and no others of a launcher."""

    def start(variables):
        for name in {name for names in LAUNCHERS.values() for name in names} | {"MASTER_ADDR", "MASTER_PORT"}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("address", "missing"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"MASTER_ADDR": "node1"}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "29500", "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_processes_that_do_not_know_where_to_meet_are_refused_with_what_to_do(launched, launcher, address, missing):
    launched({**LAUNCHERS[launcher], **address})
    with pytest.raises(ConfigError, match=missing) as error:
        ranks.check_rendezvous()
    assert "launch/local.sh 2 train" in str(error.value)
    assert "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1" in str(error.value)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_that_know_where_to_meet_are_the_ranks_that_their_launcher_says(launched, launcher):
    launched({**LAUNCHERS[launcher], "MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    ranks.check_rendezvous()
    assert ranks.place()[2] == 2
    launched({**LAUNCHERS[launcher], "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    ranks.check_rendezvous()  # alone, whatever else the shell holds
    assert ranks.place() == (0, 0, 1)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but not RANK and LOCAL_RANK"),
        ({"RANK": "0"}, "RANK=0 is set but not LOCAL_RANK and WORLD_SIZE"),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "is set but not MPI_LOCALRANKID"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a whole number"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=2: expected a rank from 0 to WORLD_SIZE - 1"),
        (
            {**LAUNCHERS["by hand"], "MASTER_ADDR": "a", "MASTER_PORT": "tcp://a:1"},
            "MASTER_PORT='tcp://a:1': expected a port",
        ),
    ],
)
def test_launch_variables_that_cannot_be_are_named(launched, variables, words):
    launched(variables)
    with pytest.raises(ConfigError, match=words):
        ranks.check_rendezvous()


def test_a_process_that_no_launcher_started_is_alone(launched):
    launched({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "PMI_SIZE": "1", "WORLD_SIZE": "1"})
    assert ranks.place() == (0, 0, 1)


def test_mirage_train_says_so_before_anything_heavy_is_imported(launched):
    launched(LAUNCHERS["srun --pty"])
    code = (
        "import sys; from mirage_dist import cli\n"
        "status = cli.main(['train', 'configs/train/npo.yaml'])\n"
        "print(status, [m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 []"
    assert done.stderr.startswith(
        "mirage: SLURM_NTASKS=2 makes this one of 2 processes, but MASTER_ADDR and MASTER_PORT"
    )
