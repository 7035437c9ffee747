"""A family whose log-probabilities would be wrong is refused by name, from a small model of its classes."""

import copy

import pytest
import torch
from PIL import Image
from transformers import Gemma3TextConfig, GraniteConfig, LlamaConfig, LlamaForCausalLM

from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.model.families import configs, guard, processors, roles, small

RIGHT = ["gemma3", "idefics3", "internvl", "llava_llama", "llava_next", "llava_onevision", "llama_text"]
RIGHT += ["mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_text"]


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """Two samples of different lengths, with pictures of different shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    samples = []
    for name, size, answer in (("red", (40, 30), "A red square ."), ("blue", (64, 90), "A blue one on a table .")):
        Image.new("RGB", size, name).save(folder / f"{name}.png")
        samples.append(Sample(name, str(folder / f"{name}.png"), f"What is {name} ?", answer, True, "", "x"))
    return samples


TEXT = [
    Sample("1", None, "Why ?", "It is red .", True, "", "x"),
    Sample("2", None, "Who is it ?", "A dog .", True, "", "x"),
]


def encoder(folder, config):
    return Encoder(processors.load(folder), picture_token=roles.picture_token(config))


def fault(folder, pictured, wrap=lambda encoder: encoder):
    config = configs.load(folder)
    own = wrap(encoder(folder, config))
    return guard.fault(config, own, [] if own.text_only else pictured, TEXT)


@pytest.mark.parametrize("name", RIGHT)
def test_a_family_that_is_right_passes(name, family, pictured):
    assert fault(family(name), pictured) is None


def test_prefix_attention_is_refused_by_name(family, pictured):
    """PaliGemma reads everything after the picture both ways unless token types mark the answer."""
    reason = fault(family("paligemma_templated"), pictured)
    assert reason.startswith("paligemma: answers see their own later tokens")


def test_the_next_family_with_such_attention_is_refused_too(family):
    """Gemma 3's text models have a switch for it, which no published one sets."""
    folder = family("llama_text")
    config = configs.load(folder)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    for both_ways in (False, True):
        own = Gemma3TextConfig(**sizes, use_bidirectional_attention=both_ways)
        reason = guard.fault(own, encoder(folder, config), [], TEXT)
        assert (reason is not None) == both_ways
    assert reason.startswith("gemma3_text: answers see their own later tokens")


class Unmasked(Encoder):
    """Prompts whose padding is not said to be padding."""

    def prompts(self, samples):
        tensors = super().prompts(samples)
        return {**tensors, "attention_mask": torch.ones_like(tensors["attention_mask"])}


class Swapped(Encoder):
    """The pictures of a batch in another order than its rows."""

    def encode(self, samples):
        batch = super().encode(samples)
        batch.inputs["pixel_values"] = batch.inputs["pixel_values"].flip(0)
        return batch


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Unmasked, "in generation, with prompts padded on the left, a row"),
        (Swapped, "a pictured batch a row's log-prob"),
    ],
)
def test_what_is_not_carried_by_row_is_refused(kind, words, family, pictured):
    def wrap(own):
        wrapped = copy.copy(own)
        wrapped.__class__ = kind
        return wrapped

    assert words in fault(family("llava_llama"), pictured, wrap=wrap)


def test_scaled_logits_pass(family):
    """Granite divides its logits by a constant; the loss head measures it."""
    folder = family("llama_text")
    config = configs.load(folder)
    scaled = GraniteConfig(**{**config.to_dict(), "model_type": "granite", "logits_scaling": 4.0})
    assert guard.fault(scaled, encoder(folder, config), [], TEXT) is None


def test_logits_that_the_loss_head_does_not_know_are_refused(family, monkeypatch):
    """Logits that a forward leaves below a bound, as no known family does."""
    folder = family("llama_text")
    own = LlamaForCausalLM.forward

    def bounded(self, *inputs, **options):
        outputs = own(self, *inputs, **options)
        outputs.logits = outputs.logits.clamp(max=0.5)
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", bounded)
    assert "differ from the loss head's" in fault(folder, [])


def test_a_batch_that_cannot_be_computed_is_a_sentence(family, pictured):
    """A processor that writes more picture tokens than the model has features for."""

    class Doubled(Encoder):
        def encode(self, samples):
            batch = super().encode(samples)
            batch.inputs["pixel_values"] = batch.inputs["pixel_values"][:1]
            return batch

    def wrap(own):
        own.__class__ = Doubled
        return own

    reason = fault(family("llava_llama"), pictured, wrap=wrap)
    assert reason.startswith("llava: a pictured batch cannot be computed: ValueError: Image features and image tokens")


def test_a_model_of_seven_billion_parameters_is_made_in_little_memory():
    config = LlamaConfig()
    hf = small.made(config, size="shallow")
    assert hf.config.hidden_size == 4096
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in hf.parameters()}
    assert sum(p.numel() for p in hf.parameters()) * 4 > 5 * sum(storages.values())
    assert sum(storages.values()) < 150 << 20
