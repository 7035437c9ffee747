"""The demo's NPO recipe on one GPU in bf16 has the losses of the same recipe on the CPU."""

import os

import pytest
import torch
from conftest import launch, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_losses_on_the_gpu_are_those_of_the_cpu(toy, tmp_path, monkeypatch):
    short = (
        "train.max_steps=10",
        "train.global_batch=8",
        "train.micro_batch=8",
        "train.warmup=0.5",
        "train.export=false",
    )
    losses = {}
    for device, visible in (("gpu", os.environ.get("CUDA_VISIBLE_DEVICES", "0")), ("cpu", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        overrides = [*toy.overrides("npo", tmp_path / device), *short, "train.dtype=bf16"]
        launch(1, "train", "configs/train/demo_npo.yaml", *overrides)
        losses[device] = torch.tensor([m["loss"] for m in metrics(tmp_path / device)])
    torch.testing.assert_close(losses["gpu"], losses["cpu"], rtol=2e-2, atol=2e-2)
