"""The same run whatever starts its processes, from nothing: launch/local.sh, torchrun, the DeepSpeed launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import launch, metrics

from mirage_dist.config import REPOSITORY
from mirage_dist.ranks import free_port

SHORT = ("train.max_steps=4", "train.global_batch=8", "train.micro_batch=4", "train.export=false")
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node=2", "--master-port={port}", "-m", "mirage_dist.cli"],
    "deepspeed": [
        str(BIN / "deepspeed"),
        "--num_gpus=2",
        "--master_port={port}",
        "--no_local_rank",
        "--module",
        "mirage_dist.cli",
    ],
}


def command(name: str, toy, run: Path, *own: str) -> list[str]:
    starter = [word.format(port=free_port()) for word in LAUNCHERS[name]]
    return [*starter, "train", "configs/train/demo_npo.yaml", *toy.overrides("npo", run), *SHORT, *own]


def environment() -> dict[str, str]:
    given = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # The DeepSpeed launcher finds itself and python through PATH, and asks for GPUs unless told.
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**given, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def whole(toy):
    folder = toy.root / "launchers/whole"
    launch(2, "train", "configs/train/demo_npo.yaml", *toy.overrides("npo", folder), *SHORT, fresh=True)
    return folder


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_makes_the_same_run(whole, toy, tmp_path, name):
    line = command(name, toy, tmp_path / "run")
    done = subprocess.run(line, env=environment(), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [m["loss"] for m in metrics(tmp_path / "run")] == [m["loss"] for m in metrics(whole)]


@pytest.mark.parametrize("starter", [[], ["-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port={port}"]])
def test_a_process_alone_needs_no_place_to_meet_whatever_is_left_over(tmp_path, starter):
    (tmp_path / "alone.py").write_text("from mirage_dist import ranks\nassert ranks.start(60.0).size == 1\n")
    left = {} if starter else {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "x"}
    words = [word.format(port=free_port()) for word in starter]
    command = [sys.executable, *words, str(tmp_path / "alone.py")]
    done = subprocess.run(command, env={**environment(), **left}, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_port_that_another_program_has_taken_is_named(toy, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = ["launch/local.sh", "2", "train", "configs/train/demo_npo.yaml", *toy.overrides("npo", tmp_path / "run")]
        given = {**environment(), "MIRAGE_PYTHON": sys.executable, "MASTER_PORT": port}
        done = subprocess.run(line, env=given, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"MASTER_PORT={port}: another program of this machine listens there" in done.stderr
    assert "rank 0: Traceback" not in done.stderr
    assert "this is a bug" not in done.stderr


def test_a_signal_to_torchrun_ends_in_a_commit(toy, tmp_path):
    """torchrun passes SIGTERM on to its workers and gives them time; what it exits with is its own."""
    folder = tmp_path / "run"
    line = command("torchrun", toy, folder, "train.max_steps=2000")
    process = subprocess.Popen(
        line, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert "of 2000 is committed" in output
    done = int((folder / "checkpoints/latest").read_text().removeprefix("step-"))
    assert [m["step"] for m in metrics(folder)] == list(range(1, done + 1))
