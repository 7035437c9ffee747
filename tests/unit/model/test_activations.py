"""The forward that stops behind a layer: no layer too many, the full forward's values and gradients, nothing left."""

import pytest
import torch

from mirage_dist.embedded import model as embedded_model
from mirage_dist.model import activations
from mirage_dist.model.families import roles
from mirage_dist.schema import ConfigError

DEPTH = 4


@pytest.fixture(scope="module")
def model():
    return embedded_model.make_model(embedded_model.make_tokenizer(), seed=3).double()


@pytest.fixture
def inputs(model):
    """Two rows, the second one padded, each with a picture."""
    picture = [model.config.image_token_id] * model.config.image_seq_length
    ids = torch.tensor([[5, *picture, 9, 10, 11, 12], [5, *picture, 13, 14, 0, 0]])
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


@pytest.fixture
def ran(model):
    """Numbers of the decoder layers that have run since."""
    numbers = []
    layers = roles.decoder(model.model).layers
    handles = [
        layer.register_forward_hook(lambda *_, number=number: numbers.append(number))
        for number, layer in enumerate(layers)
    ]
    yield numbers
    for handle in handles:
        handle.remove()


def gradients(model, activation_BSD):
    """Of a sum that weighs every element differently."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, activation_BSD.numel(), dtype=torch.float64).reshape(activation_BSD.shape)
    (weights * activation_BSD).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer", range(DEPTH))
def test_a_forward_that_stops_runs_no_later_layer_and_gives_what_the_full_one_gives(model, inputs, ran, layer):
    outputs = []
    kept = roles.decoder(model.model).layers[layer].register_forward_hook(lambda *args: outputs.append(args[2]))
    model.model(**inputs, use_cache=False)
    kept.remove()
    assert ran == list(range(DEPTH))
    ran.clear()
    with activations.seeing(model.model, {layer}, layer + 1) as seen:
        model.model(**inputs, use_cache=False)
    assert ran == list(range(layer + 1))
    (whole,), mine = outputs, seen.outputs[layer]
    assert torch.equal(mine, whole)
    expected = gradients(model, whole)
    torch.testing.assert_close(gradients(model, mine), expected, rtol=1e-12, atol=0)
    assert any(f"layers.{layer}." in name for name in expected)
    assert not any(f"layers.{later}." in name for name in expected for later in range(layer + 1, DEPTH))


def test_without_a_depth_every_layer_runs(model, inputs, ran):
    with activations.seeing(model.model, {1, 2}) as seen:
        model.model(**inputs, use_cache=False)
    assert ran == list(range(DEPTH))
    assert torch.equal(seen.inputs[2][0], seen.outputs[1])


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_it_was_even_when_the_forward_failed(model, inputs, ran, fails):
    try:
        with activations.seeing(model.model, {1}, 2) as seen:
            assert len(roles.decoder(model.model).layers) == 2
            if fails:
                raise MemoryError
    except MemoryError:
        assert fails
    assert len(roles.decoder(model.model).layers) == DEPTH
    model.model(**inputs, use_cache=False)
    assert ran == list(range(DEPTH))
    assert seen.outputs == {}


def test_a_layer_that_is_not_there_is_named_with_those_that_are(model):
    activations.check_layer(model.model, DEPTH - 1)
    with pytest.raises(ConfigError, match=r"objective: layer=4: the model has decoder layers 0 to 3"):
        activations.check_layer(model.model, DEPTH)
