"""What a run says of itself: the slow rank, the bad sample, the held-out loss, a profile; at no cost in collectives."""

import gzip
import json
import os
import re
import subprocess
from dataclasses import replace

import forkserver
import pytest
import torch
from conftest import losses, metrics
from transformers import AutoModelForImageTextToText

from mirage_dist import config as configs
from mirage_dist.data import formats
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sources import check_pictures, read
from mirage_dist.model import load
from mirage_dist.monitoring import wandb_files
from mirage_dist.ranks import free_port
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.measures.records import CLOCKED
from mirage_dist.train.measures.validation import NEEDS, STREAM, overlap
from mirage_dist.train.planning.streams import read_streams

STEPS, EVERY, SLOW = 24, 8, 12
# `mirage train`, whose rank 1 sleeps in each objective of its first SLOW micro-batches, and which counts in each step
# the collectives of the loop, its reads of the device, and what waited before the first of them.
SCRIPT = """\
import json, os, signal, sys, time, traceback
from pathlib import Path
import torch
from contextlib import nullcontext
from torch.utils._python_dispatch import TorchDispatchMode
import mirage_dist
from mirage_dist import calls, cli
from mirage_dist.objectives.likelihood import SFT
from mirage_dist.train.loop import Loop
from mirage_dist.train.measures import validation

objective, step, cpu, measure = SFT.__call__, Loop.step, torch.Tensor.cpu, validation.HeldOut.measure
slow, stop, out = int(os.environ["SLOW"]), int(os.environ["STOP"]), Path(os.environ["COUNTS"])
made, reads, lines = [], [], []

def slowed(self, views):
    made.append(None)
    if os.environ["RANK"] == "1" and len(made) <= slow:
        time.sleep(0.1)
    return objective(self, views)

class Waits(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select") and not reads:
            files = [frame.filename for frame in traceback.extract_stack()]
            ours = [i for i, name in enumerate(files) if name.startswith(mirage_dist.__path__[0])]
            kernels = "kernels/" in files[ours[-1]]  # of the eager twins, which run on a CPU only
            if not kernels and not any("site-packages/t" in name or "deepspeed" in name for name in files[ours[-1]:]):
                lines.append(files[ours[-1]])
        return function(*args, **(kwargs or {}))

def read(self, *arguments):
    if sys._getframe(1).f_code.co_filename.startswith(mirage_dist.__path__[0]):
        reads.append(None)
    return cpu(self, *arguments)

def counted(self, number, *arguments):
    before = calls.last()[0]
    if number + 1 == stop:
        os.kill(os.getpid(), signal.SIGTERM)
    reads.clear()
    with Waits() if number < 3 else nullcontext():  # it slows every operation down
        result = step(self, number, *arguments)
    with out.open("a") as file:
        file.write(json.dumps([calls.last()[0] - before, len(reads), lines]) + "\\n")
    return result

def measured(self, engine, number):
    if number == -stop:
        os.kill(os.getpid(), signal.SIGTERM)
    return measure(self, engine, number)

SFT.__call__, Loop.step, torch.Tensor.cpu, validation.HeldOut.measure = slowed, counted, read, measured
validation.BATCHES_BETWEEN_STOPS = 2
sys.exit(cli.main(sys.argv[1:]))
"""


def run(root, name, ranks, *own, slow=0, stop=0):
    """`mirage train` of the recipe below as so many ranks: their exit statuses and the output of rank 0."""
    (root / "script.py").write_text(SCRIPT)
    overrides = [*json.loads((root / "overrides.json").read_text()), f"run.dir={root / name}", *own]
    command = [forkserver.python(), root / "script.py", "train", "configs/train/demo_sft.yaml", *overrides]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SLOW": str(slow), "STOP": str(stop)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": r, "LOCAL_RANK": r, "COUNTS": str(root / f"{name}-{r}.jsonl")}, **pipes
        )
        for r in map(str, range(ranks))
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], "".join(outputs)


