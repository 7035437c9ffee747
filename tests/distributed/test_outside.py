"""Objectives from outside the package (`lab.py`, what docs/objectives.md shows) and its own, trained as users train."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forkserver
import pytest
import torch
import torch.nn.functional as F
from conftest import losses, metrics, plain_step
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.model import load, trainable
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group, free_port
from mirage_dist.schema import TrainRecipe
from mirage_dist.schema.training import LoraConfig
from mirage_dist.train.engine import learning_rate
from mirage_dist.train.feed import Feed, read_streams

STEPS, BATCH = 4, 8
SHARDED = {"zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0}}
ALONE = Group(0, 0, 1, torch.device("cpu"))
OBJECTIVES = {
    "dpo": ({"name": "lab:DPO", "beta": 0.5}, {"chosen": "chosen", "rejected": "rejected"}, "cache"),
    "layers": ({"name": "lab:LayeredRMU", "layers": [1, 2]}, {"forget": "forget", "retain": "retain"}, "engine"),
}
KEPT = {"forget": "forget", "retain": "retain"}
PAIRS = {"forget": "rejected", "idk": "chosen", "retain": "retain"}
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0, targets=["decoder"])
# The package's own whose forward is another than NPO's and RMU's: two ranks pack, and partition every parameter.
OWN = {
    "undial": ({"name": "undial", "beta": 5.0, "retain": "ce"}, KEPT, "engine"),
    "undial_lora": ({"name": "undial", "beta": 5.0, "retain": "kl"}, KEPT, "adapters_off"),
    "idk_dpo": ({"name": "idk_dpo", "beta": 0.5, "retain": "ce"}, PAIRS, "cache"),
    "adaptive": (
        {"name": "rmu", "layers": [1, 2], "coeff_of": "reference_norm", "positions": "unpadded", "ce_weight": 0.0}
        | {"kl_weight": 3.0},
        KEPT,
        "engine",
    ),
}
# Trains the recipes one after the other in one process: importing the libraries takes longer than a run does.
TRAIN = """
import sys
from mirage_dist import config, ranks, schema
from mirage_dist.train import run
from mirage_dist.train.planning.check import check_recipe
for file in sys.argv[1:]:
    run.train(check_recipe(config.load(file, [], schema.TrainRecipe), ranks.place()[2]))
ranks.exit_well()
"""


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """(objective, ranks) -> run directory; two ranks make two micro-batches of a step each, one rank makes one."""
    root = tmp_path_factory.mktemp("outside")
    chosen = sources.read(formats.source("samples", str(toy.root / "retain.jsonl"))).samples[:20]
    answers = [sample.answer for sample in chosen]
    rejected = [replace(s, answer=f"it is {a}") for s, a in zip(chosen, answers[7:] + answers[:7], strict=True)]
    write_samples(toy.root / "chosen.jsonl", chosen)
    write_samples(toy.root / "rejected.jsonl", rejected)
    (root / "sharded.json").write_text(json.dumps(SHARDED))
    folders = {}
    for ranks in (1, 2):
        files = []
        for name, (options, streams, reference) in (OBJECTIVES | OWN).items():
            folders[name, ranks] = root / f"{name}-{ranks}"
            recipe = recipe_of(toy, folders[name, ranks], options, streams, reference)
            if name in OWN and ranks == 2:
                recipe = replace(recipe, data=replace(recipe.data, packing=True))
            if reference == "adapters_off":
                recipe = replace(recipe, model=replace(recipe.model, train=None, lora=LORA))
                recipe = replace(recipe, train=replace(recipe.train, export=False))
            train = replace(recipe.train, micro_batch=BATCH // ranks**2)
            files.append(str(root / f"{name}-{ranks}.yaml"))
            configs.write_yaml(replace(recipe, train=train, deepspeed=f"{root}/sharded.json"), Path(files[-1]))
        shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [forkserver.python(), "-c", TRAIN, *files]
        processes = [
            subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes)
            for r in range(ranks)
        ]
        for process in processes:
            output = process.communicate(timeout=300)[0]
            assert process.returncode == 0, output
    return folders


def recipe_of(toy, folder, options, streams, reference="cache") -> TrainRecipe:
    recipe = configs.load("configs/train/demo_npo.yaml", [*toy.overrides("npo", folder), "train.lr=0.003"], TrainRecipe)
    given = {name: [formats.source("samples", f"{toy.root}/{file}.jsonl")] for name, file in streams.items()}
    train = replace(recipe.train, max_steps=STEPS, global_batch=BATCH, micro_batch=BATCH, dtype="fp32")
    data = replace(recipe.data, streams=given)
    return replace(recipe, data=data, objective=options, reference=reference, train=train)


def plain(recipe: TrainRecipe, loss_of):
    """Whole batches, two whole models, full logits and hooks in PyTorch alone. Losses and the trained model."""
    policy, reference = (AutoModelForImageTextToText.from_pretrained(recipe.model.path) for _ in range(2))
    trainable.choose(policy, recipe.model.train, recipe.model.freeze)
    betas = tuple(recipe.train.optimizer["betas"])
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], betas=betas, weight_decay=0)
    objective = make(recipe.objective)
    objective.start(policy.config.text_config.hidden_size, recipe.seed)
    feed = Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model))
    series = []
    for number in range(STEPS):
        (micro,) = feed.window(number, ALONE)
        loss = loss_of(policy, reference, micro, objective)
        rate = learning_rate(recipe.train, number, feed.steps)
        series.append(plain_step(policy, optimizer, loss, rate, recipe.train.clip))
    return series, policy


def logps(model, micro) -> torch.Tensor:
    """Log-probability of each sequence's response, from full logits."""
    labels = micro.batch.labels_BS[:, 1:]
    logits = model(**micro.batch.inputs).logits[:, :-1].log_softmax(-1)
    picked = logits.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return (picked * (labels != -100)).sum(1)


