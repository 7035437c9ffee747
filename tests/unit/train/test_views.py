"""Views at several layers are the outputs of whole forwards, whatever the forwards narrow, share or leave out."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import Engine
from transformers import AutoModelForImageTextToText

from mirage_dist import config as configs
from mirage_dist.model import load, trainable
from mirage_dist.model.policy import HeadedModel
from mirage_dist.model.reference import Frozen
from mirage_dist.objectives.base import Needs
from mirage_dist.ranks import Group
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.feed import Feed, positions, read_streams
from mirage_dist.train.views import Views

ALONE = Group(0, 0, 1, torch.device("cpu"))
LAYERS = (1, 2)
BOTH = ("forget", "retain")
# What trains -> the layer from which the reference starts with the policy's own input; None for a forward of its own.
TRAINED = {"*": None, "*language_model.layers.1.*": 1, "*language_model.layers.2.*": None}
NEEDS = {
    "with a head": Needs(BOTH, logp=("retain",), activation=BOTH, ref_activation=("retain",), layers=LAYERS),
    "without a head": Needs(BOTH, activation=BOTH, ref_activation=("retain",), layers=LAYERS),
    "of forget": Needs(BOTH, logp=("retain",), activation=("forget",), ref_activation=("forget",), layers=LAYERS),
}


def whole(policy, inputs):
    """Outputs of the layers, and the logits, of a forward through everything."""
    outputs = {}
    handles = [
        policy.backbone.language_model.layers[layer].register_forward_hook(
            lambda _module, _arguments, output, layer=layer: outputs.update({layer: output})
        )
        for layer in LAYERS
    ]
    with torch.no_grad():
        logits = policy.hf(**inputs).logits
    for handle in handles:
        handle.remove()
    return outputs, logits


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize("pattern", TRAINED)
def test_activations_by_layer_are_those_of_whole_forwards(toy, tmp_path, name, pattern):
    needs = NEEDS[name]
    given = [*toy.overrides("npo", tmp_path / "run"), "train.global_batch=4", "train.micro_batch=4"]
    recipe = configs.load("configs/train/demo_npo.yaml", given, TrainRecipe)
    hf = AutoModelForImageTextToText.from_pretrained(toy.root / "model")
    base, generator = HeadedModel(copy.deepcopy(hf)), torch.Generator().manual_seed(0)
    trainable.choose(hf, [pattern], [])
    policy = HeadedModel(hf)
    with torch.no_grad():  # only what trains may differ from the reference
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    feed = Feed(recipe, needs, read_streams(recipe, replace(needs, unlearned=())), load.processor(recipe.model))
    (micro,) = feed.window(0, ALONE)
    views = Views(Engine(policy), needs, Frozen(Engine(base)))
    assert views.share == TRAINED[pattern]
    made = views(micro)

    outputs, logits = whole(policy, micro.batch.inputs)
    ref_outputs, _ = whole(base, micro.batch.inputs)
    for stream in BOTH:
        view, rows = made[stream], micro.rows[stream]
        assert set(view.activations_BSD) == (set(LAYERS) if stream in needs.activation else set())
        assert set(view.ref_activations_BSD) == (set(LAYERS) if stream in needs.ref_activation else set())
        for layer, values_BSD in view.activations_BSD.items():
            torch.testing.assert_close(values_BSD, outputs[layer][rows], atol=1e-5, rtol=1e-5)
        for layer, values_BSD in view.ref_activations_BSD.items():
            torch.testing.assert_close(values_BSD, ref_outputs[layer][rows], atol=1e-5, rtol=1e-5)
    if needs.logp:
        labels = micro.batch.labels_BS[micro.rows["retain"], 1:]
        logp = logits[micro.rows["retain"], :-1].log_softmax(-1)
        expected = logp.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)[labels != -100]
        torch.testing.assert_close(made["retain"].logp_N, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["response", "all", "unpadded", "text"])
def test_kl_is_that_of_whole_logits_at_the_positions_that_count(toy, tmp_path, which):
    """At all of them it is open-unlearning's `compute_kl_divergence`: kl_div with `batchmean` over B · S rows."""
    needs = Needs(BOTH, logp=("forget",), kl=("retain",), kl_positions=which)
    given = [*toy.overrides("npo", tmp_path / "run"), "train.global_batch=4", "train.micro_batch=4"]
    recipe = configs.load("configs/train/demo_npo.yaml", given, TrainRecipe)
    policy, base = (HeadedModel(AutoModelForImageTextToText.from_pretrained(toy.root / "model")) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    feed = Feed(recipe, needs, read_streams(recipe, needs), load.processor(recipe.model))
    (micro,) = feed.window(0, ALONE)
    view = Views(Engine(policy), needs, Frozen(Engine(base)))(micro)["retain"]
    rows = micro.rows["retain"]
    with torch.no_grad():
        own, other = (model.hf(**micro.batch.inputs).logits[rows].log_softmax(-1) for model in (policy, base))
    if which == "response":
        marks = torch.nn.functional.pad(micro.batch.labels_BS[rows, 1:] != -100, (0, 1))
    else:
        marks = positions(micro.batch, which)[rows].bool()
    expected = torch.nn.functional.kl_div(own[marks], other[marks], reduction="batchmean", log_target=True)
    count = micro.counts["retain.kl_positions"]
    assert count == marks.sum()
    torch.testing.assert_close(view.kl_M.sum() / count, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kl", [(), ("retain",)])
def test_distilled_rows_are_those_of_whole_logits_beside_kl_and_log_probabilities(toy, tmp_path, packing, kl):
    """As `compute_undial_loss` of open-unlearning at the response tokens, whose teacher is the reference."""
    needs = Needs(BOTH, logp=("forget",), kl=kl, kl_positions="unpadded", distil=("forget",), penalty=6.0)
    given = [*toy.overrides("npo", tmp_path / "run"), "train.global_batch=4", "train.micro_batch=4"]
    recipe = configs.load("configs/train/demo_npo.yaml", [*given, f"data.packing={packing}"], TrainRecipe)
    policy, base = (HeadedModel(AutoModelForImageTextToText.from_pretrained(toy.root / "model")) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    processor = load.processor(recipe.model)
    feed = Feed(recipe, needs, read_streams(recipe, needs), processor)
    made = Views(Engine(policy), needs, Frozen(Engine(base)))(feed.window(0, ALONE)[0])
    padded = Feed(
        replace(recipe, data=replace(recipe.data, packing=False)), needs, read_streams(recipe, needs), processor
    )
    (micro,) = padded.window(0, ALONE)
    with torch.no_grad():
        own, other = (model.hf(**micro.batch.inputs).logits for model in (policy, base))
    rows = micro.rows["forget"]
    labels = micro.batch.labels_BS[rows, 1:]
    kept = labels != -100
    onehot = torch.nn.functional.one_hot(labels[kept], own.shape[-1])
    soft = (other[rows, :-1][kept] - 6.0 * onehot).softmax(-1)
    logp = own[rows, :-1][kept].log_softmax(-1)
    torch.testing.assert_close(made["forget"].distilled_N, -(soft * logp).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made["forget"].logp_N, (onehot * logp).sum(-1), atol=1e-5, rtol=1e-5)
    assert made["retain"].distilled_N is None
    if kl:
        marks, rows = micro.batch.unpadded_BS[micro.rows["retain"]].bool(), micro.rows["retain"]
        logp, ref = own[rows][marks].log_softmax(-1), other[rows][marks].log_softmax(-1)
        torch.testing.assert_close(made["retain"].kl_M, (ref.exp() * (ref - logp)).sum(-1), atol=1e-5, rtol=1e-4)
