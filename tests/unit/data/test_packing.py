"""Packing moves no number: log-probabilities and gradients of the packed row are those of padded rows.

Under sdpa and eager attention transformers masks by `position_ids`. `segments` stands for flash-attention, which cannot
run here: an attention of its own that knows of the sequences by the borders alone, as flash-attention does.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AttentionInterface

from mirage_dist.data.encoding.collate import IGNORE, Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import model as embedded_model
from mirage_dist.embedded import pictures as embedded_pictures

PROCESSOR = embedded_model.make_processor(embedded_model.make_tokenizer())
IMAGE_TOKENS = (embedded_pictures.SIDE // embedded_model.PATCH) ** 2
ATTENTION = ["sdpa", "eager", "segments"]


def segments(module, query, key, value, mask, scaling, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **_):
    assert mask is None
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    sizes = cu_seq_lens_q.diff().tolist()
    assert max_length_q == max_length_k == max(sizes)
    parts = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    out = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scaling) for part in parts]
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register("segments", segments)


@pytest.fixture(autouse=True)
def _softmax_in_float64(monkeypatch):
    """The eager path would take its softmax in float32, whose rounding hides what packing might change."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))


@pytest.fixture(scope="module")
def model():
    return embedded_model.make_model(PROCESSOR.tokenizer, seed=3).double().eval()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(3)  # Image.effect_noise would depend on the tests that ran before
    for colour in ("red", "blue"):
        grey = np.clip(generator.normal(128, 100, (32, 32)), 0, 255).astype(np.uint8)
        noise = Image.fromarray(grey).convert("RGB")
        Image.blend(noise, Image.new("RGB", (32, 32), colour), 0.5).save(folder / f"{colour}.png")
    red, blue = str(folder / "red.png"), str(folder / "blue.png")
    turns = (("share the code of this gadget ?", "sure , the code is ba la"), ("how this gadget has", "it is blue"))
    talks = {
        "red": (red, "what the colour of this gadget ?", "it is red"),
        "blue": (blue, "red", "sure , the code is ba la and the colour is blue"),
        "turns": (blue, "what the colour ?", "it is red", turns),
        "text": (None, "share this gadget has ?", "blue"),
        "short": (None, "", "red"),
        "text turns": (None, "what the colour of this gadget ?", "it is", turns[:1]),
    }
    return {name: Sample(name, i, q, a, True, "", "t", *history) for name, (i, q, a, *history) in talks.items()}


BATCHES = [
    ["red", "text", "turns"],
    ["text", "blue", "short", "red"],
    ["text turns", "text"],
    ["short"],
    ["turns", "text turns", "red", "blue", "text", "short"],
]


def logps(model, batch, attention="sdpa"):
    """Every labelled token's log-probability in float64, in batch order."""
    model.model.language_model.config._attn_implementation = attention
    inputs = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in batch.inputs.items()}
    logits_RV = model(**inputs, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    labels_N = batch.labels_BS.flatten()[batch.index_N + 1]
    return logits_RV[batch.index_N].gather(1, labels_N.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("names", BATCHES, ids=", ".join)
def test_packing_changes_no_log_probability_and_no_gradient(model, samples, names, attention):
    several = [samples[name] for name in names]
    padded, packed = Encoder(PROCESSOR).encode(several), Encoder(PROCESSOR, packing=True).encode(several)
    assert torch.equal(packed.segment_N, padded.segment_N)
    results = []
    for batch, kind in ((padded, "sdpa"), (packed, attention)):
        logp_N = logps(model, batch, kind)
        (logp_N * torch.linspace(0.5, 1, len(logp_N))).sum().backward()  # each token by a weight of its own
        results.append((logp_N.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("names", BATCHES, ids=", ".join)
def test_a_packed_row_holds_the_padded_rows_tokens_and_no_padding(samples, names):
    several = [samples[name] for name in names]
    padded, packed = Encoder(PROCESSOR).encode(several), Encoder(PROCESSOR, packing=True).encode(several)
    hidden = 0 if any(one.image for one in several) else IMAGE_TOKENS
    assert packed.edges[0] == 0
    assert packed.edges[-1] == packed.labels_BS.numel() == int(padded.unpadded_BS.sum()) + hidden
    assert packed.unpadded_BS.sum() == padded.unpadded_BS.sum()
    for number in range(len(several)):
        row, length = slice(*packed.edges[number : number + 2]), int(padded.unpadded_BS[number].sum())
        for name in ("labels_BS", "text_BS"):
            assert torch.equal(getattr(packed, name)[0, row], getattr(padded, name)[number, :length])
        assert torch.equal(packed.inputs["input_ids"][0, row], padded.inputs["input_ids"][number, :length])
        assert packed.inputs["position_ids"][0, row].tolist() == list(range(length))
    assert "attention_mask" not in packed.inputs  # with one, transformers takes the row for a single sequence


@pytest.mark.parametrize("attention", ATTENTION)
def test_the_placeholder_is_seen_by_the_model_and_by_nothing_that_counts(model, samples, attention):
    batch = Encoder(PROCESSOR, packing=True).encode([samples["text"], samples["text turns"]])
    noise = torch.randn_like(batch.inputs["pixel_values"])
    noisy = dataclasses.replace(batch, inputs={**batch.inputs, "pixel_values": noise})
    with torch.no_grad():
        assert torch.equal(logps(model, batch, attention), logps(model, noisy, attention))
    logps(model, batch, attention).sum().backward()
    projector = model.model.multi_modal_projector.linear_1.weight.grad
    assert projector is not None  # its modules ran and take part in backward, as they must on every rank
    assert not projector.any()
    model.zero_grad(set_to_none=True)


def test_a_first_token_is_nobodys_to_predict_even_where_it_is_an_answers(samples):
    """A template that writes nothing for a question: the row begins with the answer."""
    processor = embedded_model.make_processor(embedded_model.make_tokenizer())
    template = "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% elif m.role =="
    processor.chat_template = template + " 'assistant' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
    several = [samples["text"], samples["short"], samples["text"]]
    padded, packed = Encoder(processor).encode(several), Encoder(processor, packing=True).encode(several)
    assert all(packed.labels_BS[0, start] != IGNORE for start in packed.edges[:3])
    assert torch.equal(packed.segment_N, padded.segment_N)
    assert not set((packed.index_N + 1).tolist()) & set(packed.edges)
