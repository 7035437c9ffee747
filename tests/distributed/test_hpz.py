"""hpZ (ZeRO++'s secondary partition): four ranks on two nodes of two train as ZeRO-3 does, to the last bit."""

import json
import os
import subprocess
from pathlib import Path

import forkserver
import pytest
from conftest import metrics

from mirage_dist.config import REPOSITORY
from mirage_dist.ranks import COLLECTIVE_GRACE, free_port
from mirage_dist.train.measures.records import CLOCKED

LORA = (
    "model.lora={rank: 4, alpha: 8, dropout: 0.0, targets: ['*language_model*_proj']}",
    "reference=adapters_off",
    "train.dtype=bf16",
)
CASES = {
    "full": ("reference=engine",),  # a second model in the process
    "lora": LORA,
}
# All engines in one process a rank. Before a checkpoint is loaded, a step and a forward leave secondary partitions of
# other weights.
RANK = """
import json, sys
from pathlib import Path
import torch
from deepspeed.utils import groups
from mirage_dist import config, ranks, schema
from mirage_dist.liveness import Owner
from mirage_dist.model import load
from mirage_dist.train import context, engine, feed, lease, loop
from mirage_dist.train.checkpoints import commit
from mirage_dist.train.planning import check, sharding
from mirage_dist.train.run import reference_of
root, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
group = ranks.start()
identity = {"config_hash": "c", "base_hash": "b"}
for job in jobs:
    folder = root / job["out"]
    recipe = config.load("configs/train/demo_npo.yaml", [*job["overrides"], f"run.dir={folder}"], schema.TrainRecipe)
    checked = check.check_recipe(recipe, group.size)
    node = sharding.node_size(checked.deepspeed["zero_optimization"], group)
    deepspeed = engine.deepspeed_config(recipe, group.size, 2, node)
    torch.manual_seed(recipe.seed)
    built = engine.build(recipe, deepspeed, group)
    source = feed.Feed(recipe, checked.needs, check.check_inputs(checked), load.processor(recipe.model))
    run = context.Run(recipe, group, checked.objective, source, built, deepspeed, {}, lease.Lease(folder, Owner("x")))
    checked.objective.start(built.module.hidden_size, 0)
    steps, first = loop.Loop(run, reference_of(run)), 0
    if job["resume"]:
        steps.step(5, source.window(5, group))
        with torch.no_grad():
            steps.views(source.window(5, group)[0])
        first = commit.load(built, root / job["resume"], identity)[0]["step"]
    work = folder / "work"
    if group.main:
        work.mkdir(parents=True)
    ranks.barrier(group, "work")
    saver = commit.Saver(folder / "checkpoints", work, recipe.train, group)
    lines = []
    for number in range(first, 4):
        lines.append(steps.step(number, source.window(number, group), tuple, saver.before_update)[0])
        if number in (1, 3):
            saver.save(built, {"step": number + 1, **identity}, {"none": torch.zeros(1)})
    saver.close()
    with torch.no_grad():
        steps.views(source.window(0, group)[0])
    if group.main:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
        held = ((p, p.ds_secondary_tensor) for p in built.module.parameters())
        sizes = [[p.ds_numel, len(second)] for p, second in held if second is not None]
        (folder / "secondary.json").write_text(json.dumps(sizes))
        own = (groups._get_data_parallel_group(), groups._get_zero_param_intra_parallel_group())
        waits = [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in own if g is not None]
        (folder / "waits.json").write_text(json.dumps(waits))
ranks.exit_well()
"""


@pytest.fixture(scope="module")
def finished(toy) -> Path:
    """CASE-plain and CASE-hpz of four steps; full-again goes on from step 2 of full-hpz."""
    root = toy.root / "hpz"
    root.mkdir()
    zero = {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 200}
    for name, own in {"plain": zero, "hpz": {**zero, "zero_hpz_partition_size": "auto"}}.items():
        (root / f"{name}.json").write_text(json.dumps({"zero_optimization": own}))
    batch = ("train.global_batch=8", "train.micro_batch=1", "train.max_steps=8", "train.keep_last=null")

    def job(case: str, way: str, file: str, resume: str = "") -> dict:
        overrides = [*toy.overrides("npo", root), *batch, f"deepspeed={root}/{file}.json", *CASES[case]]
        step = resume and f"{case}-{resume}/checkpoints/step-000002"
        return {"overrides": overrides, "out": f"{case}-{way}", "resume": step}

    jobs = [job(case, way, way) for case in CASES for way in ("plain", "hpz")]
    jobs.append(job("full", "again", "hpz", "hpz"))
    (root / "rank.py").write_text(RANK)
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [forkserver.python(), str(root / "rank.py"), str(root), str(root / "jobs.json")]
    shared = {**os.environ, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r % 2)}, cwd=REPOSITORY, **pipes)
        for r in range(4)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 4, "\n".join(outputs)
    return root


def shards(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.glob("checkpoints/*/rank-*"))}


def computed(folder: Path) -> list[dict]:
    """The records of a run without what the clock decides."""
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in metrics(folder)]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_checkpoints_are_those_of_zero3_to_the_last_bit(finished, case):
    assert computed(finished / f"{case}-hpz") == computed(finished / f"{case}-plain")
    assert shards(finished / f"{case}-hpz") == shards(finished / f"{case}-plain")
    moved = [metrics(finished / f"{case}-hpz")[step]["loss"] for step in (0, 3)]
    assert moved[0] != moved[1]


@pytest.mark.parametrize("case", CASES)
def test_a_node_holds_a_second_copy_of_weights(finished, case):
    """Half of each on each of its two ranks, padded to the partitions of all four; what is still whole has none yet."""
    sizes = json.loads((finished / f"{case}-hpz/secondary.json").read_text())
    assert len(sizes) > 10
    assert all(own == 2 * -(-whole // 4) for whole, own in sizes)
    assert json.loads((finished / f"{case}-plain/secondary.json").read_text()) == []


def test_deepspeeds_own_groups_wait_longer_than_the_watchdog(finished):
    """Otherwise a collective of theirs would end a run that hangs before the watchdog has named the rank."""
    assert json.loads((finished / "full-plain/waits.json").read_text()) == [1800 + COLLECTIVE_GRACE]
    assert json.loads((finished / "full-hpz/waits.json").read_text()) == [1800 + COLLECTIVE_GRACE] * 2


def test_a_loaded_checkpoint_replaces_the_second_copy(finished):
    assert computed(finished / "full-again") == computed(finished / "full-hpz")[2:]
    last = "checkpoints/step-000004"
    for file in (finished / "full-hpz" / last).glob("rank-*"):
        assert (finished / "full-again" / last / file.name).read_bytes() == file.read_bytes()
