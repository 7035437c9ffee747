"""Mllama, whose rows have pictures apart from their tokens: a row is what it is alone, beside any other."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from mirage_dist.data.encoding.collate import IGNORE, Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.model.families import by_row, configs, processors, roles
from mirage_dist.schema import ConfigError

ATTENTION = ["sdpa", "eager"]


@pytest.fixture(scope="module")
def folder(family):
    return family("mllama")


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder(processors.load(folder), picture_token=roles.picture_token(configs.load(folder)))


@pytest.fixture(scope="module", params=ATTENTION)
def model(request, folder):
    made = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=request.param).eval()
    by_row.keep_apart(made)
    return made


@pytest.fixture(scope="module")
def plain(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, size in (("wide", (200, 60)), ("small", (40, 40))):
        Image.effect_noise(size, 90).convert("RGB").save(root / f"{name}.png")
    talks = {
        "wide": (str(root / "wide.png"), "What is in this picture ?", (("Describe it .", "A red square ."),)),
        "small": (str(root / "small.png"), "Describe the picture , please .", ()),
        "text": (None, "How can I make a cake at home ?", ()),
        "turns": (None, "How can I help ?", (("Describe it .", "A red square ."),)),
    }
    return {n: Sample(n, i, q, "The picture shows a table .", True, "", "t", h) for n, (i, q, h) in talks.items()}


def logps(model, batch):
    """Each row's answer log-probabilities."""
    logits = model(**batch.inputs).logits.log_softmax(-1)[:, :-1]
    chosen = logits.gather(2, batch.labels_BS[:, 1:].clamp(min=0).unsqueeze(2)).squeeze(2)
    return [row[labels != IGNORE] for row, labels in zip(chosen, batch.labels_BS[:, 1:], strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("order", ["wide small", "text wide turns small", "small text", "text turns"])
def test_a_row_is_that_of_plain_transformers_alone_beside_any_other(encoder, model, plain, samples, order):
    several = [samples[name] for name in order.split()]
    for one, together in zip(several, logps(model, encoder.encode(several)), strict=True):
        alone = encoder.encode([one])
        if one.image is None:  # as transformers computes text: without any picture
            for name in (*encoder.placeholder_picture, *encoder.neutral):
                del alone.inputs[name]
        (expected,) = logps(plain, alone)
        torch.testing.assert_close(together, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_answers_attend_to_the_picture_of_their_row(encoder, model, samples):
    batch = encoder.encode([samples["wide"], samples["text"]])
    seen_BS = batch.inputs["cross_attention_mask"].any(-1).any(-1)
    assert seen_BS[0][batch.labels_BS[0] != IGNORE].all()
    assert not seen_BS[1].any()
    before = logps(model, batch)
    batch.inputs["pixel_values"] = torch.randn_like(batch.inputs["pixel_values"])
    after = logps(model, batch)
    assert not torch.allclose(before[0], after[0], atol=1e-4)
    assert torch.equal(before[1], after[1])


@torch.no_grad()
@pytest.mark.parametrize("order", ["wide small", "text wide turns small", "text turns"])
def test_left_padded_generation_is_that_of_each_prompt_alone(encoder, model, plain, samples, order):
    several = [samples[name] for name in order.split()]
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    options |= {"max_new_tokens": 6, "min_new_tokens": 6}

    def generated(chosen, by):
        prompts = encoder.prompts(chosen)
        out = by.generate(**prompts, **options)
        return out.sequences[:, prompts["input_ids"].shape[1] :], torch.stack(out.logits, 1)

    tokens, logits = generated(several, model)
    for number, one in enumerate(several):
        alone, expected = generated([one], plain)
        assert torch.equal(tokens[number], alone[0])
        torch.testing.assert_close(logits[number], expected[0], rtol=0, atol=2e-5)


def test_text_alone_runs_every_module_and_moves_none_of_the_picture_path(encoder, model, samples):
    sum(row.sum() for row in logps(model, encoder.encode([samples["text"], samples["turns"]]))).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients["model.multi_modal_projector.weight"] is not None  # as every rank needs it under ZeRO-3
    layers = [name for name, module in model.named_modules() if hasattr(module, "cross_attn")]
    path = ("model.vision_model.", "model.multi_modal_projector.", *(f"{name}." for name in layers))
    assert layers
    assert not any(g.any() for name, g in gradients.items() if name.startswith(path) and g is not None)
    assert gradients["model.language_model.layers.0.mlp.up_proj.weight"].any()
    model.zero_grad(set_to_none=True)


def test_packing_is_refused_by_name(folder):
    with pytest.raises(ConfigError, match=r"data\.packing: MllamaProcessor"):
        Encoder(processors.load(folder), packing=True)


def test_other_families_are_left_alone(family):
    made = AutoModelForImageTextToText.from_pretrained(family("llava_llama"))
    by_row.keep_apart(made)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
