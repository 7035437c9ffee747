"""Which errors are another rank's, and who speaks about a signal."""

import subprocess
import sys

import pytest

from mirage_dist import ranks
from mirage_dist.schema import RunError

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
