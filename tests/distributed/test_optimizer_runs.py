"""Every optimizer on real DeepSpeed processes: its state comes back bitwise, and on other ranks and ZeRO stages.

Also an optimizer from outside the package, written and used as docs/optimizers.md says.
"""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import forkserver
import pytest
import torch
from conftest import launch, losses, metrics
from safetensors.torch import load_file

from mirage_dist.config import REPOSITORY
from mirage_dist.model.shards import PARAM, Shards, read_manifest
from mirage_dist.ranks import free_port
from mirage_dist.train.measures.records import CLOCKED
from mirage_dist.train.planning.costs import memory

GROUPS = "train.groups=[{match: connector, lr: 0.004, weight_decay: 0.1}, {match: '*norm*', lr: 0.0005}]"
EIGHT_BIT = importlib.util.find_spec("bitsandbytes") is not None
CASES = {
    "adamw": ("train.optimizer.name=adamw", GROUPS),
    "adafactor": ("train.optimizer.name=adafactor", "train.weight_decay=0.01"),
    "muon": ("train.optimizer.name=muon", GROUPS),
    **({"adamw8bit": ("train.optimizer.name=adamw8bit", GROUPS)} if EIGHT_BIT else {}),
}
STATES = {
    "adamw": {"exp_avg", "exp_avg_sq"},
    "adafactor": {"row_var", "col_var", "variance"},
    "muon": {"momentum_buffer", "exp_avg", "exp_avg_sq"},
    "adamw8bit": {"state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"},
}
STEPS = 4
# All engines of one world size in one process a rank.
RANK = """
import sys
from pathlib import Path
import torch
from mirage_dist import config, ranks, schema
from mirage_dist.liveness import Owner
from mirage_dist.model import load
from mirage_dist.train import context, engine, feed, lease, loop
from mirage_dist.train.checkpoints import commit
from mirage_dist.train.planning import check
from mirage_dist.train.planning.costs import facts
import json
root, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
group = ranks.start()
identity = {"config_hash": "c", "base_hash": "b"}
for job in jobs:
    folder = root / job["out"]
    recipe = config.load("configs/train/demo_sft.yaml", [*job["overrides"], f"run.dir={folder}"], schema.TrainRecipe)
    checked = check.check_recipe(recipe, group.size)
    streams = check.check_inputs(checked)
    built = engine.build(recipe, checked.deepspeed, group)
    if "bitsandbytes" not in sys.modules:  # which loads the compiler itself
        assert "torch._inductor.select_algorithm" not in sys.modules, "a start loads the compiler, which takes 2 s"
    source = feed.Feed(recipe, checked.needs, streams, load.processor(recipe.model))
    held = lease.Lease(folder, Owner("test"))
    run = context.Run(recipe, group, checked.objective, source, built, checked.deepspeed, {}, held)
    checked.objective.start(built.module.hidden_size, 0)
    steps, first = loop.Loop(run, None), 0
    if job["resume"]:
        first = commit.load(built, root / job["resume"], identity)[0]["step"]
    work = folder / "work"
    if group.main:
        work.mkdir(parents=True)
        trained = facts.Trained.of(load.weightless(recipe.model), recipe)
        (folder / "trained.json").write_text(json.dumps([trained.groups, trained.states, trained.elementwise]))
    ranks.barrier(group, "work")
    saver = commit.Saver(folder / "checkpoints", work, recipe.train, group)
    lines = []
    for number in range(first, 4):
        lines.append(steps.step(number, source.window(number, group), tuple, saver.before_update)[0])
        if number in (1, 3):
            saver.save(built, {"step": number + 1, **identity}, {"none": torch.zeros(1)})
    saver.close()
    if group.main:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
ranks.exit_well()
"""


def run_ranks(root: Path, ranks: int, jobs: list[dict]) -> None:
    (root / "rank.py").write_text(RANK)
    (root / f"jobs{ranks}.json").write_text(json.dumps(jobs))
    command = [forkserver.python(), str(root / "rank.py"), str(root), str(root / f"jobs{ranks}.json")]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**shared, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        started = []
        for rank in range(ranks):
            patch.setenv("RANK", str(rank))
            patch.setenv("LOCAL_RANK", str(rank))
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY))
        outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(outputs)


@pytest.fixture(scope="module")
def finished(toy) -> Path:
    """case-stage-ranks of 4 steps each; `-again` from step 2 of itself, `-from-2` from step 2 of the other stage's."""
    root = toy.root / "optimizers"
    root.mkdir()
    stages = {}
    for stage in (2, 3):
        stages[stage] = root / f"zero{stage}.json"
        zero = {"stage": stage, "stage3_param_persistence_threshold": 500}
        stages[stage].write_text(json.dumps({"zero_optimization": zero}))
    jobs: dict[int, list[dict]] = {1: [], 2: []}
    for name, own in CASES.items():

        def job(ranks: int, stage: int, out: str, resume: str = "", name: str = name, own: tuple = own) -> None:
            batch = ("train.global_batch=8", f"train.micro_batch={8 // ranks}", "train.keep_last=null")
            overrides = [*toy.overrides("sft", root), *batch, f"deepspeed={stages[stage]}", "train.max_steps=4", *own]
            step = resume and f"{name}-{resume}/checkpoints/step-000002"
            jobs[ranks].append({"overrides": overrides, "out": f"{name}-{out}", "resume": step})

        job(2, 3, "3-2")
        job(2, 3, "3-2-again", "3-2")
        job(2, 2, "2-2-from", "3-2")
        job(2, 2, "2-2")
        job(1, 3, "3-1-from", "2-2")
    for ranks in (2, 1):
        run_ranks(root, ranks, jobs[ranks])
    return root


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(finished, case):
    whole, again = (finished / f"{case}-3-2{suffix}" for suffix in ("", "-again"))
    for rank in range(2):
        shard = f"checkpoints/step-{STEPS:06d}/rank-{rank:05d}-of-00002.safetensors"
        assert (whole / shard).read_bytes() == (again / shard).read_bytes()
    mine, other = ([{k: v for k, v in m.items() if k not in CLOCKED} for m in metrics(f)] for f in (again, whole))
    assert mine == other[2:]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["2-2-from", "3-1-from", "2-2"])
