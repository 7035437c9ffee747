"""Under ZeRO-3 every rank holds a part of each weight; all refuse a model that is not whole, in the same words.

Rank 0 alone reads the weights: 512 ranks do not read a file 512 times.
"""

import json
import os
import shutil
import subprocess

import forkserver
import torch
from safetensors.torch import load_file, save_file

from mirage_dist.config import REPOSITORY
from mirage_dist.ranks import free_port

# Without the check of headers, which comes first in a run.
SCRIPT = """\
import json, sys
import deepspeed
from mirage_dist import ranks
from mirage_dist.model import load
from mirage_dist.schema import ConfigError, ModelConfig

group = ranks.start()
zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "train_micro_batch_size_per_gpu": 1}
for folder in sys.argv[1:]:
    try:
        policy = load.policy(ModelConfig(path=folder.replace("RANK", str(group.rank))), "fp32", zero)
        error = None
        parameters = list(policy.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            print("SUM", sum(float(p.double().sum()) for p in parameters))
    except ConfigError as raised:
        error = str(raised)
    ranks.barrier(group, "the next model")
    print("LOADED", json.dumps(error))
ranks.exit_well()
"""


def test_both_ranks_refuse_what_one_holds_or_none_does(toy, tmp_path):
    whole = load_file(toy.root / "model/model.safetensors")
    name = next(n for n, tensor in whole.items() if "projector" in n and tensor.ndim == 2)
    spoilt = whole[name].clone()
    spoilt[-1, -1] = float("nan")  # in the part of rank 1
    models = {
        "whole": whole,
        "missing": {n: tensor for n, tensor in whole.items() if n != name},
        "nan": {**whole, name: spoilt},
    }
    for folder, tensors in models.items():
        shutil.copytree(toy.root / "model", tmp_path / folder)
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
    # The files of rank 1 have the same headers, and zeros for weights.
    shutil.copytree(toy.root / "model", tmp_path / "of-0")
    shutil.copytree(toy.root / "model", tmp_path / "of-1")
    save_file({n: torch.zeros_like(t) for n, t in whole.items()}, tmp_path / "of-1/model.safetensors", {"format": "pt"})
    (tmp_path / "rank.py").write_text(SCRIPT)
    folders = (str(tmp_path / folder) for folder in (*models, "of-RANK"))
    command = [forkserver.python(), str(tmp_path / "rank.py"), *folders]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen(command, env={**shared, "RANK": r, "LOCAL_RANK": r}, cwd=REPOSITORY, **pipes) for r in "01"
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    errors = [
        [json.loads(line.removeprefix("LOADED ")) for line in output.splitlines() if line.startswith("LOADED ")]
        for output in outputs
    ]
    assert errors[0] == errors[1], "\n".join(outputs)
    for output in outputs:
        assert "LOAD REPORT" not in output
        assert "not sharded" not in output
        sums = [line for line in output.splitlines() if line.startswith("SUM ")]
        assert len(sums) == 2  # of `whole` and `of-RANK`
        assert sums[0] == sums[1]
    of = dict(zip((*models, "of-RANK"), errors[0], strict=True))
    assert of["of-RANK"] is None
    assert of["whole"] is None
    assert "is in none of its files" in of["missing"]
    assert name in of["missing"]
    assert "NaN or infinity" in of["nan"]
    assert f"{name} (1 of its values)" in of["nan"]
    assert str(tmp_path / "nan/model.safetensors") in of["nan"]
