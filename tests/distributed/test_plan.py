"""Cached vision features on real DeepSpeed runs, and what `mirage plan` says against what these runs leave."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import launch, metrics
from PIL import Image
from safetensors.torch import load_file

from mirage_dist import config as configs
from mirage_dist.cli import main
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.model.shards import Shards
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.caches import vision as vision_cache
from mirage_dist.train.lease import LOCK
from mirage_dist.train.planning import plan
from mirage_dist.train.planning.costs import memory

SHORT = ("train.max_steps=6", "train.global_batch=20", "train.save_every=2", "train.keep_last=2")
JSON = {
    "zero3": {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0},
    "zero2": {"stage": 2, "overlap_comm": True},
}
# name -> (ranks, stage, overrides)
RUNS = {
    "plain": (1, 3, ("train.micro_batch=20", "deepspeed={zero3}")),
    "zero3": (2, 3, ("train.micro_batch=5", "deepspeed={zero3}", "data.cache_vision=true", "reference=engine")),
    "zero2": (2, 2, ("train.micro_batch=10", "deepspeed={zero2}", "data.cache_vision=true")),
}


@pytest.fixture(scope="module")
def finished(toy):
    """Every run of RUNS. `zero2` finds one of the two parts that `zero3` has written, as after a kill."""
    root = toy.root / "plan"
    root.mkdir()
    base = sources.read(formats.source("llava", str(toy.root / "world/base.json"), str(toy.root / "world"))).samples
    noise = np.random.default_rng(0).integers(0, 256, (len(base), 32, 32, 3), dtype=np.uint8)
    for number, sample in enumerate(base):
        if sample.image is not None:
            Image.fromarray(noise[number]).save(root / f"{number}.png")
            base[number] = replace(sample, image=str(root / f"{number}.png"))
    write_samples(root / "forget.jsonl", base[:40])
    write_samples(root / "retain.jsonl", base[40:100])
    files = {name: str(root / f"{name}.json") for name in JSON}
    for name, zero in JSON.items():
        (root / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    folders = {}
    for name, (ranks, _, own) in RUNS.items():
        folder = root / name
        data = [f"data.streams.{n}=[{{format: samples, path: {root}/{n}.jsonl}}]" for n in ("forget", "retain")]
        overrides = [*toy.overrides("npo", folder), *SHORT, *data, *(o.format(**files) for o in own)]
        if name == "zero2":
            shutil.copytree(folders["zero3"] / "vision", folder / "vision")
            next(folder.glob("vision/*/*")).unlink()
            (folder / LOCK).touch()
        if name != "plain":
            overrides.append("train.export=false")
        launch(ranks, "train", "configs/train/demo_npo.yaml", *overrides)
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def plans(finished):
    recipes = {name: configs.load(folder / "config.yaml", [], TrainRecipe) for name, folder in finished.items()}
    return {name: plan.plan(recipe, RUNS[name][0]) for name, recipe in recipes.items()}


@pytest.mark.parametrize("name", ["zero3", "zero2"])
def test_losses_and_gradients_with_cached_features_are_the_plain_runs(finished, name):
    losses, norms = (
        [torch.tensor([m[key] for m in metrics(finished[run])]) for run in (name, "plain")]
        for key in ("loss", "grad_norm")
    )
    torch.testing.assert_close(*losses, atol=5e-6, rtol=5e-6)
    torch.testing.assert_close(*norms, atol=0, rtol=1e-4)


def test_features_are_bitwise_the_same_after_a_kill_and_under_another_stage(finished):
    parts = [{f.name: f.read_bytes() for f in finished[name].glob("vision/*/part-*")} for name in ("zero3", "zero2")]
    assert len(parts[0]) == 2
    assert parts[0] == parts[1]


@pytest.mark.parametrize("name", RUNS)
def test_parameters_and_each_ranks_optimizer_state_are_what_the_shards_hold(finished, plans, name):
    ranks, stage, _ = RUNS[name]
    checkpoint = finished[name] / "checkpoints/step-000006"
    with Shards(checkpoint) as shards:
        sizes = [torch.Size(shape).numel() for shape in shards.shapes.values()]
    assert plans[name].parameters["trained"][0] == sum(sizes)
    held = [sum(t.nbytes for t in load_file(file).values()) for file in sorted(checkpoint.glob("rank-*"))]
    # The order of parameters in a shard is not that of the model: stage 2 cuts their sum only.
    assert held == [3 * memory.FP32 * elements for elements in memory.state_elements([sizes], stage, ranks)]
    assert plans[name].memory["optimizer"][0].device == max(held)
    assert plans[name].disk["a checkpoint"][0] == sum(held)
    kept = len(list((finished[name] / "checkpoints").glob("step-*")))
    assert plans[name].disk["checkpoints kept"][0] == kept * sum(held)


def test_caches_and_export_take_what_was_planned(finished, plans):
    export = load_file(finished["plain"] / "export/model.safetensors")
    assert plans["plain"].disk["export"][0] == sum(t.nbytes for t in export.values())
    assert plans["plain"].parameters["all"][0] == sum(t.numel() for t in export.values())
    for name in ("plain", "zero2"):
        (file,) = finished[name].glob("reference/*/*")
        assert plans[name].disk["reference cache"][0] == sum(t.nbytes for t in load_file(file).values())
    for name in ("zero3", "zero2"):
        files = list(finished[name].glob("vision/*/*"))
        planned = plans[name].disk["vision features"][0]
        assert planned == sum(t.nbytes for file in files for t in load_file(file).values())
        assert planned < sum(file.stat().st_size for file in files) < planned + 400 * vision_cache.PART * len(files)
    assert "reference cache" not in plans["zero3"].disk
    assert plans["zero3"].memory["reference"][0] == plans["zero3"].memory["weights"][0]


def test_tokens_of_an_epoch_are_what_the_steps_see(finished, plans):
    """Six steps of 20 are three epochs of 40 samples and two of 60."""
    tokens = {name: plans["plain"].data[f"{name}: tokens an epoch"][0] for name in ("forget", "retain")}
    assert sum(m["tokens"] for m in metrics(finished["plain"])) == 3 * tokens["forget"] + 2 * tokens["retain"]
    assert plans["plain"].data["steps"] == (6, "3.00 epochs of forget")


def test_the_command_prints_the_table(finished, capsys):
    assert main(["plan", str(finished["zero3"] / "config.yaml"), "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    trains, title, *rest = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert "trains: decoder" in trains
    assert "vision 0 of" in trains
    assert title == "NPO, full, ZeRO-3, on 2 × h100 (1 node)"
    assert rest[0].startswith("Everything here is computed")
    assert rest[1].startswith("CAUTION: train.dtype=fp32")
    assert rest[rest.index("verdict") :] == [
        "verdict",
        "batch",
        "data",
        "parameters",
        "memory of one rank",
        "one step",
        "exchanged in a step, by each rank",
        "the whole run",
        "disk",
        "computed with",
    ]
    assert main(["plan", "configs/train/demo_npo.yaml", "world.dir=runs/nowhere"]) == 2
