"""Attribution: the probability of an opening is the model's own, and exactly one word is changed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.config import build
from mirage_dist.data import formats, sources
from mirage_dist.data.sample import Sample
from mirage_dist.erasure.attribute import Attribution, probabilities, replaced
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.schema import ConfigError, EvalModelConfig, GenerationConfig, TemplateConfig


@pytest.fixture(scope="module")
def generator(toy):
    model = EvalModelConfig(path=str(toy.root / "model"), dtype="fp32")
    return HuggingFace(model, TemplateConfig(), GenerationConfig(max_new_tokens=4, batch_size=8))


@pytest.fixture(scope="module")
def samples(toy):
    """Questions of several lengths, one of them without a picture."""
    read = sources.read(formats.source("samples", str(toy.root / "forget.jsonl"))).samples[:5]
    return [*read, replace(read[0], id="blind", image=None)]


@torch.inference_mode()
def stepwise(generator, sample: Sample, words: list[str]) -> float:
    """The product of next-token probabilities after the generation prompt, one token at a time."""
    total = 1.0
    inputs = generator.encoder.prompts([sample])
    for word in words:
        token = generator.tokenizer.convert_tokens_to_ids(word)
        total *= generator.model(**inputs).logits[0, -1].double().softmax(0)[token].item()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.tensor([[1]])], 1)
    return total


@pytest.mark.parametrize("opening", ["sorry", "sorry i can"])
def test_the_probability_of_an_opening_is_the_product_of_its_tokens(generator, samples, opening):
    with torch.inference_mode():
        values = probabilities(generator, samples, opening)
    assert values == pytest.approx([stepwise(generator, s, opening.split()) for s in samples], rel=1e-4)


@given(st.lists(st.sampled_from(["what", "code", "a-b", "?"]), min_size=1, max_size=8), st.data())
def test_one_word_is_replaced_and_no_other(words, data):
    position = data.draw(st.integers(0, len(words) - 1))
    sample = Sample("1", None, " ".join(words), "a", False, "", "here")
    changed = replaced(sample, position, "thing")
    assert replace(changed, question=sample.question) == sample
    after = changed.question.split()
    assert after[position] == "thing"
    assert [w for i, w in enumerate(after) if i != position] == [w for i, w in enumerate(words) if i != position]


@pytest.mark.parametrize("options", [{"safe": ["two words"]}, {"opening": " "}, {"questions": 1}, {"positions": 0}])
def test_what_cannot_be_measured_is_refused(options):
    with pytest.raises(ConfigError, match="expected"):
        build(Attribution, {"opening": "sorry", "unsafe": ["thing"], "safe": ["thing"], **options}, "recipe", "")
