"""Answers that are too long, in a run: an error before the model loads, or cut and counted."""

import json
import shutil

import pytest
import torch
from conftest import launch, metrics
from safetensors.torch import load_file, save_file

from mirage_dist.data import stream

LONG = (2, 3)  # in the forget set: one in each of two ranks' share
STEPS, BATCH = 2, 8


@pytest.fixture(scope="module")
def run(toy):
    """run(name, *overrides): two ranks on a forget set with two answers that do not fit; and its run directory."""
    root = toy.root / "lengths"
    root.mkdir()
    rows = [json.loads(line) for line in (toy.root / "forget.jsonl").read_text().splitlines()]
    for index in LONG:
        rows[index]["answer"] = " ".join([rows[index]["answer"]] * 20)
    (root / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = (f"train.max_steps={STEPS}", f"train.global_batch={BATCH}", "train.micro_batch=4", "train.export=false")
    forget = f"data.streams.forget=[{{format: samples, path: {root}/forget.jsonl}}]"

    def start(name, *overrides):
        arguments = [*toy.overrides("npo", root / name), *short, forget, *overrides]
        return launch(2, "train", "configs/train/demo_npo.yaml", *arguments, check=False), root / name

    start.samples = rows
    return start


def test_by_default_the_run_ends_before_the_model_loads_and_names_the_sample(run, toy, tmp_path):
    shutil.copytree(toy.root / "model", tmp_path / "model")
    file = tmp_path / "model/model.safetensors"  # a load would end with its own error
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    done, folder = run("error", "data.on_long=error", f"model.path={tmp_path}/model")
    assert done.returncode == 2, done.stdout + done.stderr
    names = [run.samples[index]["id"] for index in LONG]
    assert any(f"forget.jsonl: sample {name!r}: " in done.stderr for name in names)
    assert "data.max_length is 64 (data.on_long=error; truncate cuts answers only, " in done.stderr
    assert "NaN" not in done.stderr
    assert not (folder / "metrics.jsonl").exists()


def test_with_truncate_answers_are_cut_logged_and_counted_by_step(run, toy, tmp_path):
    """With one held-out sample too, which leaves the second rank without a share to measure."""
    one = (toy.root / "retain.jsonl").read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(f"{one}\n")
    held_out = f"data.streams.validation=[{{format: samples, path: {tmp_path}/one.jsonl}}]"
    done, folder = run("truncate", "data.on_long=truncate", held_out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(folder)[-1]["validation"]["loss"] > 0
    assert "2 answers are longer than data.max_length=64 and will be cut" in done.stdout
    seen = [stream.batch(21, "forget", len(run.samples), step, BATCH).tolist() for step in range(STEPS)]
    expected = [sum(index in LONG for index in indices) for indices in seen]
    assert sum(expected) > 0
    assert [m["cut"] for m in metrics(folder)] == expected
