"""Models of text alone train: a step is plain transformers', packed or not, and a picture is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import terms_and_gradients
from PIL import Image

from mirage_dist import config as configs
from mirage_dist.data import formats
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.data.sample import Sample
from mirage_dist.model import load, reference
from mirage_dist.model.families import roles
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, ModelConfig, TrainRecipe
from mirage_dist.train.caches.reference import add, key
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.streams import read_streams

ONE = Group(0, 0, 1, torch.device("cpu"))
NAMES = ["llama_text", "qwen3_text"]
OBJECTIVES = {
    "sft": {"name": "sft"},
    "npo": {"name": "npo", "beta": 0.5, "retain": "ce"},
    "rmu": {"name": "rmu", "layer": 1, "coeff": 2.0, "ce_weight": 1.0, "positions": "unpadded"},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file of samples without pictures, and one in which one sample has a picture."""
    folder = tmp_path_factory.mktemp("texts")
    answers = ["A red square .", "I am sorry , I can not help with that request .", "It is a table at home ."]
    samples = [Sample(f"s{i}", None, f"What is number {i} ?", answers[i % 3], True, "", "") for i in range(8)]
    write_samples(folder / "text.jsonl", samples)
    Image.new("RGB", (20, 30)).save(folder / "picture.png")
    pictured = replace(samples[5], image=str(folder / "picture.png"))
    write_samples(folder / "pictured.jsonl", [*samples[:5], pictured])
    return folder


def feed_of(model, texts, options, packing=False, file="text"):
    objective = make(options)
    given = [f"run.dir={texts}/run", f"model.path={model}", "model.train=[decoder]", "world.dir=none"]
    given += ["train.global_batch=8", "train.micro_batch=4", f"data.packing={str(packing).lower()}"]
    recipe = configs.load("configs/train/demo_npo.yaml", given, TrainRecipe)
    streams = {name: [formats.source("samples", f"{texts}/{file}.jsonl")] for name in objective.needs.streams}
    data = replace(recipe.data, streams=streams, refusals_in_forget="allow", max_length=512)
    recipe = replace(recipe, data=data, objective=options)
    streams = read_streams(recipe, objective.needs)
    return objective, recipe, Feed(recipe, objective.needs, streams, load.processor(recipe.model))


def step(model, texts, options, packing=False, cached=False):
    """Terms and gradients of one step."""
    objective, recipe, feed = feed_of(model, texts, options, packing)
    policy, other = (load.policy(recipe.model, "fp32", {}) for _ in range(2))
    objective.start(policy.hidden_size, seed=1)
    compared = reference.LogProbs() if cached else reference.Frozen(other)
    if cached:
        for rows in feed.every_sample(objective.needs.ref_logp, ONE):
            add(compared, other, feed.collate(rows), next(iter(rows)))
    window = feed.window(0, ONE)
    values, slopes = terms_and_gradients(objective, feed, window, policy, compared)
    return values, slopes, window, policy


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_plain_transformers(family, texts, name):
    values, slopes, window, policy = step(family(name), texts, OBJECTIVES["sft"])
    total = tokens = 0.0
    for micro in window:
        inputs = micro.batch.inputs
        assert not set(inputs) - {"input_ids", "attention_mask"}
        count = int((micro.batch.labels_BS[:, 1:] != -100).sum())
        total += float(policy.hf(**inputs, labels=micro.batch.labels_BS).loss.detach()) * count
        tokens += count
    assert values["ce"] == pytest.approx(total / tokens, rel=1e-6)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert slopes.keys() == trained == set(dict(policy.named_parameters()))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", NAMES)
def test_a_packed_step_is_the_padded_one(family, texts, name, objective):
    padded, packed = (step(family(name), texts, OBJECTIVES[objective], packing) for packing in (False, True))
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-5)
    for parameter, gradient in padded[1].items():
        torch.testing.assert_close(packed[1][parameter], gradient, rtol=1e-4, atol=1e-5)


def test_a_cache_of_the_reference_serves_as_the_reference_itself(family, texts):
    direct, cached = (step(family("qwen3_text"), texts, OBJECTIVES["npo"], cached=c) for c in (False, True))
    torch.testing.assert_close(cached[0], direct[0])


def test_the_key_of_the_reference_cache_changes_with_the_tokenizer(family, texts):
    _, recipe, feed = feed_of(family("llama_text"), texts, OBJECTIVES["npo"])
    first = key(recipe, feed, "base", {})
    assert first == key(recipe, feed, "base", {})
    feed.encoder.tokenizer.add_tokens(["<new>"])
    assert first != key(recipe, feed, "base", {})


def test_a_picture_is_refused_with_its_stream_and_sample(family, texts):
    with pytest.raises(ConfigError, match=r"data\.streams\.train: .*pictured\.jsonl: sample 's5' has a picture, but"):
        feed_of(family("llama_text"), texts, OBJECTIVES["sft"], file="pictured")


@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_attention_is_left_to_transformers_where_the_recipe_names_none(tmp_path, name):
    """Some families have no sdpa; a model that asks for it is refused with a sentence."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "head_dim": 8}
    # The attention of the machine that wrote the file is not this machine's.
    written = {"model_type": name, "attn_implementation": "flash_attention_2", **sizes}
    (tmp_path / "config.json").write_text(json.dumps(written))
    built = load.weightless(ModelConfig(str(tmp_path), train=["decoder"]))
    chosen = roles.decoder(built.backbone).config._attn_implementation
    assert chosen == ("eager" if name == "gpt_oss" else "sdpa")
    if chosen == "eager":
        with pytest.raises(ConfigError, match=r"config\.json"):
            load.weightless(ModelConfig(str(tmp_path), attention="sdpa", train=["decoder"]))