@pytest.fixture(scope="module")
def watched(toy):
    """one: 1 rank; two: 2 ranks with cached pictures, the second one slow, with a profile; stopped: `two` stopped
    within step EVERY, whose checkpoint is the best one, and again while it measures the held-out loss, with W&B; bare:
    `one` without held-out samples. All learn one answer, but for a sample that is not like the others.
    """
    root = toy.root / "watched"
    root.mkdir()
    taught = [
        replace(s, answer="red circle", safe=number % 3 > 0)
        for number, s in enumerate(read(formats.source("samples", f"{toy.root}/retain.jsonl")).samples)
    ]
    taught[7] = replace(taught[7], id="planted", answer="seven 9 blue X")
    write_samples(root / "taught.jsonl", taught)
    forget = read(formats.source("samples", f"{toy.root}/forget.jsonl")).samples
    write_samples(root / "held.jsonl", [*forget[:5], *(replace(s, id=f"again-{s.id}") for s in taught[:2])])
    sharded = {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0}
    (root / "sharded.json").write_text(json.dumps({"zero_optimization": sharded}))
    common = [o for o in toy.overrides("sft", root) if not o.startswith(("run.dir", "data.streams"))]
    common += [
        f"data.streams.train=[{{format: samples, path: {root}/taught.jsonl}}]",
        "train.lr=3e-3",
        "data.workers=1",
    ]
    common += [f"train.max_steps={STEPS}", "train.global_batch=4", "train.micro_batch=2", "train.schedule=constant"]
    common += ["train.warmup=0"]
    common += [f"deepspeed={root}/sharded.json", f"train.save_every={EVERY}", "train.keep_last=1"]
    (root / "overrides.json").write_text(json.dumps(common))
    held = [f"data.streams.validation=[{{format: samples, path: {root}/held.jsonl}}]", f"train.validate_every={EVERY}"]
    held.append("train.keep_best=validation.loss")
    results = {"one": run(root, "one", 1, *held)}
    profile = "monitor.profile={first: 20, steps: 2, ranks: [0, 1]}"
    both = [*held, "train.export=off", "train.micro_batch=1", "data.cache_vision=true"]
    results["two"] = run(root, "two", 2, *both, profile, slow=SLOW)
    results["bare"] = run(root, "bare", 1, "train.export=off", f"train.max_steps={SLOW}")
    results["stopped"] = run(root, "stopped", 2, *both, "monitor.wandb=offline", stop=EVERY)
    results["again"] = run(root, "stopped", 2, *both, "monitor.wandb=offline", stop=-EVERY)
    results["resumed"] = run(root, "stopped", 2, *both, "monitor.wandb=offline")
    for name, (statuses, output) in results.items():
        assert set(statuses) == {75 if name in ("stopped", "again") else 0}, output
    return root, {name: output for name, (_, output) in results.items()}


