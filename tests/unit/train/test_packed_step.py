"""A step over packed micro-batches has the loss and the gradients of the padded one, for every objective."""

from dataclasses import replace

import pytest
import torch
from conftest import terms_and_gradients
from transformers import AutoModelForImageTextToText

from mirage_dist import config as configs
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.model import load, reference
from mirage_dist.model.families import packing, roles
from mirage_dist.model.policy import HeadedModel
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.caches.reference import add
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning import check
from mirage_dist.train.planning.streams import read_streams

ONE = Group(0, 0, 1, torch.device("cpu"))
OBJECTIVES = {
    "sft": {"name": "sft"},
    "graddiff": {"name": "graddiff"},
    "npo": {"name": "npo", "reduction": "seq_sum"},
    "npo by means": {"name": "npo", "reduction": "seq_mean"},
    "npo by batch means": {"name": "npo", "reduction": "batch_mean", "ce_weight": 1.0},
    "npo with KL": {"name": "npo", "retain": "kl"},
    "npo with KL at every token": {"name": "npo", "retain": "kl", "kl_positions": "unpadded"},
    "rmu": {"name": "rmu", "layer": 2, "positions": "unpadded"},
    "rmu by sequences": {"name": "rmu", "layer": 2, "positions": "unpadded", "average": "sequences"},
    "rmu of the paper's code": {
        **{"name": "rmu", "layer": 2, "positions": "unpadded"},
        **{"average": "sequences", "ce_average": "sequences", "ce_stream": "retain_ce"},
    },
    "rmu on text": {"name": "rmu", "layer": 2, "positions": "text"},
    "rmu on answers, no CE": {"name": "rmu", "layer": 2, "positions": "response", "ce_weight": 0.0},
}


@pytest.fixture(scope="module")
def files(toy, tmp_path_factory):
    """Pictures and text alone, one turn and two; the first micro-batches have no picture."""
    shown = sources.read(formats.source("samples", str(toy.root / "retain.jsonl"))).samples
    turns = (("what the place of this gadget ?", "it is cave"),)
    mixed = [replace(s, image=None) if i % 3 else replace(s, history=turns) for i, s in enumerate(shown[:12])]
    folder = tmp_path_factory.mktemp("mixed")
    write_samples(folder / "mixed.jsonl", mixed)
    write_samples(folder / "text.jsonl", [replace(s, image=None) for s in shown[:8]])
    return folder


@pytest.fixture(scope="module")
def models(toy):
    """A policy and another one to compare with."""
    policy, other = (HeadedModel(AutoModelForImageTextToText.from_pretrained(toy.root / "model")) for _ in range(2))
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02 * parameter.abs().mean())
    return policy, other


def feed_of(toy, files, options, packing, source="mixed", *overrides):
    objective = make(options)
    given = [f"run.dir={files}/run", f"model.path={toy.root}/model", "world.dir=none", f"data.packing={packing}"]
    given += ["train.global_batch=8", "train.micro_batch=4", *overrides]
    recipe = configs.load("configs/train/demo_npo.yaml", given, TrainRecipe)
    streams = {name: [formats.source("samples", f"{files}/{source}.jsonl")] for name in objective.needs.streams}
    recipe = replace(recipe, data=replace(recipe.data, streams=streams, refusals_in_forget="allow"), objective=options)
    return (
        objective,
        recipe,
        Feed(recipe, objective.needs, read_streams(recipe, objective.needs), load.processor(recipe.model)),
    )


def gradients(toy, files, models, options, packing, cached=False, source="mixed"):
    """Terms and gradients of one step, and the share of padding in it."""
    policy, other = models
    objective, _, feed = feed_of(toy, files, options, packing, source)
    objective.start(policy.hidden_size, seed=1)
    compared = reference.LogProbs() if cached else reference.Frozen(other)
    if cached:
        for rows in feed.every_sample(objective.needs.ref_logp, ONE):
            add(compared, other, feed.collate(rows), next(iter(rows)))
    window = feed.window(0, ONE)
    values, slopes = terms_and_gradients(objective, feed, window, policy, compared)
    counts = feed.counts(window)
    policy.zero_grad(set_to_none=True)
    return values, slopes, 1 - counts["input_tokens"] / counts["slots"]


def assert_same_step(padded, packed):
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-5)
    assert packed[1].keys() == padded[1].keys()
    norm = torch.stack([g.norm() for g in padded[1].values()]).norm()
    assert norm > 0
    for name, gradient in padded[1].items():
        assert (packed[1][name] - gradient).norm() <= 1e-5 * norm, name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_packed_step_is_the_padded_one(toy, files, models, name):
    padded, packed = (gradients(toy, files, models, OBJECTIVES[name], packing) for packing in (False, True))
    assert_same_step(padded, packed)
    assert padded[2] > 0.1
    assert packed[2] == 0


