"""A requeue of two ranks has the losses of the run that never stopped, from the same table; errors are every rank's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import launch, losses, metrics

STEPS = 4
OWN = (f"train.max_steps={STEPS}", "train.global_batch=8", "train.micro_batch=4", "train.save_every=2")


def command(data: Path, toy, run: Path, *own: str):
    overrides = [o.replace(f"{toy.root}/", f"{data}/") for o in toy.overrides("npo", run)]
    return ("train", "configs/train/demo_npo.yaml", *overrides, *OWN, "train.export=false", *own)


@pytest.fixture(scope="module")
def data(toy, tmp_path_factory):
    """A copy of the toy's data, of which some pictures have many samples."""
    folder = tmp_path_factory.mktemp("again")
    shutil.copytree(toy.root / "model", folder / "model")
    for name in ("forget", "retain"):
        records = [json.loads(line) for line in (toy.root / f"{name}.jsonl").read_text().splitlines()]
        for record in records:
            record["image"] = str(shutil.copy(record["image"], folder))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def whole(toy, data):
    """The run that was never stopped, by two ranks."""
    launch(2, *command(data, toy, data / "whole"))
    return data / "whole"


def test_a_requeue_has_the_losses_of_the_run_that_never_stopped_and_writes_no_table(toy, data, whole):
    run = data / "half"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:06d}")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[: STEPS // 2]))
    kept = {file: file.stat().st_mtime_ns for file in (run / "samples").rglob("*")}
    done = launch(2, *command(data, toy, run))
    assert "resumed from" in done.stdout + done.stderr
    assert metrics(run)[-1]["step"] == STEPS
    assert torch.equal(losses(run), losses(whole))
    assert {file: file.stat().st_mtime_ns for file in (run / "samples").rglob("*")} == kept


def test_one_rank_and_two_make_the_same_table(toy, data, whole):
    launch(1, *command(data, toy, data / "one"))
    (one,), (two,) = (list((run / "samples").iterdir()) for run in (data / "one", whole))
    assert one.name == two.name
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in two.iterdir()
    }


def test_every_rank_ends_with_the_same_error_and_nothing_of_the_run_is_left(toy, data):
    picture = min(data.glob("*.png"))
    whole = picture.read_bytes()
    picture.write_bytes(b"no picture")
    done = launch(2, *command(data, toy, data / "refused"), check=False)
    picture.write_bytes(whole)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"image {picture}: broken: no picture can be read from it" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(data.glob("refused*"))
