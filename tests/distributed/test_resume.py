"""A stopped run goes on as if it had not stopped: on other world sizes and ZeRO stages, and after a signal."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import forkserver
import pytest
import torch
from conftest import launch, losses, metrics
from safetensors.torch import load_file, save_file

from mirage_dist import config as configs
from mirage_dist import runs, state
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.model import export
from mirage_dist.model.shards import PARAM, Shards, read_manifest
from mirage_dist.ranks import free_port
from mirage_dist.schema import TrainRecipe

STEPS = 8
SHORT = (f"train.max_steps={STEPS}", "train.global_batch=8", "train.save_every=4", "train.export=false")
SHARDED = {"zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0}}
LORA = "model.lora={rank: 4, alpha: 8, dropout: 0.0, targets: ['*language_model*_proj']}"
ZERO2 = "deepspeed=configs/deepspeed/zero2.json"
# Options of published recipes, on retained samples of which every other one has no picture.
PUBLISHED = (
    "data.streams.retain=[{format: samples, path: {mixed}}]",
    "data.group_by_modality=true",
    "data.balance=openers",
    "train.epoch_stream=retain",
    "train.warmup_from_zero=true",
    "train.schedule_steps=12",
)
# How a run was saved -> (ranks, overrides); "half" ones are what later starts go on from.
SAVED = {
    "two": (2, ("train.micro_batch=4", "data.workers=2")),
    "one_zero2": (1, ("train.micro_batch=auto", ZERO2)),
    "bf16": (2, ("train.micro_batch=4", "train.dtype=bf16")),
    "lora": (2, ("train.micro_batch=4", LORA, "reference=adapters_off")),
    "published": (2, ("train.micro_batch=2", *PUBLISHED)),
}
# (saved as, gone on with: ranks, overrides)
CONTINUED = {
    "2 to 1": ("two", 1, ("train.micro_batch=8",)),
    "2 to 4": ("two", 4, ("train.micro_batch=auto",)),
    "ZeRO-3 to ZeRO-2": ("two", 2, ("train.micro_batch=4", ZERO2)),
    "1 to 2, ZeRO-2 to ZeRO-3": ("one_zero2", 2, ("train.micro_batch=4", "{sharded}")),
    "bf16, 2 to 1 in ZeRO-2": ("bf16", 1, ("train.micro_batch=8", "train.dtype=bf16", ZERO2)),
    "published options, 2 to 1": ("published", 1, ("train.micro_batch=2", *PUBLISHED)),
    "LoRA, 2 to 1": ("lora", 1, ("train.micro_batch=8", LORA, "reference=adapters_off")),
}


def command(toy, folder, own, recipe="npo"):
    sharded = f"deepspeed={toy.root}/resume.json"
    given = [o.replace("{sharded}", sharded).replace("{mixed}", f"{toy.root}/resume-mixed.jsonl") for o in own]
    if not any(o.startswith("deepspeed=") for o in given):
        given.append(sharded)
    return ("train", f"configs/train/demo_{recipe}.yaml", *toy.overrides(recipe, folder), *SHORT, *given)


@pytest.fixture(scope="module")
def saved(toy):
    (toy.root / "resume.json").write_text(json.dumps(SHARDED))
    retain = sources.read(formats.source("samples", str(toy.root / "retain.jsonl"))).samples
    mixed = [replace(sample, image=sample.image if i % 2 else None) for i, sample in enumerate(retain)]
    write_samples(toy.root / "resume-mixed.jsonl", mixed)
    folders = {}
    for name, (ranks, own) in SAVED.items():
        folders[name] = toy.root / "resume" / name
        launch(ranks, *command(toy, folders[name], own))
    return folders


def half(run: Path, folder: Path) -> Path:
    """A copy of the run as it was after step 4."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / f"checkpoints/step-{STEPS:06d}")
    return folder


@pytest.mark.parametrize("case", CONTINUED)
def test_a_run_goes_on_with_another_number_of_ranks_or_another_stage(saved, toy, tmp_path, case):
    name, ranks, own = CONTINUED[case]
    folder = half(saved[name], tmp_path / "run")
    done = launch(ranks, *command(toy, folder, own))
    assert "resumed from" in done.stdout
    if "train.micro_batch=auto" in own:
        rows = 8 // ranks
        assert f"train.micro_batch=auto: {rows} rows of each stream at once on {ranks} ranks" in done.stdout
        assert [m["micro_batch"] for m in metrics(folder)] == [4] * 4 + [rows] * 4
    assert "computing" not in done.stdout  # the reference cache serves every world size
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if name != "bf16" else {"atol": 0, "rtol": 2e-2}
    torch.testing.assert_close(losses(folder, "grad_norm"), losses(saved[name], "grad_norm"), **tolerance)
    # No element of a parameter or moment is lost or put elsewhere; both runs hold every one of them.
    with (
        Shards(saved[name] / f"checkpoints/step-{STEPS:06d}") as a,
        Shards(folder / f"checkpoints/step-{STEPS:06d}") as b,
    ):
        assert a.shapes == b.shapes
        for parameter, shape in a.shapes.items():
            count = torch.Size(shape).numel()
            assert set(a.states(parameter)) == {"exp_avg", "exp_avg_sq"}
            for key in (PARAM, *a.states(parameter)):
                one, other = (s.read(key, parameter, 0, count) for s in (a, b))
                distance = (one - other).norm() / one.norm().clamp(min=1e-12)
                assert distance < (1e-3 if name != "bf16" else 0.2), (key, parameter)