@pytest.mark.parametrize("name", ["npo", "rmu"])
def test_a_packed_step_without_pictures_is_the_padded_one(toy, files, models, name):
    padded, packed = (gradients(toy, files, models, OBJECTIVES[name], p, source="text") for p in (False, True))
    assert_same_step(padded, packed)
    assert packed[2] > 0  # the placeholder


@pytest.mark.parametrize(
    ("name", "checkpointed", "masked"),
    [
        ("npo", False, True),
        ("npo", True, True),
        ("npo", True, False),
        ("npo with KL", False, False),
        ("rmu by sequences", False, False),
    ],
)
def test_attention_of_each_sequence_by_itself_gives_the_padded_step(
    toy, files, models, monkeypatch, name, checkpointed, masked
):
    """And no product of two sequences' tokens is computed. masked: False as on a GPU, where no mask is made."""
    padded = gradients(toy, files, models, OBJECTIVES[name], packing=False)
    attention, widths = torch.nn.functional.scaled_dot_product_attention, []

    def observed(query, *values, **options):
        widths.append(query.shape[2])
        return attention(query, *values, **options)

    policy, other = models
    texts = [roles.decoder(model.backbone).config for model in models]
    try:
        assert all(packing.attend_apart(model.backbone) for model in (policy, other))
        if checkpointed:
            policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
            policy.train()
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", observed)
        if not masked:
            monkeypatch.setattr(packing, "by_flash", lambda *_: True)
        packed = gradients(toy, files, models, OBJECTIVES[name], packing=True)
    finally:
        policy.hf.gradient_checkpointing_disable()
        policy.eval()
        for text in texts:
            text._attn_implementation = "sdpa"
    assert_same_step(padded, packed)
    assert max(widths) <= 64  # data.max_length of the recipe; a packed row has twice as many tokens and more


@pytest.mark.parametrize("name", ["npo", "npo by batch means"])
def test_a_cache_of_packed_batches_serves_as_the_reference_itself(toy, files, models, name):
    direct = gradients(toy, files, models, OBJECTIVES[name], packing=True)
    assert_same_step(direct, gradients(toy, files, models, OBJECTIVES[name], packing=True, cached=True))


@pytest.mark.parametrize(("name", "key"), [("rmu", "positions"), ("npo with KL", "kl_positions")])
def test_all_positions_of_a_packed_batch_are_the_unpadded_ones(toy, files, models, name, key):
    every, unpadded = ({**OBJECTIVES[name], key: which} for which in ("all", "unpadded"))
    assert make(every).needs.depends_on_micro_batch(packing=False)
    assert not make(every).needs.depends_on_micro_batch(packing=True)
    assert not make(unpadded).needs.depends_on_micro_batch(packing=False)
    for source in ("mixed", "text"):  # and not those of the placeholder
        steps = [gradients(toy, files, models, options, True, source=source) for options in (every, unpadded)]
        assert_same_step(*steps)
    assert gradients(toy, files, models, every, False)[0] != steps[0][0]


@pytest.mark.parametrize(
    ("given", "begun", "others", "packed"),
    [
        ("auto", None, True, True),
        ("auto", None, False, False),
        ("auto", False, True, False),
        ("auto", True, True, True),
        ("true", False, True, True),  # the recipe's hash has refused it before
    ],
)
def test_all_ranks_and_all_starts_of_a_run_make_the_same_batches(toy, files, monkeypatch, given, begun, others, packed):
    """begun: what the run's manifest has; others: what another rank's GPU can do."""
    _, recipe, _ = feed_of(toy, files, OBJECTIVES["npo"], given)
    monkeypatch.setattr(check.runs, "manifest", lambda root: None if begun is None else {"packed": begun})
    monkeypatch.setattr(check, "everyones", lambda group, own: [own, others])
    assert check.agreed(recipe, load.processor(recipe.model), ONE).data.packing is packed


def test_auto_pads_where_a_gpu_would_compare_all_tokens_of_a_row(toy, files):
    """And packs where PyTorch's flash-attention has kernels: half precision."""
    _, recipe, _ = feed_of(toy, files, OBJECTIVES["npo"], "auto")
    planned = {
        dtype: load.resolved(recipe.model, recipe.data, dtype, load.processor(recipe.model), planned=True).packing
        for dtype in ("fp32", "bf16")
    }
    assert planned == {"fp32": False, "bf16": True}
    assert load.resolved(recipe.model, recipe.data, "fp32", load.processor(recipe.model)).packing  # on this CPU
