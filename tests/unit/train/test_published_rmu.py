"""The benchmark's opponents are fair: their losses and gradients are those of our step, so only the way differs."""

import importlib
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Engine
from omegaconf import OmegaConf
from transformers import AutoModelForImageTextToText

from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.model import load, reference
from mirage_dist.model.policy import HeadedModel
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.streams import read_streams
from mirage_dist.train.views import Views

HERE = Group(0, 0, 1, torch.device("cpu"))
NPO = {"name": "npo", "beta": 0.3}
CASES = {
    "sft": {"name": "sft"},
    "npo_formula": NPO,
    "npo_five": {**NPO, "reduction": "batch_mean", "ce_weight": 1.0},
    "rmu": {"name": "rmu", "layer": 1, "coeff": 6.0, "ce_weight": 0.0},
}


@pytest.fixture(scope="module")
def published():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        yield importlib.import_module("published")
        del sys.modules["published"]


@pytest.fixture(scope="module")
def models(toy):
    """Policy and reference; the policy has moved, or NPO's margin would be zero whatever the reference says."""
    policy, frozen = (AutoModelForImageTextToText.from_pretrained(toy.root / "model") for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.language_model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return HeadedModel(policy), HeadedModel(frozen)


@pytest.mark.parametrize("algorithm", CASES)
def test_a_plain_opponent_has_our_loss_and_gradient(toy, published, models, algorithm):
    policy, frozen = models
    objective = make(CASES[algorithm])
    objective.start(policy.hidden_size, seed=3)
    files = {name: "forget" if name == "forget" else "retain" for name in objective.needs.streams}
    tree = {
        "run": {"dir": "unused"},
        "model": {"path": str(toy.root / "model")},
        "data": {
            "streams": {n: [{"format": "samples", "path": f"{toy.root}/{f}.jsonl"}] for n, f in files.items()},
        },
        "objective": CASES[algorithm],
        "train": {"lr": 1e-3, "global_batch": 4, "micro_batch": 4},
    }
    recipe = configs.from_tree(OmegaConf.create(tree), [], TrainRecipe, "test")
    feed = Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model))
    (micro,) = feed.window(0, HERE)
    compared = reference.Frozen(frozen) if objective.needs.reference else None
    terms = objective(Views(Engine(policy), objective.needs, compared)(micro))
    counts = feed.counts([micro])
    ours = sum(t.weight * t.sum / counts[t.count] for t in terms)

    options = {"beta": 0.3} if algorithm.startswith("npo") else {}
    if algorithm == "rmu":
        options = {"layer": 1, "control_D": objective.state_dict()["control_D"]}
    parts = [published.rows(micro, stream) for stream in objective.needs.streams]
    pair = [policy.hf] if algorithm == "sft" else [policy.hf, frozen.hf]
    plain = getattr(published, algorithm)(*pair, *parts, **options)

    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    weight = policy.backbone.language_model.layers[0].mlp.down_proj.weight
    mine, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (ours, plain))
    assert theirs.norm() > 0
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


def test_rmu_of_the_paper_is_the_mean_over_gpus_of_one_row_each(toy, published, models, tmp_path):
    """`configs/train/rmu_parity.yaml` on micro-batches of four rows: forget, retain and cross entropy of a GPU's row
    alone, which has no padding, as llava_unlearn_full_trainer.py computes them, averaged over as many GPUs.
    """
    policy, frozen = models
    options = {**configs.load("configs/train/rmu_parity.yaml", [], TrainRecipe).objective, "layer": 1, "coeff": 6.0}
    objective = make(options)
    objective.start(policy.hidden_size, seed=3)
    files = {name: "forget" if name == "forget" else "retain" for name in objective.needs.streams}
    tree = {
        "run": {"dir": str(tmp_path)},
        "model": {"path": str(toy.root / "model")},
        "data": {"streams": {n: [{"format": "samples", "path": f"{toy.root}/{f}.jsonl"}] for n, f in files.items()}},
        "objective": options,
        "train": {"lr": 1e-3, "global_batch": 8, "micro_batch": 4},
    }
    recipe = configs.from_tree(OmegaConf.create(tree), [], TrainRecipe, "test")
    feed = Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model))
    window = feed.window(0, HERE)
    counts, ours = feed.counts(window), 0.0
    for micro in window:
        terms = objective(Views(Engine(policy), objective.needs, reference.Frozen(frozen))(micro))
        ours = ours + sum(t.weight * t.sum / counts[t.count] for t in terms)

    def alone(stream, index):
        return published.rows(feed.collate({stream: np.array([index])}), stream)

    losses = []
    chosen = [feed.chosen(stream, 0) for stream in ("forget", "retain", "retain_ce")]
    assert chosen[1].tolist() != chosen[2].tolist()  # two batches of retained samples
    control = objective.state_dict()["control_D"]
    for forget, retain, other in zip(*chosen, strict=True):
        steered, kept = (
            published.activation(policy.hf, alone(name, index), 1)
            for name, index in (("forget", forget), ("retain", retain))
        )
        with torch.no_grad():
            before = published.activation(frozen.hf, alone("retain", retain), 1)
        loss = F.mse_loss(steered, control.expand_as(steered)) + F.mse_loss(kept, before)
        losses.append(loss + published.sft(policy.hf, alone("retain_ce", other)))
    torch.testing.assert_close(ours, sum(losses) / len(losses), rtol=1e-5, atol=1e-6)
    weight = policy.backbone.language_model.layers[0].mlp.down_proj.weight
    mine, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (ours, sum(losses) / len(losses)))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())