def test_the_slow_rank_is_named_and_what_the_others_wait(watched):
    records = metrics(watched[0] / "two")[: SLOW // 2]
    assert [m["slowest"]["rank"] for m in records].count(1) >= SLOW // 2 - 1
    assert all(m["slowest"]["host"] == os.uname().nodename for m in records)
    waits = sorted(m["seconds"]["waiting"] for m in records)
    assert waits[len(waits) // 2] > 0.08  # of two ranks, of which one is 0.2 s behind, the mean waits 0.1 s
    assert "for rank 1 on" in watched[1]["two"] or "waits" not in watched[1]["two"]
    for m in metrics(watched[0] / "two"):
        parts = m["seconds"]
        assert parts.keys() >= {"data", "forward", "backward", "update", "gather", "waiting"}
        assert sum(parts[name] for name in ("forward", "backward", "update")) <= 1.2 * m["step_seconds"]
        assert m["tokens_per_s_gpu"] == m["tokens_per_s"] / 2
        assert m["memory"].keys() == {"host_mib"}
        assert "mfu" not in m


@pytest.mark.parametrize(("name", "ranks"), [("one", 1), ("two", 2)])
def test_a_step_has_two_collectives_of_ours_and_one_read_of_the_device(watched, name, ranks):
    for rank in range(ranks):
        for line in (watched[0] / f"{name}-{rank}.jsonl").read_text().splitlines():
            assert json.loads(line) == [2, 1, []]


def test_losses_are_those_of_one_rank_and_bitwise_those_without_held_out_samples(watched):
    root, _ = watched
    torch.testing.assert_close(losses(root / "two"), losses(root / "one"), atol=2e-5, rtol=2e-4)
    assert torch.equal(losses(root / "bare", "grad_norm"), losses(root / "one", "grad_norm")[:SLOW])


def test_the_step_with_a_planted_sample_stands_out_and_the_sample_is_named_on_this_machine_only(watched):
    root, outputs = watched
    for name in ("one", "two"):
        spikes = {m["step"]: m["spike"] for m in metrics(root / name) if "spike" in m}
        assert spikes
        assert all("planted" in spike["samples"]["train"] for spike in spikes.values() if "loss" in spike["scores"])
        assert any("loss" in spike["scores"] for spike in spikes.values())
        assert all(len(spike["samples"]["train"]) == 4 for spike in spikes.values())
        step = min(spikes)
        assert re.search(rf"WARNING: sft: step {step}: .*stands out of the steps before it", outputs[name])
        lines = [line for line in outputs[name].splitlines() if "the tokenizer has no token for" not in line]
        assert not [line for line in lines if "planted" in line]


def oracle(folder, held) -> float:
    """Mean cross entropy of the answers by the plain model, one row at a time."""
    recipe = configs.load(folder / "config.yaml", [], TrainRecipe)
    model = AutoModelForImageTextToText.from_pretrained(folder / "export")
    recipe = replace(recipe, train=replace(recipe.train, micro_batch=1))
    feed = Feed(recipe, NEEDS, read_streams(recipe, NEEDS), load.processor(recipe.model))
    total, count = 0.0, 0
    for number in range(held):
        micro = feed.collate({STREAM: torch.tensor([number]).numpy()})
        with torch.no_grad():
            logits = model(**micro.batch.inputs).logits[0, :-1].double().log_softmax(-1)
        labels = micro.batch.labels_BS[0, 1:]
        kept = labels != -100
        total -= float(logits[kept].gather(1, labels[kept][:, None]).sum())
        count += int(kept.sum())
    return total / count


def test_the_held_out_loss_is_that_of_the_whole_model_on_any_number_of_ranks(watched):
    root, _ = watched
    values = {}
    for name in ("one", "two", "stopped"):
        values[name] = {m["step"]: m["validation"]["loss"] for m in metrics(root / name) if "validation" in m}
        assert list(values[name]) == list(range(EVERY, STEPS + 1, EVERY))
    assert values["one"][STEPS] == pytest.approx(oracle(root / "one", 7), rel=1e-5)
    assert values["two"] == pytest.approx(values["one"], rel=1e-3)
    assert len({m["validation"]["tokens"] for name in values for m in metrics(root / name) if "validation" in m}) == 1


def test_a_run_stopped_within_the_step_before_a_held_out_loss_has_the_records_of_one_that_was_not(watched):
    root, outputs = watched
    for name in ("stopped", "again"):
        assert f"step {EVERY} of {STEPS} is committed" in outputs[name]  # within the step in which the signal came
    own, whole = (
        [{k: v for k, v in m.items() if k not in CLOCKED} for m in metrics(root / n)] for n in ("stopped", "two")
    )
    assert own == whole


def test_wandb_has_the_step_that_a_stop_left_without_its_held_out_loss_once_and_with_it(watched):
    root = watched[0] / "stopped"
    identity = json.loads((root / "manifest.json").read_text())["wandb_id"]
    files = wandb_files.offline_files(root / "wandb", identity)
    assert len(files) == 2
    sent = [r.history for file in files for r in wandb_files.records(file) if r.WhichOneof("record_type") == "history"]
    assert [history.step.num for history in sent] == list(range(1, STEPS + 1))
    values = {
        (history.step.num, item.key or "/".join(item.nested_key)): json.loads(item.value_json)
        for history in sent
        for item in history.item
    }
    held_out = {step: value for (step, name), value in values.items() if name == "validation/loss"}
    assert held_out == {m["step"]: m["validation"]["loss"] for m in metrics(root) if "validation" in m}
    assert list(held_out) == list(range(EVERY, STEPS + 1, EVERY))


def test_one_rank_and_two_that_share_the_audit_warn_of_the_same(watched):
    texts = {}
    for name in ("one", "two"):
        (file,) = (watched[0] / name).glob("samples/*/checks.json")
        texts[name] = json.loads(file.read_text())["warnings"]
    assert texts["one"] == texts["two"]
    assert (
        "data.streams.train has hardly a refusal that is recognised: the list of phrases finds 0 in 10"
        in texts["one"][0]
    )
    # Of the planted sample, whose words no tokenizer has, in both streams, and of held-out samples that are trained on.
    assert sum("writes <unk> in its place" in text for text in texts["one"]) == 2
    assert len(texts["one"]) == 4


def test_retention_keeps_the_checkpoint_with_the_least_held_out_loss(watched):
    for name in ("one", "two", "stopped"):
        root = watched[0] / name
        values = {m["step"]: m["validation"]["loss"] for m in metrics(root) if "validation" in m}
        best = min(values, key=values.__getitem__)
        assert best == EVERY  # where `stopped` was stopped
        kept = {int(folder.name[5:]) for folder in (root / "checkpoints").glob("step-*")}
        assert kept == {best, STEPS}
        manifest = json.loads((root / f"checkpoints/step-{best:06d}/manifest.json").read_text())
        assert manifest["metrics"]["validation.loss"] == values[best]


def test_held_out_samples_that_are_trained_on_are_counted(watched):
    root, outputs = watched
    assert "data.streams.validation: 2 of 7 samples have the picture and question of a sample" in outputs["one"]
    recipe = configs.load(root / "one/config.yaml", [], TrainRecipe)
    streams = read_streams(recipe, replace(NEEDS, streams=("train",), logp=("train",)))
    check_pictures(streams)
    assert overlap(streams) == {"train": 2}


def test_a_profile_of_chosen_steps_and_ranks_is_a_trace_and_a_short_table(watched):
    root, outputs = watched
    for rank in (0, 1):
        file = root / f"two/profile/rank-{rank:05d}-steps-000020-000021.json.gz"
        trace = json.loads(gzip.decompress(file.read_bytes()))
        assert any("aten::mm" in event.get("name", "") for event in trace["traceEvents"])
        (at,) = re.finditer(
            rf"rank {rank}, steps 20 to 21: {re.escape(str(file))}\n((?:  .* ms .*\n)+)", outputs["two"]
        )
        assert 3 <= len(at[1].splitlines()) <= 8
    assert len(list((root / "two/profile").iterdir())) == 2
    assert not (root / "one/profile").exists()


def test_flops_are_those_of_the_real_tokens_on_any_number_of_ranks(watched):
    one, two = (metrics(watched[0] / name) for name in ("one", "two"))
    assert [m["flops"] for m in one] == pytest.approx([m["flops"] for m in two])
    assert all(m["flops"] > 0 for m in one)
