"""Real DeepSpeed runs: one loss whatever the ranks, the accumulation and the ZeRO stage, equal to plain PyTorch."""

import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import launch, losses, metrics, plain_step
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mirage_dist import config as configs
from mirage_dist import disk
from mirage_dist.data import formats, stream
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sources import read
from mirage_dist.liveness import Owner
from mirage_dist.model import export, load, trainable
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.engine import learning_rate
from mirage_dist.train.feed import Feed
from mirage_dist.train.measures.records import CLOCKED
from mirage_dist.train.planning.streams import read_streams

STEPS = 8
SHORT = (f"train.max_steps={STEPS}", "train.global_batch=8")
# Every parameter is partitioned: at the default threshold so small a model would be whole on every rank.
SHARDED = {"zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0}}
ZERO2 = {"zero_optimization": {"stage": 2, "overlap_comm": True}}

# Options of published recipes, on retained samples of which every other one has no picture.
PUBLISHED = (
    "data.streams.retain=[{{format: samples, path: {mixed}}}]",
    "data.group_by_modality=true",
    "data.balance=openers",
    "data.group_by_length=true",
    "train.warmup=0.5",
    "train.warmup_from_zero=true",
    "train.schedule_steps=12",
    "train.groups=[{{match: connector, lr: 2e-4}}]",
    "train.export=false",
)
BY_SEQUENCES = (
    "data.streams.retain_ce=[{{format: samples, path: {mixed}}}]",
    "objective.positions=unpadded",
    "objective.average=sequences",
    "objective.ce_average=sequences",
    "objective.ce_stream=retain_ce",
    "model.train=['decoder.layers.[012].*', connector]",
)
KL = ("objective.retain=kl", "objective.kl_positions=unpadded", "reference=engine")
# name -> (recipe, ranks, overrides)
RUNS = {
    "npo": ("npo", 1, ("train.micro_batch=8",)),
    "npo_2": ("npo", 2, ("train.micro_batch=4", "deepspeed={sharded}", "train.save_every=4")),
    "npo_2x4": ("npo", 2, ("train.micro_batch=1", "deepspeed={sharded}", "train.export=false")),
    "npo_zero2": ("npo", 2, ("train.micro_batch=4", "deepspeed={zero2}", "train.export=false")),
    "npo_engine": ("npo", 2, ("train.micro_batch=4", "reference=engine", "deepspeed={sharded}", "train.export=false")),
    "npo_bf16": ("npo", 2, ("train.micro_batch=4", "train.dtype=bf16", "deepspeed={sharded}")),
    "rmu": ("rmu", 1, ("train.micro_batch=8", "train.export=false")),
    "rmu_2": ("rmu", 2, ("train.micro_batch=2", "deepspeed={sharded}", "train.export=false")),
    "npo_packed_2": (
        "npo",
        2,
        ("train.micro_batch=2", "data.packing=true", "deepspeed={sharded}", "train.export=false"),
    ),
    "sft": ("sft", 1, ("train.micro_batch=8", "train.export=false")),
    "sft_2": ("sft", 2, ("train.micro_batch=2", "deepspeed={sharded}", "train.export=false")),
    "sft_grouped": ("sft", 1, ("train.micro_batch=4", "data.group_by_length=true", "train.export=false")),
    "sft_grouped_packed_2": (
        "sft",
        2,
        ("train.micro_batch=2", "data.group_by_length=true", "data.packing=true", "train.export=false"),
    ),
    "npo_published": ("npo", 1, ("train.micro_batch=8", *PUBLISHED)),
    "npo_published_2": ("npo", 2, ("train.micro_batch=1", "deepspeed={sharded}", *PUBLISHED)),
    "rmu_sequences": ("rmu", 1, ("train.micro_batch=8", *BY_SEQUENCES, *PUBLISHED)),
    "rmu_sequences_2": ("rmu", 2, ("train.micro_batch=2", "deepspeed={sharded}", *BY_SEQUENCES, *PUBLISHED)),
    "npo_kl": ("npo", 1, ("train.micro_batch=8", *KL, "train.export=false")),
    "npo_kl_2": ("npo", 2, ("train.micro_batch=2", "deepspeed={sharded}", *KL, "train.export=false")),
}


@pytest.fixture(scope="module")
def finished(toy):
    """Every run of RUNS, started once: name -> run directory."""
    for name, tree in (("sharded", SHARDED), ("zero2", ZERO2)):
        (toy.root / f"{name}.json").write_text(json.dumps(tree))
    retain = read(formats.source("samples", str(toy.root / "retain.jsonl"))).samples
    write_samples(
        toy.root / "mixed.jsonl", [replace(s, image=s.image if i % 2 else None) for i, s in enumerate(retain)]
    )
    files = {name: str(toy.root / f"{name}.json") for name in ("sharded", "zero2")}
    files["mixed"] = str(toy.root / "mixed.jsonl")
    folders = {}
    for name, (recipe, ranks, own) in RUNS.items():
        folder = toy.root / "runs" / name
        overrides = [*toy.overrides(recipe, folder), *SHORT, *(o.format(**files) for o in own)]
        launch(ranks, "train", f"configs/train/demo_{recipe}.yaml", *overrides)
        folders[name] = folder
    return folders


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("npo", "npo_2"),
        ("npo", "npo_2x4"),
        ("npo", "npo_zero2"),
        ("npo", "npo_engine"),
        ("npo", "npo_packed_2"),
        ("rmu", "rmu_2"),
        ("sft", "sft_2"),
        ("sft_grouped", "sft_grouped_packed_2"),
        ("npo_published", "npo_published_2"),
        ("rmu_sequences", "rmu_sequences_2"),
        ("npo_kl", "npo_kl_2"),
    ],
)
def test_losses_do_not_depend_on_ranks_accumulation_stage_packing_or_kind_of_reference(finished, one, other):
    torch.testing.assert_close(losses(finished[other]), losses(finished[one]), atol=5e-6, rtol=5e-6)
    norms = [torch.tensor([m["grad_norm"] for m in metrics(finished[name])]) for name in (one, other)]
    torch.testing.assert_close(*norms, atol=0, rtol=1e-4)