def test_what_auto_comes_to_is_logged_in_every_step_and_in_the_checkpoints(saved, toy, tmp_path):
    folder = saved["one_zero2"]
    assert {m["micro_batch"] for m in metrics(folder)} == {8}
    assert {m["micro_batch"] for m in metrics(saved["two"])} == {4}
    written = read_manifest(folder / f"checkpoints/step-{STEPS:06d}")
    assert (written["micro_batch"], written["accumulation"]) == (8, 1)
    # The recipe keeps the word: the next start may have other hardware.
    assert configs.load(folder / "config.yaml", [], TrainRecipe).train.micro_batch == "auto"


def test_a_lora_checkpoint_is_refused_on_another_base(saved, toy, tmp_path):
    """The weights of the base are changed under a run that was saved on them."""
    folder = half(saved["lora"], tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(toy.root / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file({n: t + 1e-3 for n, t in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    _, ranks, own = ("lora", *SAVED["lora"])
    start = [*command(toy, folder, own), f"model.path={other}"]
    done = launch(ranks, *start, check=False)
    assert done.returncode == 2
    assert "model.path" in done.stderr  # another path is another recipe
    recipe = folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace(f"{toy.root}/model", str(other)))
    done = launch(ranks, *start, check=False)
    assert done.returncode == 2
    assert "config.yaml: was changed after this run began" in done.stderr
    # As of a run that began at this path, with the weights that lay there then.
    manifest = runs.manifest(folder)
    moved = configs.load(recipe, [], TrainRecipe)
    manifest |= {"config_hash": configs.config_hash(moved, manifest["may_change"])}
    (folder / "manifest.json").write_text(state.sealed("run", manifest, indent=1))
    done = launch(ranks, *start, check=False)
    assert done.returncode == 2
    assert "weights" in done.stderr
    assert "changed since this run began" in done.stderr


@pytest.mark.parametrize(("key", "words"), [("config_hash", "another recipe"), ("base_hash", "another base weights")])
def test_a_checkpoint_that_came_from_another_run_is_refused(saved, toy, tmp_path, key, words):
    folder = half(saved["two"], tmp_path / "run")
    checkpoint = folder / "checkpoints/step-000004"
    (checkpoint / "manifest.json").write_text(state.sealed("checkpoint", {**read_manifest(checkpoint), key: "0" * 64}))
    done = launch(2, *command(toy, folder, SAVED["two"][1]), check=False)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(("number", "receiver"), [(signal.SIGUSR1, "launcher"), (signal.SIGTERM, "rank")])
def test_a_signal_ends_in_a_commit_and_the_next_start_goes_on_bitwise(saved, toy, tmp_path, number, receiver):
    """To the launcher, or to one rank only: all agree, commit the step they are in, and exit with 75."""
    folder = tmp_path / "run"
    # Regular saves would hide a commit on request, so this run makes none.
    arguments = [*command(toy, folder, SAVED["two"][1]), "train.save_every=null"]
    process = launch(2, *arguments, start=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {p: dict(v.split("=", 1) for v in environ(p) if "=" in v).get("RANK") for p in map(int, children)}
    os.kill(process.pid if receiver == "launcher" else next(p for p, r in ranks.items() if r == "1"), number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    done = int((folder / "checkpoints/latest").read_text().removeprefix("step-"))
    assert f"step {done} of {STEPS} is committed" in output
    assert [m["step"] for m in metrics(folder)] == list(range(1, done + 1))
    assert not list(folder.glob("work-*"))
    launch(2, *arguments)
    whole, again = (f / f"checkpoints/step-{STEPS:06d}" for f in (saved["two"], folder))
    for file in whole.glob("*.safetensors"):
        assert (again / file.name).read_bytes() == file.read_bytes()
    assert [m["loss"] for m in metrics(folder)] == [m["loss"] for m in metrics(saved["two"])]


def environ(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_retention_keeps_what_the_recipe_names(saved, toy, tmp_path):
    folder = tmp_path / "run"
    kept = ["train.save_every=1", "train.keep_last=2", "train.keep_every=3", "train.keep_best=loss"]
    launch(2, *command(toy, folder, SAVED["two"][1]), *kept)
    values = {m["step"]: m["loss"] for m in metrics(folder)}
    best = min(values, key=lambda step: values[step])
    there = {int(f.name.removeprefix("step-")) for f in (folder / "checkpoints").glob("step-*")}
    assert there == {3, 6, STEPS - 1, STEPS, best}
    done = launch(2, *command(toy, tmp_path / "other", SAVED["two"][1]), "train.keep_best=los", check=False)
    assert done.returncode == 2
    assert "did you mean 'loss'?" in done.stderr


SLOW_COPY = """
import sys, time
from mirage_dist import config, ranks, schema
from mirage_dist.train import run
from mirage_dist.train.checkpoints import fragments
from mirage_dist.train.planning.check import check_recipe
copy = fragments.snapshot
def slow(*arguments):
    time.sleep(0.5)
    return copy(*arguments)
fragments.snapshot = slow
run.train(check_recipe(config.load(sys.argv[1], sys.argv[2:], schema.TrainRecipe), 1))
ranks.exit_well()
"""


def test_a_step_does_not_change_what_is_still_to_be_copied(saved, toy, tmp_path):
    """Many steps would be over before a copy that takes so long begins, if the update did not wait for it."""
    (tmp_path / "slow.py").write_text(SLOW_COPY)
    _, *arguments = command(toy, tmp_path / "run", SAVED["one_zero2"][1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([forkserver.python(), str(tmp_path / "slow.py"), *arguments], env=environment, check=True)
    for step in ("step-000004", f"step-{STEPS:06d}"):
        name = f"checkpoints/{step}/rank-00000-of-00001.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (saved["one_zero2"] / name).read_bytes()


COUNT_LAYERS = """
import sys
from pathlib import Path
from mirage_dist import config, ranks, schema
from mirage_dist.liveness import Owner
from mirage_dist.train import context, engine, feed, lease, loop
from mirage_dist.train.planning import check
from mirage_dist.model import load
recipe = config.load(sys.argv[1], sys.argv[2:], schema.TrainRecipe)
checked = check.check_recipe(recipe, 1)
objective, streams = checked.objective, check.check_inputs(checked)
here = ranks.start()
built = engine.build(recipe, checked.deepspeed, here)
objective.start(built.module.hidden_size, 0)
calls = []
for layer in built.module.backbone.language_model.layers:
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
source = feed.Feed(recipe, objective.needs, streams, load.processor(recipe.model))
held = lease.Lease(Path(recipe.run.dir), Owner("test"))
run = context.Run(recipe, here, objective, source, built, checked.deepspeed, {}, held)
loop.Loop(run, None).step(0, source.window(0, here))
print("layer forwards", len(calls))
ranks.exit_well()
"""


def test_layers_are_computed_again_in_the_backward_pass_with_gradient_checkpointing(toy, tmp_path):
    """Gradient checkpointing works in training mode only, which a loaded model is not in; and no reference cache or
    other forward has to put it there first.
    """
    (tmp_path / "count.py").write_text(COUNT_LAYERS)
    overrides = [*toy.overrides("sft", tmp_path / "run"), "train.global_batch=4", "train.micro_batch=4"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    counts = {}
    for checkpointing in ("false", "true"):
        command = [forkserver.python(), str(tmp_path / "count.py"), "configs/train/demo_sft.yaml", *overrides]
        command.append(f"model.gradient_checkpointing={checkpointing}")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        counts[checkpointing] = int(done.stdout.rpartition("layer forwards ")[2])
    assert counts == {"false": 4, "true": 8}


EXPORT = """
import errno, sys
from pathlib import Path
from mirage_dist import ranks
from mirage_dist.model import export
from mirage_dist.model.exports import merged
group = ranks.start()
merged.LARGEST = merged.SMALLEST = 100_000
run, out = map(Path, sys.argv[1:])
export.export(run, out, group=group)
write = merged.write
def refused(*given):
    write(*given)
    if group.rank == 1:
        raise OSError(errno.ENOSPC, "No space left on device", "model-00002")
merged.write = refused
try:
    export.export(run, out.with_name("refused"), group=group)
except export.RunError as error:
    print("REFUSED", error)
ranks.exit_well()
"""


@pytest.mark.parametrize("name", ["two", "lora"])
def test_two_ranks_export_what_one_process_exports_and_nothing_where_one_of_them_fails(saved, tmp_path, name):
    (tmp_path / "export.py").write_text(EXPORT)
    out = tmp_path / "made" / "two"
    out.parent.mkdir()
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    line = [forkserver.python(), str(tmp_path / "export.py"), str(saved[name]), str(out)]
    own = ({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(2))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(line, env=environment, **pipes) for environment in own]
    outputs = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    for output in outputs:
        words = "refused: nothing was exported, since a part could not be written \\(rank 1: .*No space left on device"
        assert re.search(f"REFUSED .*{words}", output), output
    assert os.listdir(out.parent) == ["two"]
    export.export(saved[name], tmp_path / "one")
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) >= 2
    two = {n: t for file in files for n, t in load_file(file).items()}
    one = load_file(tmp_path / "one/model.safetensors")
    assert one.keys() == two.keys()
    for tensor, value in one.items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), two[tensor].reshape(-1).view(torch.uint8)), tensor
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    of_weights = {"SHA256SUMS", "model.safetensors", "model.safetensors.index.json", *(file.name for file in files)}
    others = [
        {f.name: f.read_bytes() for f in made.iterdir() if f.name not in of_weights} for made in (tmp_path / "one", out)
    ]
    assert others[0] == others[1]
