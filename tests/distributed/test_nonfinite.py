"""bf16: a step whose gradient is no number on one rank changes nothing on any, is counted, and the run goes on."""

import json
import os
import re
import subprocess

import forkserver
import pytest
from conftest import metrics

from mirage_dist.ranks import free_port

# `mirage train`, but the second gradient of rank 1 is NaN. A step here is one micro-batch.
SCRIPT = """\
import dataclasses, os, sys
from mirage_dist import cli
from mirage_dist.objectives.likelihood import SFT

whole, calls = SFT.__call__, []

def spoilt(self, views):
    calls.append(None)
    factor = float("nan") if len(calls) == 2 and os.environ["RANK"] == "1" else 1.0
    return whole(self, {n: dataclasses.replace(v, logp_N=v.logp_N * factor) for n, v in views.items()})

SFT.__call__ = spoilt
sys.exit(cli.main(sys.argv[1:]))
"""
SHORT = ("train.max_steps=4", "train.global_batch=4", "train.micro_batch=2", "train.export=false")
KEPT = ("train.save_every=1", "train.keep_last=null")


@pytest.mark.parametrize("stage", ["zero3", "zero2"])
def test_a_bf16_step_without_a_finite_gradient_is_skipped_and_counted(toy, tmp_path, stage):
    (tmp_path / "spoilt.py").write_text(SCRIPT)
    overrides = [*toy.overrides("sft", tmp_path / "run"), *SHORT, *KEPT, f"deepspeed=configs/deepspeed/{stage}.json"]
    command = [
        forkserver.python(),
        tmp_path / "spoilt.py",
        "train",
        "configs/train/demo_sft.yaml",
        *overrides,
        "train.dtype=bf16",
    ]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen(command, env={**shared, "RANK": r, "LOCAL_RANK": r}, **pipes) for r in "01"]
    for rank in ranks:
        output = rank.communicate(timeout=300)[0]
        assert rank.returncode == 0, output
    records = metrics(tmp_path / "run")
    assert [m["skipped"] for m in records] == [False, True, False, False]
    for name in ("loss", "grad_norm"):
        assert [m[name] is None for m in records] == [False, True, False, False]
    # Master weights and moments of every rank, file by file.
    first, second, third = (shards(tmp_path / f"run/checkpoints/step-{n:06d}") for n in (1, 2, 3))
    assert len(first) == 2
    assert second == first
    assert all(third[name] != digest for name, digest in first.items())


@pytest.mark.parametrize(
    ("spoilt", "change", "fault"),
    [
        (False, "train.optimizer.eps=0", r"of which [0-3] were skipped, \S+ \(\d+ parameters in all\) is not finite"),
        (True, "train.nonfinite_patience=9", "of which 4 were skipped, no weight changed"),
    ],
)
def test_a_run_without_a_result_is_no_success_and_exports_nothing(toy, tmp_path, spoilt, change, fault):
    """Also where the run ends before train.nonfinite_patience does."""
    (tmp_path / "spoilt.py").write_text(SCRIPT.replace('len(calls) == 2 and os.environ["RANK"] == "1"', "True"))
    start = [tmp_path / "spoilt.py"] if spoilt else ["-m", "mirage_dist.cli"]
    overrides = [*toy.overrides("sft", tmp_path / "run"), *SHORT[:-1], change]
    command = [forkserver.python(), *start, "train", "configs/train/demo_sft.yaml", *overrides]
    alone = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^mirage: .*run: after 4 steps, {fault}, so nothing is exported; lower", done.stderr, re.M)
    assert not (tmp_path / "run/export").exists()


def shards(checkpoint):
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: file["sha256"] for name, file in files.items() if name.startswith("rank-")}