def test_state_loads_on_other_ranks_and_stages(finished, case, way):
    first = 2 if way.endswith("from") else 0
    torch.testing.assert_close(
        losses(finished / f"{case}-{way}"), losses(finished / f"{case}-3-2")[first:], atol=2e-4, rtol=1e-3
    )
    folders = [finished / f"{case}-{name}/checkpoints/step-{STEPS:06d}" for name in ("3-2", way)]
    with Shards(folders[0]) as one, Shards(folders[1]) as other:
        assert one.shapes == other.shapes
        assert {key for name in one.shapes for key in one.states(name)} == STATES[case]
        for name in one.shapes:
            assert one.states(name) == other.states(name)
            assert one.scalars[name] == other.scalars[name]
            for key in (PARAM, *one.states(name)):
                if one.whole(name, key).is_floating_point():
                    torch.testing.assert_close(other.whole(name, key), one.whole(name, key), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_plan_counts_the_state_that_each_ranks_shard_holds(finished, case, stage):
    folder = finished / f"{case}-{stage}-2"
    groups, states, elementwise = json.loads((folder / "trained.json").read_text())
    shards = sorted((folder / f"checkpoints/step-{STEPS:06d}").glob("rank-*"))
    held = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
    planned = memory.optimizer_bytes(groups, states, elementwise, stage, 2)
    assert sum(planned) == sum(held)
    # Stage 2 cuts a buffer whose order of parameters is its own; what is whole has the owner that the plan names.
    assert planned == held


def test_groups_have_their_rates_in_the_metrics_and_are_in_the_manifest(finished):
    lines = metrics(finished / "adamw-3-2")
    assert all(list(line["group_lr"]) == ["connector", "*norm*"] for line in lines)
    base = lines[0]["lr"]
    for line in lines:
        ratio = [rate / line["lr"] for rate in line["group_lr"].values()]
        assert ratio[0] == pytest.approx(8 * ratio[1])
    assert base > 0
    assert "group_lr" not in metrics(finished / "adafactor-3-2")[0]
    written = read_manifest(finished / f"adamw-3-2/checkpoints/step-{STEPS:06d}")["optimizer"]
    assert written["name"] == "adamw"
    assert [group["match"] for group in written["groups"]] == [None, ["connector"], ["*norm*"]]
    assert [group["lr"] for group in written["groups"]][1:] == [0.004, 0.0005]
    assert written["groups"][1]["weight_decay"] == 0.1
    with Shards(finished / f"adamw-3-2/checkpoints/step-{STEPS:06d}") as shards:
        sizes = sum(torch.Size(shape).numel() for shape in shards.shapes.values())
    assert sum(group["parameters"] for group in written["groups"]) == sizes


def documented() -> str:
    page = (REPOSITORY / "docs/optimizers.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.S)
    return code


def test_an_optimizer_from_outside_the_package_trains_as_the_docs_say(toy, tmp_path, monkeypatch):
    code = documented()
    assert len(code.splitlines()) <= 30
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab/optim.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    options = ("train.optimizer.name=my_lab.optim:Sign", "train.optimizer.momentum=0.95", "train.lr=0.001")
    short = ("train.max_steps=4", "train.global_batch=8", "train.micro_batch=4", "train.save_every=2")
    folder = tmp_path / "run"
    command = ("train", "configs/train/demo_sft.yaml", *toy.overrides("sft", folder), *short, *options)
    launch(2, *command)
    whole = {file.name: file.read_bytes() for file in (folder / "checkpoints/step-000004").glob("rank-*")}
    assert set(whole) == {f"rank-0000{rank}-of-00002.safetensors" for rank in range(2)}
    with Shards(folder / "checkpoints/step-000004") as shards:
        assert all(set(shards.states(name)) == {"average"} for name in shards.shapes)
    changed = load_file(folder / "export/model.safetensors")
    base = load_file(toy.root / "model/model.safetensors")
    moved = [(changed[name] - base[name]).abs().max().item() for name in base]
    assert 0 < max(moved) < 4.1 * 0.001  # every step moves an element by its rate, at most
    modes = {file.name: file.stat().st_mode & 0o777 for file in (folder / "export").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask()}, modes
    shutil.rmtree(folder / "checkpoints/step-000004")
    launch(2, *command)
    assert {file.name: file.read_bytes() for file in (folder / "checkpoints/step-000004").glob("rank-*")} == whole


def umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask
