"""What RMU reads in a shortened model, or in a forward that stops, is what the whole model has at that layer."""

import pytest
import torch
from families.parts import LAYERS
from PIL import Image
from transformers import AutoConfig, Gemma3nTextConfig

from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.model import load
from mirage_dist.model.families import roles, truncation
from mirage_dist.model.policy import Request
from mirage_dist.schema import ModelConfig

LAYER = 1
FAMILIES = ["gemma3", "idefics3", "internvl", "llava_llama", "llava_mistral", "llava_next", "llava_onevision"]
FAMILIES += ["llama_text", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_text", "qwen3_vl"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """One with a picture, one of text, both with other lengths."""
    file = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (40, 30), "red").save(file)
    shown = Sample("1", str(file), "What is this ?", "A red square .", True, "", "x")
    return [shown, Sample("2", None, "Why ?", "It is red .", True, "", "x")]


def encoded(model, samples):
    processor = load.processor(model)
    encoder = Encoder(processor, picture_token=load.picture_token(model))
    return encoder.encode(samples[1:] if encoder.text_only else samples)


def policy(model, depth=None):
    return load.policy(model, "fp32", {}, depth).eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_tap_is_the_whole_models_hidden_state(name, family, samples):
    model = ModelConfig(path=str(family(name)))
    batch, whole, outputs = encoded(model, samples), policy(model), []
    assert whole.depth > LAYER + 1
    assert whole.hidden_size == roles.decoder(whole.base).config.hidden_size
    layer = roles.decoder(whole.base).layers[LAYER]
    handle = layer.register_forward_hook(lambda *given: outputs.append(given[2]))
    whole.base(**batch.inputs, use_cache=False)
    handle.remove()
    expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    request = Request(layers=(LAYER,))
    for shorter in (whole, policy(model, LAYER + 1)):
        assert torch.equal(shorter(batch.inputs, request).activations_BSD[LAYER], expected)
    ran = set()
    for number, module in enumerate(roles.decoder(whole.base).layers):
        module.register_forward_hook(lambda *_, number=number: ran.add(number))
    whole(batch.inputs, request)
    assert ran == set(range(LAYER + 1))


@pytest.mark.parametrize("name", ["llava_llama", "qwen3_vl", "gemma3", "mllama", "qwen3_text"])
def test_a_family_whose_first_layers_do_not_depend_on_their_number_is_shortened(name, family):
    config = AutoConfig.from_pretrained(family(name))
    shorter = truncation.truncated(config, 2)
    assert shorter.get_text_config().num_hidden_layers == 2
    assert config.get_text_config().num_hidden_layers == LAYERS


def test_a_family_whose_layers_are_counted_from_the_end_stays_whole():
    """Gemma 3n's last layers take keys and values of earlier ones: in a shorter model other layers would."""
    config = Gemma3nTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3,
        activation_sparsity_pattern=[0.0] * 6,
    )
    assert truncation.truncated(config, 4) is config
    assert truncation.truncated(config, 6) is config
