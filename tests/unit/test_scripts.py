"""The scripts of slurm/ and launch/ run the checkout that MIRAGE_HOME names, wherever the job is submitted from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirage_dist.config import REPOSITORY

SCRIPTS = ("sft", "unlearn_npo", "unlearn_rmu", "eval_attacks", "mirage", "doctor")
STUBS = {
    "scontrol": "[[ $1 != show ]] || echo 127.0.0.1",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
}


@pytest.fixture
def elsewhere(tmp_path):
    """Another checkout, with spaces and quotes in its name, whose code must not run."""
    folder = tmp_path / 'other\'s "checkout" $HOME'
    (folder / "mirage_dist").mkdir(parents=True)
    (folder / "mirage_dist/__init__.py").write_text("raise SystemExit('the other checkout runs')\n")
    (folder / "deepspeed.py").write_text("raise SystemExit('a module of the working directory runs')\n")
    return folder


@pytest.fixture
def run(tmp_path, elsewhere):
    """A script of this checkout as Slurm runs it on one node, with the other checkout as the working directory."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o700)
    slurm = {"JOB_ID": "1", "SUBMIT_DIR": str(elsewhere), "NNODES": "1", "NODEID": "0", "JOB_NODELIST": "127.0.0.1"}
    slurm |= {"STEP_NODELIST": "127.0.0.1", "STEP_ID": "0", "PROCID": "0", "LOCALID": "0", "NTASKS": "1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MIRAGE")) and k != "PYTHONPATH"}
    environment = {
        **inherited,
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "MIRAGE_PYTHON": sys.executable,
        "MIRAGE_GPUS": "0",
        "DS_ACCELERATOR": "cpu",
    }

    def start(file: Path, *words: str, **own: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", str(file), *words], cwd=elsewhere, env=environment | own, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return start


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_the_checkout_that_mirage_home_names(run, script):
    words = {"mirage": ("train", "no.yaml"), "doctor": ("--recipe", "no.yaml")}.get(script, ("no.yaml",))
    status, output = run(REPOSITORY / f"slurm/{script}.sh", *words, MIRAGE_HOME=str(REPOSITORY))
    assert status == 2, output
    assert f"no.yaml: no such file (looked here and in {REPOSITORY})" in output


def test_the_default_recipe_is_that_of_the_checkout_that_runs(run, elsewhere):
    recipe = elsewhere / "configs/train/sft.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("{")
    words = ("model.path=nowhere", "train.lr=much")
    status, output = run(REPOSITORY / "slurm/sft.sh", *words, MIRAGE_HOME=str(REPOSITORY))
    assert status == 2, output
    assert f"mirage train {REPOSITORY}/configs/train/sft.yaml" in output
    assert "train.lr" in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_from_elsewhere_names_mirage_home(run, script):
    status, output = run(REPOSITORY / f"slurm/{script}.sh")
    assert status == 2, output
    assert "set MIRAGE_HOME to it (now: not set)" in output


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launchers_workers_run_the_checkout_of_the_script(run, launcher):
    status, output = run(REPOSITORY / "launch/node.sh", "train", "no.yaml", MIRAGE_LAUNCHER=launcher)
    # Of a process of a step: 100 more.
    assert status == 102, output
    assert f"no.yaml: no such file (looked here and in {REPOSITORY})" in output


def test_local_processes_run_the_checkout_of_the_script(run):
    status, output = run(REPOSITORY / "launch/local.sh", "1", "train", "no.yaml")
    assert status == 2, output
    assert f"no.yaml: no such file (looked here and in {REPOSITORY})" in output


EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("visible", "variables", "shares"),
    [
        # One task a GPU, whether Slurm hides the others' GPUs or not.
        (EIGHT, {"NTASKS": 8, "STEP_TASKS_PER_NODE": 8, "GPUS_ON_NODE": 8}, list("01234567")),
        (EIGHT, {"NTASKS": 8, "STEP_TASKS_PER_NODE": 8, "GPUS_ON_NODE": 8, "GPUS_PER_TASK": 1}, list("01234567")),
        ("3", {"NTASKS": 8, "STEP_TASKS_PER_NODE": 8, "GPUS_ON_NODE": 8}, ["3"]),
        # --gpu-bind=closest: four tasks see these four.
        ("4,5,6,7", {"NTASKS": 8, "STEP_TASKS_PER_NODE": 8, "GPUS_ON_NODE": 8}, list("4567")),
        # Fewer tasks than GPUs, each with several; those that Slurm has dealt stay.
        (EIGHT, {"NTASKS": 2, "STEP_TASKS_PER_NODE": 2, "GPUS_ON_NODE": 8}, ["0,1,2,3", "4,5,6,7"]),
        ("4,5,6,7", {"NTASKS": 2, "STEP_TASKS_PER_NODE": 2, "GPUS_ON_NODE": 8}, ["4,5,6,7"]),
        # A step of one node in a job of two, and nodes with different numbers of tasks.
        (EIGHT, {"NTASKS": 2, "NNODES": 2, "STEP_TASKS_PER_NODE": 2, "GPUS_ON_NODE": 8}, ["0,1,2,3", "4,5,6,7"]),
        (EIGHT, {"NTASKS": 6, "NNODES": 2, "STEP_TASKS_PER_NODE": "5,1", "GPUS_ON_NODE": 8}, list("01234")),
        (EIGHT, {"NTASKS": 6, "NNODES": 3, "STEP_TASKS_PER_NODE": "2(x3)", "GPUS_ON_NODE": 8}, ["0,1,2,3", "4,5,6,7"]),
        # More tasks than GPUs, names of parts of a GPU, none at all.
        ("0,1", {"NTASKS": 3, "STEP_TASKS_PER_NODE": 3, "GPUS_ON_NODE": 2}, list("010")),
        ("MIG-a,MIG-b", {"NTASKS": 2, "STEP_TASKS_PER_NODE": 2}, ["MIG-a", "MIG-b"]),
        ("", {"NTASKS": 2, "STEP_TASKS_PER_NODE": 2}, ["", ""]),
    ],
)
def test_evaluation_workers_of_a_node_have_gpus_of_their_own(run, tmp_path, visible, variables, shares):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "GPUs <$CUDA_VISIBLE_DEVICES>"\n')
    python.chmod(0o700)
    given = {f"SLURM_{name}": str(value) for name, value in variables.items()}
    given |= {"CUDA_VISIBLE_DEVICES": visible, "MIRAGE_PYTHON": str(python)}
    for local_rank, share in enumerate(shares):
        place = {"SLURM_LOCALID": str(local_rank), "SLURM_PROCID": str(local_rank)}
        status, output = run(REPOSITORY / "launch/node.sh", "eval", "x.yaml", **given, **place)
        assert (status, output.splitlines()[-1]) == (0, f"GPUs <{share}>"), output
