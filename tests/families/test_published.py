"""Models of the published sizes pass `--check` and `plan` before any weight is read, in seconds."""

import os
import re

import pytest
import torch

from families import published, tasks
from mirage_dist import cli

# These take 10 to 25 s of one core each for their many picture tokens, the others 1 to 8 s.
SLOW = {"idefics3", "mllama"}
NAMES = [name for name in published.SIZES if name not in SLOW or os.environ.get("MIRAGE_EVERY_SIZE")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tasks.write_data(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_check_and_plan_pass_without_weights(name, data, tmp_path, capsys):
    folder = published.make(name, tmp_path / name)
    change = {"objective": tasks.RMU, "reference": "engine", "data": {"max_length": 20000}}
    recipe = str(tasks.recipe(data, folder, tmp_path / "run", name.endswith("_text"), change))
    assert cli.main(["train", recipe, "--check"]) == 0, capsys.readouterr().err
    assert "in order" in capsys.readouterr().out
    assert cli.main(["plan", recipe, "--ranks", "8", "train.global_batch=16", "train.dtype=bf16"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\d GiB|\d GB", text), text
    assert not torch.distributed.is_initialized()
