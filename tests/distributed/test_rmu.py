"""RMU that stops early, narrows its rows, shares a prefix and loads no unused layer has the numbers of three whole
forwards with hooks.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import launch, losses, plain_step
from transformers import AutoModelForImageTextToText

from mirage_dist import config as configs
from mirage_dist.model import load, trainable
from mirage_dist.model.shards import Shards, read_manifest
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.engine import learning_rate
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.streams import read_streams

STEPS, LAYER = 4, 1
SHORT = (f"train.max_steps={STEPS}", "train.global_batch=8", f"objective.layer={LAYER}", "objective.positions=unpadded")
SHARDED = {"zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0}}
ABOVE_ZERO = "model.train=[decoder.layers.1.*, head]"
PROJECTOR = "model.train=['decoder.layers.[01].*', connector]"
LORA = "model.lora={rank: 4, alpha: 8, dropout: 0.0, targets: ['*language_model.layers.[1-3].*_proj']}"
# name -> (ranks, micro-batch, overrides); the first four have a plain twin
RUNS = {
    "shared": (2, 4, (ABOVE_ZERO, "model.gradient_checkpointing=true")),
    "shared, no head": (2, 2, (ABOVE_ZERO, "objective.ce_weight=0")),
    "projector trains": (2, 4, (PROJECTOR,)),
    "projector trains, no head": (1, 8, (PROJECTOR, "objective.ce_weight=0")),
    "adapters": (2, 4, (LORA, "objective.ce_weight=0", "train.export=false")),
    "adapters off": (2, 4, (LORA, "objective.ce_weight=0", "reference=adapters_off")),
}
PLAIN = list(RUNS)[:4]


@pytest.fixture(scope="module")
def finished(toy):
    (toy.root / "rmu.json").write_text(json.dumps(SHARDED))
    folders = {}
    for name, (ranks, rows, own) in RUNS.items():
        folders[name] = toy.root / "rmu" / name.replace(", ", "-").replace(" ", "-")
        overrides = [*toy.overrides("rmu", folders[name]), *SHORT, *own, f"train.micro_batch={rows}"]
        launch(ranks, "train", "configs/train/demo_rmu.yaml", *overrides, f"deepspeed={toy.root}/rmu.json")
    return folders


def plain(recipe: TrainRecipe):
    """RMU in PyTorch alone: two whole models, hooks, full forwards of all rows. Losses and the trained model."""
    policy, reference = (AutoModelForImageTextToText.from_pretrained(recipe.model.path) for _ in range(2))
    trainable.choose(policy, recipe.model.train, recipe.model.freeze)
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], betas=(0.9, 0.98), weight_decay=0
    )
    objective = make(recipe.objective)
    objective.start(policy.config.text_config.hidden_size, recipe.seed)
    feed = Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model))
    series = []
    for number in range(STEPS):
        micros = feed.window(number, Group(0, 0, 1, torch.device("cpu")))
        counts, sums = feed.counts(micros), {"forget": 0, "retain": 0, "ce": 0}
        for micro in micros:
            now, logits = hooked(policy, micro.batch.inputs)
            with torch.no_grad():
                before, _ = hooked(reference, micro.batch.inputs)
            forget, retain = micro.rows["forget"], micro.rows["retain"]
            steer = (now[forget] - objective.control_D).square().mean(-1) * micro.mask_BS[forget]
            keep = (now[retain] - before[retain]).square().mean(-1) * micro.mask_BS[retain]
            labels = micro.batch.labels_BS[retain, 1:]
            ce = F.cross_entropy(logits[retain, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
            for name, value in (("forget", steer.sum()), ("retain", keep.sum()), ("ce", ce)):
                sums[name] = sums[name] + value
        loss = sums["forget"] / counts["forget.positions"]
        loss = loss + recipe.objective["retain_weight"] * sums["retain"] / counts["retain.positions"]
        loss = loss + recipe.objective["ce_weight"] * sums["ce"] / counts["retain.tokens"]
        rate = learning_rate(recipe.train, number, feed.steps)
        series.append(plain_step(policy, optimizer, loss, rate, recipe.train.clip))
    return series, policy


def hooked(model, inputs):
    """The tapped layer's output, and the logits."""
    outputs = []
    handle = model.model.language_model.layers[LAYER].register_forward_hook(lambda *args: outputs.append(args[2]))
    logits = model(**inputs).logits
    handle.remove()
    return outputs[0], logits


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_three_whole_forwards_with_hooks(finished, name):
    recipe = configs.load(finished[name] / "config.yaml", [], TrainRecipe)
    series, policy = plain(recipe)
    torch.testing.assert_close(losses(finished[name])[:, 0], torch.tensor(series), atol=1e-5, rtol=1e-5)
    exported = AutoModelForImageTextToText.from_pretrained(finished[name] / "export")
    base = AutoModelForImageTextToText.from_pretrained(recipe.model.path)
    moved = 0
    for mine, oracle, start in zip(exported.parameters(), policy.parameters(), base.parameters(), strict=True):
        assert (mine - oracle).norm() <= 1e-3 * (oracle - start).norm() + 1e-7
        moved += bool((oracle != start).any())
    assert moved


def test_the_reference_may_be_the_policy_without_its_adapters(finished):
    torch.testing.assert_close(
        losses(finished["adapters off"], "grad_norm"), losses(finished["adapters"], "grad_norm"), atol=5e-6, rtol=5e-6
    )


@pytest.mark.parametrize("name", RUNS)
def test_without_a_head_no_layer_after_the_tapped_one_is_in_a_checkpoint(finished, name):
    checkpoint = finished[name] / f"checkpoints/step-{STEPS:06d}"
    depth = read_manifest(checkpoint)["depth"]
    with Shards(checkpoint) as shards:
        later = [n for n in shards.shapes if "lm_head" in n or any(f"layers.{i}." in n for i in (2, 3))]
    assert (depth, later) == ((LAYER + 1, []) if "objective.ce_weight=0" in RUNS[name][2] else (None, later))
    assert later or depth or name == "projector trains"
