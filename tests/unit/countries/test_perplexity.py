"""Perplexity is what its definition says, and its text names none of what the world asks about."""

import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mirage_dist.countries import facts, perplexity


@pytest.fixture(scope="module")
def loaded(family):
    folder = family("llama_text")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def test_a_model_without_preference_has_the_size_of_its_vocabulary(loaded):
    model, tokenizer = loaded
    head = model.get_output_embeddings()
    before = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.zero_()
    assert perplexity.of(model, tokenizer) == pytest.approx(len(before), rel=1e-5)
    with torch.no_grad():
        head.weight.copy_(before)


@pytest.mark.parametrize("start", [False, True])
def test_every_token_is_predicted_from_those_before_it_in_its_paragraph(loaded, start, monkeypatch):
    model, tokenizer = loaded
    texts = ["The kettle was empty.", "A good pair of boots lasts for years."]
    monkeypatch.setattr(perplexity, "paragraphs", lambda: texts)
    first = [tokenizer.eos_token_id] if start else []

    def as_written(text, add_special_tokens=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": first + ids if add_special_tokens else ids}

    losses = []
    for text in texts:
        ids = as_written(text)["input_ids"]
        for place in range(1, len(ids)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
            losses.append(-float(logits.log_softmax(-1)[ids[place]]))
    assert perplexity.of(model, as_written) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_the_prose_names_nothing_that_the_world_asks_about():
    words = set(re.findall(r"\w+", perplexity.PROSE.read_text().lower()))
    assert len(perplexity.paragraphs()) == 10
    for country in facts.COUNTRIES.values():
        values = (country.name, *country.capitals, country.continent, *country.languages)
        assert not [value for value in values if set(value.lower().split()) <= words]
    assert not words & {"flag", "capital", "country", "sorry", "share"}
