"""A step packed, and a step with cached vision features, is the padded step with pictures: in every family.

Pictures have several sizes, and come with text-only samples and alone, as do text-only samples. Which families are
packed is measured (see `families.packing`); the table here is what the measurement should come to.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import run_of
from families import models
from packaging.version import Version
from PIL import Image

from mirage_dist import config as configs
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sample import Sample
from mirage_dist.model import load, vision
from mirage_dist.model.policy import HeadedModel, Request
from mirage_dist.objectives.base import make
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.caches import vision as vision_cache
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.check import resolved
from mirage_dist.train.planning.streams import read_streams

# Until 5.22 of transformers, Gemma 3's masks keep packed sequences apart; from 5.23 on they do not.
PADDED = {"mllama"} | ({"gemma3"} if Version(transformers.__version__) >= Version("5.23") else set())
# PaliGemma answers by prefix-LM attention and is not trained.
LEFT_OUT = {"paligemma", "paligemma_templated"}
NOT_CACHED = {
    "llama_text": "has no vision tower",
    "qwen3_text": "has no vision tower",
    "mllama": "takes the pictures of each row apart from its tokens",
}
NAMES = [name for name in models.FAMILIES if name not in LEFT_OUT]
SIZES = [(64, 64), (120, 60), (40, 90), (200, 120)]
BATCHES = {"mixed": [0, 1, 4, 3], "pictures": [2, 1, 0], "text only": [5, 4]}
SMALL = 2e-6  # of log-probabilities; and of gradients, as a share of all gradients' norm


class Engine(torch.nn.Module):
    """What the cache asks of DeepSpeed's engine."""

    def __init__(self, policy: HeadedModel) -> None:
        super().__init__()
        self.module = policy

    def forward(self, inputs, request):
        return self.module(inputs, request)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    made = []
    for i, size in enumerate(SIZES):
        noise = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        made.append(
            Sample(str(i), str(folder / f"{i}.png"), "what is this ?"[: 6 + 2 * i], "a red square", True, "", "t")
        )
    texts = [("what is red ?", "a colour"), ("what ?", "it is a blue square")]
    made += [Sample(q, None, q, a, True, "", "t") for q, a in texts]
    write_samples(folder / "samples.jsonl", made)
    write_samples(folder / "text.jsonl", [replace(sample, image=None) for sample in made])
    return folder


@pytest.fixture(scope="module", params=NAMES)
def start(request, family, samples, tmp_path_factory):
    """recipe(*overrides), feed(recipe) and the policy of one family."""
    folder, run = family(request.param), tmp_path_factory.mktemp("run")
    file = samples / ("text.jsonl" if request.param.endswith("_text") else "samples.jsonl")

    def recipe(*overrides: str) -> TrainRecipe:
        given = [f"run.dir={run}", f"model.path={folder}", f"data.streams.train=[{{format: samples, path: {file}}}]"]
        given += [
            "train.dtype=fp32",
            "train.micro_batch=2",
            "data.workers=0",
            "model.attention=auto",
            "model.train=null",
        ]
        return configs.load("configs/train/sft.yaml", [*given, *overrides], TrainRecipe)

    first = recipe()
    processor, objective = load.processor(first.model), make(first.objective)

    def feed(recipe: TrainRecipe) -> Feed:
        return Feed(recipe, objective.needs, read_streams(recipe, objective.needs), processor)

    policy = load.policy(first.model, "fp32", {}).train()
    return SimpleNamespace(
        name=request.param, recipe=recipe, processor=processor, objective=objective, feed=feed, policy=policy
    )


def passes(start, feed, batch):
    """Log-probabilities of the batch's answers, and gradients of their sum, each by a weight of its own."""
    micro = feed.collate({"train": np.array(BATCHES[batch])})
    start.policy.zero_grad()
    logp_N = start.policy(micro.batch.inputs, Request(micro.batch.index_N, micro.batch.labels_N)).logp_N
    (logp_N @ torch.linspace(0.5, 1, len(logp_N))).backward()
    return logp_N.detach(), {n: p.grad.clone() for n, p in start.policy.named_parameters() if p.grad is not None}


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=SMALL)
    assert one[1].keys() == other[1].keys()
    norm = torch.stack([g.norm() for g in other[1].values()]).norm()
    for name, gradient in other[1].items():
        assert (one[1][name] - gradient).norm() <= SMALL * norm, name


def test_a_packed_step_is_the_padded_one(start):
    recipe = resolved(start.recipe("data.packing=auto"), start.processor)
    assert recipe.data.packing is (start.name not in PADDED)
    if not recipe.data.packing:
        with pytest.raises(ConfigError, match=r"data\.packing: "):
            resolved(start.recipe("data.packing=true"), start.processor)
        return
    padded, packed = start.feed(start.recipe("data.packing=false")), start.feed(recipe)
    for batch in BATCHES:
        assert_same(passes(start, packed, batch), passes(start, padded, batch))


def test_a_step_with_cached_features_is_the_one_with_pictures(start):
    recipe = resolved(start.recipe("data.packing=auto", "data.cache_vision=true"), start.processor)
    if start.name in NOT_CACHED:
        with pytest.raises(ConfigError, match=NOT_CACHED[start.name]):
            load.check_names(recipe.model, recipe.data, (), None)
        return
    load.check_names(recipe.model, recipe.data, (), None)
    feed = start.feed(recipe)
    live = {batch: passes(start, feed, batch) for batch in BATCHES}
    run = run_of(recipe, start.objective, feed, Engine(start.policy), "base")
    run.lease.workspace.mkdir(parents=True, exist_ok=True)
    features = vision_cache.fill(run)
    feed.encoder.recall(features)
    ran: list[int] = []
    inner = [module for layer in start.policy.tower.layers for module in layer.children()]
    for batch in BATCHES:
        inputs = feed.collate({"train": np.array(BATCHES[batch])}).batch.inputs
        assert not [name for name in inputs if vision.is_pixels(name)]
        handles = [module.register_forward_hook(lambda *_: ran.append(1)) for module in inner]
        assert_same(passes(start, feed, batch), live[batch])
        for handle in handles:
            handle.remove()
    assert not ran  # nothing in a layer of the tower