def test_padding_is_recorded_and_packing_has_none(finished):
    shares = {
        name: [m["padding"] for m in metrics(finished[name])] for name in ("sft", "sft_grouped", "npo", "npo_2x4")
    }
    assert all(0 < share < 0.5 for series in shares.values() for share in series)
    assert sum(shares["sft_grouped"]) < sum(shares["sft"])
    for name in ("npo_packed_2", "sft_grouped_packed_2"):
        assert all(m["padding"] == 0 for m in metrics(finished[name]))
    tokens = [[m["tokens"] for m in metrics(finished[name])] for name in ("npo", "npo_packed_2")]
    assert tokens[0] == tokens[1]


def test_bf16_stays_near_fp32(finished):
    first = losses(finished["npo_bf16"])[:3, 0] / losses(finished["npo"])[:3, 0]
    torch.testing.assert_close(first, torch.ones(3), atol=2e-2, rtol=0)


def plain(recipe: TrainRecipe, number_of_steps: int):
    """NPO in PyTorch alone: two whole models, full logits, loops over sequences. Losses and the trained model."""
    policy, reference = (AutoModelForImageTextToText.from_pretrained(recipe.model.path) for _ in range(2))
    trainable.choose(policy, recipe.model.train, recipe.model.freeze)
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], betas=(0.9, 0.98), weight_decay=0
    )
    objective = make(recipe.objective)
    streams = read_streams(recipe, objective.needs)
    feed = Feed(recipe, objective.needs, streams, load.processor(recipe.model))
    beta, weight = recipe.objective["beta"], recipe.objective["retain_weight"]
    series = []
    for number in range(number_of_steps):
        (micro,) = feed.window(number, Group(0, 0, 1, torch.device("cpu")))
        labels = micro.batch.labels_BS

        def logp(model, micro=micro, labels=labels):
            logits = model(**micro.batch.inputs).logits[:, :-1].log_softmax(-1)
            kept = labels[:, 1:] != -100
            picked = logits.gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(2)
            return [row[keep] for row, keep in zip(picked, kept, strict=True)]

        with torch.no_grad():
            before = logp(reference)
        now = logp(policy)
        half = len(now) // 2
        margins = [(n - b).sum() for n, b in zip(now[:half], before[:half], strict=True)]
        forget = sum(-2 / beta * F.logsigmoid(-beta * m) for m in margins) / half
        loss = forget - weight * torch.cat(now[half:]).mean()
        rate = learning_rate(recipe.train, number, feed.steps)
        series.append(plain_step(policy, optimizer, loss, rate, recipe.train.clip))
    return series, policy


def test_sharded_training_equals_plain_pytorch(finished):
    recipe = configs.load(finished["npo"] / "config.yaml", [], TrainRecipe)
    series, policy = plain(recipe, STEPS)
    for name in ("npo", "npo_2"):
        torch.testing.assert_close(losses(finished[name])[:, 0], torch.tensor(series), atol=5e-6, rtol=5e-6)
        exported = AutoModelForImageTextToText.from_pretrained(finished[name] / "export")
        base = AutoModelForImageTextToText.from_pretrained(recipe.model.path)
        for mine, oracle, start in zip(exported.parameters(), policy.parameters(), base.parameters(), strict=True):
            # In norm: AdamW divides each gradient by its own size, so an element whose gradient is rounding noise
            # moves by a full step in either direction (one of 12 288 did, 3e-4 of the update's norm).
            assert (mine - oracle).norm() <= 1e-3 * (oracle - start).norm() + 1e-7


