"""What goes wrong in a run: numbers that are none, a full disk, a damaged checkpoint, another recipe, unequal ranks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import launch, metrics

from mirage_dist.config import REPOSITORY
from mirage_dist.world import _free_port

SHORT = ("train.max_steps=6", "train.global_batch=8", "train.micro_batch=4", "train.save_every=2", "train.export=false")


@pytest.fixture(scope="module")
def whole(toy):
    """A finished run with checkpoints at 2, 4 and 6."""
    folder = toy.root / "faults/whole"
    launch(2, "train", "configs/train/demo_npo.yaml", *toy.overrides("npo", folder), *SHORT)
    return folder


@pytest.fixture
def copy(whole, toy, tmp_path):
    """A copy without the last checkpoint, and the command that goes on with it."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/step-000006")
    return folder, ("train", "configs/train/demo_npo.yaml", *toy.overrides("npo", folder), *SHORT)


def digests(checkpoint: Path) -> dict[str, str]:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return {name: f["sha256"] for name, f in manifest["files"].items()}


def test_a_damaged_checkpoint_is_reported_and_an_older_one_used(copy, whole):
    folder, command = copy
    shard = next((folder / "checkpoints/step-000004").glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (folder / "checkpoints/step-000006.tmp").mkdir()  # a save that did not get to its commit
    told = launch(2, *command).stdout
    assert re.search(r"step-000004 is passed over: .* does not have the SHA-256", told)
    assert re.search(r"resumed from .*step-000002", told)
    assert [m["step"] for m in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert [m["loss"] for m in metrics(folder)] == [m["loss"] for m in metrics(whole)]
    assert (folder / "checkpoints/latest").read_text() == "step-000006"


def test_a_full_disk_while_saving_leaves_what_was_committed(copy, whole):
    folder, command = copy
    before = digests(folder / "checkpoints/step-000004")
    # No file may grow beyond 256 KiB: logs still can be written, shards can not.
    limited = f"ulimit -f 256; trap '' XFSZ; exec {REPOSITORY}/launch/local.sh 2 \"$@\""
    environment = {
        "MIRAGE_PYTHON": sys.executable,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(["bash", "-c", limited, "x", *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"step-000006\.tmp: cannot be written .* every checkpoint before it is whole", done.stderr)
    assert digests(folder / "checkpoints/step-000004") == before
    assert (folder / "checkpoints/latest").read_text() == "step-000006"  # named by the copy; its directory is gone
    assert not (folder / "checkpoints/step-000006").exists()
    launch(2, *command)
    assert [m["loss"] for m in metrics(folder)] == [m["loss"] for m in metrics(whole)]


@pytest.mark.parametrize(
    ("change", "words"),
    [(["train.lr=0.5"], r"train\.lr: 0\.5 here"), (["seed=5"], r"seed: 5 here")],
)
def test_a_run_of_another_recipe_is_not_continued(copy, change, words):
    _, command = copy
    done = launch(2, *command, *change, check=False)
    assert done.returncode == 2
    assert re.search(words, done.stderr)


def test_another_number_of_ranks_is_refused_by_name(copy):
    _, command = copy
    done = launch(1, *command, check=False)
    assert done.returncode == 2
    assert "another number of ranks" in done.stderr


@pytest.mark.parametrize("stage", ["zero3", "zero2"])
def test_steps_without_a_finite_gradient_are_skipped_and_too_many_stop_the_run(toy, tmp_path, stage):
    told = [*toy.overrides("npo", tmp_path / "run"), *SHORT, "train.nonfinite_patience=3", "train.warmup=0"]
    # The first step moves so far that nothing after it is a number.
    told += ["train.lr=1e30", "train.clip=0", f"deepspeed=configs/deepspeed/{stage}.json"]
    done = launch(2, "train", "configs/train/demo_npo.yaml", *told, check=False)
    assert done.returncode == 1
    assert "not finite in 3 steps in a row" in done.stderr
    records = metrics(tmp_path / "run")
    assert [m["skipped"] for m in records] == [False, True, True]
    assert records[-1]["grad_norm"] is None


def test_ranks_at_different_points_are_told_apart_instead_of_hanging(tmp_path):
    script = tmp_path / "unequal.py"
    script.write_text(
        "from mirage_dist import world\n"
        "w = world.start()\n"
        "world.gather(w, [1.0, 2.0], 'save' if w.rank else 'step 3')\n"
    )
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE, text=True)
        for r in "01"
    ]
    for rank in ranks:
        assert "rank 0: step 3 with 2 values; rank 1: save with 2 values" in rank.communicate(timeout=120)[1]