def dpo(policy, reference, micro, objective):
    with torch.no_grad():
        before = logps(reference, micro)
    reward = objective.beta * (logps(policy, micro) - before)
    return -F.logsigmoid(reward[:BATCH] - reward[BATCH:]).mean()


def hooked(model, inputs, layers):
    outputs = {}
    for layer in layers:
        module = model.model.language_model.layers[layer]
        module.register_forward_hook(lambda *call, layer=layer: outputs.update({layer: call[2]}))
    model(**inputs)
    for layer in layers:
        model.model.language_model.layers[layer]._forward_hooks.clear()
    return outputs


def layers(policy, reference, micro, objective):
    now = hooked(policy, micro.batch.inputs, objective.layers)
    with torch.no_grad():
        before = hooked(reference, micro.batch.inputs, objective.layers)
    loss, mask = 0, micro.mask_BS[..., None]
    for layer in objective.layers:
        for name, target in (("forget", objective.control_D), ("retain", before[layer][micro.rows["retain"]])):
            rows = micro.rows[name]
            error = (now[layer][rows] - target).square() * mask[rows]
            loss = loss + error.sum() / error.shape[-1] / mask[rows].sum()
    return loss


def whole(model, micro, stream):
    """Logits of the positions that predict a stream's response tokens, and these tokens."""
    rows = micro.rows[stream]
    labels = micro.batch.labels_BS[rows, 1:]
    kept = labels != -100
    return model(**micro.batch.inputs).logits[rows, :-1][kept], labels[kept]


def divergence(policy, reference, micro):
    own, other = (whole(model, micro, "retain")[0].log_softmax(-1) for model in (policy, reference))
    return F.kl_div(own, other.detach(), reduction="batchmean", log_target=True)


def undial(policy, reference, micro, objective):
    """open-unlearning's `compute_undial_loss` at response tokens, and the retain term."""
    (logits, labels), (teacher, _) = (whole(model, micro, "forget") for model in (policy, reference))
    soft = (teacher.detach() - objective.beta * F.one_hot(labels, teacher.shape[-1])).softmax(-1)
    if objective.retain == "kl":
        return F.cross_entropy(logits, soft) + divergence(policy, reference, micro)
    return F.cross_entropy(logits, soft) + F.cross_entropy(*whole(policy, micro, "retain"))


def idk_dpo(policy, reference, micro, objective):
    """open-unlearning's `compute_dpo_loss`, and the cross entropy of the retained answers."""
    with torch.no_grad():
        before = logps(reference, micro)
    ratio, beta = logps(policy, micro) - before, objective.beta
    logits, labels = whole(policy, micro, "retain")
    preferred = beta * (ratio[micro.rows["idk"]] - ratio[micro.rows["forget"]])
    return -2 / beta * F.logsigmoid(preferred).mean() + F.cross_entropy(logits, labels)


def adaptive(policy, reference, micro, objective):
    """Adaptive RMU at two layers, and KL."""
    now = hooked(policy, micro.batch.inputs, objective.layers)
    with torch.no_grad():
        before = hooked(reference, micro.batch.inputs, objective.layers)
    loss, mask = 3.0 * divergence(policy, reference, micro), micro.mask_BS[..., None]
    for layer in objective.layers:
        norm = before[layer].norm(dim=-1, keepdim=True)
        for name, target in (("forget", norm * objective.control_D), ("retain", before[layer])):
            rows = micro.rows[name]
            error = (now[layer][rows] - target[rows]).square() * mask[rows]
            loss = loss + error.sum() / error.shape[-1] / mask[rows].sum()
    return loss