def test_metrics_have_every_step_once_and_what_the_contract_names(finished):
    for folder in finished.values():
        records = metrics(folder)
        assert [m["step"] for m in records] == list(range(1, STEPS + 1))
        wanted = {"loss", "terms", "grad_norm", "lr", "tokens_per_s", "step_seconds", "memory_mib"}
        assert wanted <= set(records[0])
        assert records[0]["lr"] < records[1]["lr"] or records[0]["lr"] > records[-1]["lr"]


def test_a_published_schedule_begins_with_rate_0_and_scales_the_connectors_own(finished):
    records = metrics(finished["npo_published"])
    peak = configs.load(finished["npo_published"] / "config.yaml", [], TrainRecipe).train.lr
    assert [m["lr"] for m in records[:7]] == pytest.approx([peak * step / 6 for step in range(7)])
    assert [m["group_lr"]["connector"] for m in records] == pytest.approx([m["lr"] / peak * 2e-4 for m in records])


def test_exported_bf16_model_loads_as_it_was_trained(finished):
    model = AutoModelForImageTextToText.from_pretrained(finished["npo_bf16"] / "export", dtype="auto")
    assert model.dtype == torch.bfloat16
    frozen = load_file(finished["npo_bf16"] / "export/model.safetensors")
    base = load_file(
        Path(configs.load(finished["npo_bf16"] / "config.yaml", [], TrainRecipe).model.path) / "model.safetensors"
    )
    same = [torch.equal(frozen[n], base[n].bfloat16()) for n in base if "vision_tower" in n]
    assert same
    assert all(same)
    assert not torch.equal(frozen["language_model.lm_head.weight"], base["language_model.lm_head.weight"].bfloat16())


def test_a_killed_run_resumes_bitwise(finished, toy, tmp_path):
    """SIGKILL of both ranks some time after the first checkpoint; the second start ends where the whole run ended."""
    folder = tmp_path / "killed"
    overrides = [*toy.overrides("npo", folder), *SHORT, "train.micro_batch=4", f"deepspeed={toy.root}/sharded.json"]
    command = ("train", "configs/train/demo_npo.yaml", *overrides, "train.save_every=4")
    process = launch(2, *command, start=True)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints/step-000004/manifest.json").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    process.communicate(timeout=60)
    # What was written after the last commit would hide whether the resumed run wrote it.
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:06d}", ignore_errors=True)
    shutil.rmtree(folder / "export", ignore_errors=True)
    done = launch(2, *command)
    assert "resumed from" in done.stdout
    whole, again = (f / "checkpoints" / f"step-{STEPS:06d}" for f in (finished["npo_2"], folder))
    files = sorted(f.name for f in whole.glob("*.safetensors"))
    assert len(files) == 3  # parameters and moments of two ranks, and the objective's state
    for name in files:
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    clean = [
        [{k: v for k, v in m.items() if k not in CLOCKED} for m in metrics(f)] for f in (folder, finished["npo_2"])
    ]
    assert clean[0] == clean[1]


def test_the_control_vector_is_saved(finished):
    state = load_file(finished["rmu"] / "checkpoints" / f"step-{STEPS:06d}" / "objective.safetensors")
    assert math.isclose(state["control_D"].norm().item(), 30.0, rel_tol=1e-5)
    other = load_file(finished["rmu_2"] / "checkpoints" / f"step-{STEPS:06d}" / "objective.safetensors")
    assert torch.equal(state["control_D"], other["control_D"])


def test_export_of_an_earlier_step_and_of_one_that_is_not_there(finished, tmp_path):
    export.export(finished["npo_2"], tmp_path / "four", step=4)
    four, last = (load_file(p / "model.safetensors") for p in (tmp_path / "four", finished["npo_2"] / "export"))
    assert set(four) == set(last)
    assert any(not torch.equal(four[n], last[n]) for n in four)
    with pytest.raises(ConfigError, match="step-000004"):
        export.export(finished["npo_2"], tmp_path / "five", step=5)
    left = disk.own(tmp_path / "four.01234567.tmp", Owner.from_record(Owner.current().record() | {"process": "1"}))
    with pytest.raises(ConfigError, match="four exists; export to a new directory"):
        export.export(finished["npo_2"], tmp_path / "four")
    assert not left.exists()  # of a process that was killed once its output had its name


def test_every_rank_of_every_world_sees_its_part_of_one_global_batch(toy, finished):
    recipe = configs.load(finished["npo"] / "config.yaml", ["train.micro_batch=1"], TrainRecipe)
    objective = make(recipe.objective)
    feed = Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model))
    size = len(read(recipe.data.streams["forget"][0]).samples)
    for number in (0, 2, 7):
        expected = Counter(stream.batch(21, "forget", size, number, 8).tolist())
        for ranks in (1, 2, 4, 8):
            worlds = [Group(rank, 0, ranks, torch.device("cpu")) for rank in range(ranks)]
            seen = (s for w in worlds for micro in feed.window(number, w) for s in micro.samples)
            assert Counter(index for name, index in seen if name == "forget") == expected