def test_undial_of_adapters_begins_with_the_formula_and_is_one_loss_on_one_and_two_ranks(finished):
    one, two = (losses(finished["undial_lora", ranks]) for ranks in (1, 2))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)
    recipe = configs.load(finished["undial_lora", 1] / "config.yaml", [], TrainRecipe)
    base = AutoModelForImageTextToText.from_pretrained(recipe.model.path)
    objective = make(recipe.objective)
    feed = Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model))
    expected = undial(base, base, feed.window(0, ALONE)[0], objective).item()
    assert one[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert one[-1, 0] < one[0, 0]


@pytest.mark.parametrize(
    ("name", "loss_of"),
    [("dpo", dpo), ("layers", layers), ("undial", undial), ("idk_dpo", idk_dpo), ("adaptive", adaptive)],
)
def test_an_objective_trains_as_plain_pytorch_does_on_one_and_two_ranks(finished, name, loss_of):
    recipe = configs.load(finished[name, 1] / "config.yaml", [], TrainRecipe)
    expected, policy = plain(recipe, loss_of)
    assert len({round(loss, 3) for loss in expected}) > 1
    base = AutoModelForImageTextToText.from_pretrained(recipe.model.path)
    for ranks in (1, 2):
        folder = finished[name, ranks]
        torch.testing.assert_close(losses(folder)[:, 0], torch.tensor(expected), atol=1e-5, rtol=1e-5)
        exported = AutoModelForImageTextToText.from_pretrained(folder / "export")
        for mine, oracle, start in zip(exported.parameters(), policy.parameters(), base.parameters(), strict=True):
            assert (mine - oracle).norm() <= 1e-3 * (oracle - start).norm() + 1e-7
    torch.testing.assert_close(losses(finished[name, 2]), losses(finished[name, 1]), atol=1e-5, rtol=1e-5)


def test_logged_values_are_global_means_beside_the_terms_and_no_part_of_the_loss(finished):
    one, two = (metrics(finished["dpo", ranks]) for ranks in (1, 2))
    for mine, other in zip(one, two, strict=True):
        assert set(mine["values"]) == {"reward_chosen", "margin"}
        torch.testing.assert_close(mine["values"], other["values"], atol=1e-5, rtol=1e-5)
        assert mine["loss"] == mine["terms"]["dpo"]
    assert one[0]["values"]["margin"] == pytest.approx(0, abs=1e-5)  # policy and reference are the same model
    assert one[-1]["values"]["margin"] > 0.01
    assert all("values" not in record for record in metrics(finished["layers", 1]))


def test_the_state_of_an_objective_from_outside_is_in_its_checkpoints(finished):
    one, two = (
        load_file(finished["layers", ranks] / f"checkpoints/step-{STEPS:06d}/objective.safetensors") for ranks in (1, 2)
    )
    assert one["control_D"].norm().item() == pytest.approx(10.0, rel=1e-5)
    assert torch.equal(one["control_D"], two["control_D"])


def test_the_objective_that_the_docs_show_trains_by_the_command_and_is_exported(toy, tmp_path):
    """SimNPO, from the page to a model: a single new file in the working directory, and nothing installed."""
    page = (REPOSITORY / "docs/objectives.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 30
    assert "my_lab.losses:SimNPO" in page
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab/losses.py").write_text(code)
    options = {"name": "my_lab.losses:SimNPO", "beta": 2.0, "gamma": 0.3, "retain_weight": 0.7}
    recipe = recipe_of(toy, tmp_path / "run", options, {"forget": "forget", "retain": "retain"})
    recipe = replace(recipe, train=replace(recipe.train, max_steps=1, micro_batch=4))
    configs.write_yaml(recipe, tmp_path / "simnpo.yaml")
    command = [sys.executable, "-m", "mirage_dist.cli", "train", "simnpo.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    AutoModelForImageTextToText.from_pretrained(tmp_path / "run/export")

    model = AutoModelForImageTextToText.from_pretrained(recipe.model.path, dtype=torch.float64)
    needs = make({"name": "graddiff"}).needs  # the same streams
    recipe = replace(recipe, train=replace(recipe.train, micro_batch=BATCH))
    feed = Feed(recipe, needs, read_streams(recipe, needs), load.processor(recipe.model))
    (micro,) = feed.window(0, ALONE)
    with torch.no_grad():
        logp_B, tokens_B = logps(model, micro), (micro.batch.labels_BS[:, 1:] != -100).sum(1)
    forget = -2 / 2.0 * F.logsigmoid(-2.0 * logp_B[:BATCH] / tokens_B[:BATCH] - 0.3).mean()
    retain = -logp_B[BATCH:].sum() / tokens_B[BATCH:].sum()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx((forget + 0.7 * retain).item(), rel=1e-5)
