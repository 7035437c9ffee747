"""Log-probabilities and greedy flags of answers: those of the model's own forward on each answer alone, in float64."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from mirage_dist.data import formats, sources
from mirage_dist.data.sample import Sample
from mirage_dist.erasure.scoring import likelihood
from mirage_dist.erasure.scoring.likelihood import Likelihood
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.schema import EvalModelConfig, GenerationConfig, RunError, TemplateConfig


def scorer(folder, batch_size: int = 8) -> Likelihood:
    model = EvalModelConfig(path=str(folder), dtype="fp32")
    generation = GenerationConfig(max_new_tokens=4, batch_size=batch_size)
    return Likelihood(HuggingFace(model, TemplateConfig(), generation))


@pytest.fixture(scope="module")
def toy_scorer(toy) -> Likelihood:
    return scorer(toy.root / "model")


@pytest.fixture(scope="module")
def mixed(toy) -> list[Sample]:
    """Pictured and text-only rows, answers of one word to nine, and one with an earlier turn."""
    read = sources.read(formats.source("samples", str(toy.root / "forget.jsonl"))).samples[:5]
    blind = replace(read[1], id="blind", image=None)
    turns = replace(read[2], id="turns", history=(("what the colour of this gadget ?", "it is red"),))
    word, long = replace(read[3], id="word", answer="ba"), replace(read[4], id="long", answer="it is red " * 3)
    return [read[0], blind, word, turns, replace(blind, id="blind 2", answer="sure"), long, *read[1:3]]


@torch.inference_mode()
def alone(network, generator, sample: Sample) -> tuple[list[float], list[bool]]:
    """One answer's tokens, put after the generation prompt word by word: one row, without batch or padding."""
    words = [*sample.answer.split(), generator.tokenizer.eos_token]
    tokens_T = torch.tensor(generator.tokenizer.convert_tokens_to_ids(words))
    inputs = generator.encoder.prompts([replace(sample, answer="")])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens_T[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits_SV = network(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}).logits[0]
    logp_TV = logits_SV[-len(words) - 1 : -1].log_softmax(1)
    return logp_TV.gather(1, tokens_T[:, None])[:, 0].tolist(), (logp_TV.argmax(1) == tokens_T).tolist()


def test_a_batch_of_pictured_and_text_only_rows_has_the_values_of_each_alone_in_float64(toy, toy_scorer, mixed):
    own = scorer(toy.root / "model").generator
    network = own.model.double()
    answers = toy_scorer(mixed)
    assert len(answers) == len(mixed)
    for sample, answer in zip(mixed, answers, strict=True):
        logps, greedy = alone(network, own, sample)
        assert len(answer.logps) == len(sample.answer.split()) + 1  # the end token counts
        assert answer.logps == pytest.approx(logps, rel=1e-4, abs=1e-4)
        assert answer.greedy == greedy


def test_the_batch_size_and_what_stands_beside_an_answer_change_nothing(toy, toy_scorer, mixed, monkeypatch):
    together = toy_scorer(mixed)
    monkeypatch.setattr(likelihood, "LOGITS_MB", 0)  # logits of one row at a time
    for size in (1, 3):
        apart = scorer(toy.root / "model", size)(mixed[::-1])[::-1]
        for one, other in zip(together, apart, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-4)
            assert one.greedy == other.greedy


def test_the_generator_answers_as_before(toy, toy_scorer, mixed):
    model = EvalModelConfig(path=str(toy.root / "model"), dtype="fp32")
    plain = HuggingFace(model, TemplateConfig(), GenerationConfig(max_new_tokens=4, batch_size=8))
    assert toy_scorer.generator.answer(mixed) == plain.answer(mixed)


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "gemma3", "paligemma_templated", "mllama", "llama_text"])
def test_every_family_gives_the_log_probabilities_of_its_own_forward(family, name, tmp_path):
    """Those of `forward` with its own head, soft cap included, on rows one at a time."""
    made = scorer(family(name), 4)
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "a.png")
    picture = None if made.generator.encoder.text_only else str(tmp_path / "a.png")
    questions = [(picture, "a red house"), (None, "yes"), (picture, "it is a thing that nobody knows"), (None, "no no")]
    samples = [Sample(str(i), p, "what is it ?", text, False, "", "here") for i, (p, text) in enumerate(questions)]
    for sample, answer in zip(samples, made(samples), strict=True):
        batch = made.generator.encoder.encode([sample])
        with torch.inference_mode():
            logits_SV = made.generator.model(**made.generator.placed(batch.inputs), use_cache=False).logits[0].double()
        logp_NV = logits_SV[batch.index_N].log_softmax(1)
        assert answer.logps == pytest.approx(logp_NV.gather(1, batch.labels_N[:, None])[:, 0].tolist(), abs=2e-4)
        assert answer.greedy == (logp_NV.argmax(1) == batch.labels_N).tolist()


def test_a_batch_that_does_not_fit_is_halved_and_no_answer_is_lost(toy_scorer, mixed, monkeypatch):
    expected = [answer.logps for answer in toy_scorer(mixed)]
    small, sizes = Likelihood.batch, []

    def narrow(self, samples):
        sizes.append(len(samples))
        if len(samples) > 3:
            raise RuntimeError("CUDA out of memory")
        return small(self, samples)

    monkeypatch.setattr(Likelihood, "batch", narrow)
    monkeypatch.setattr(toy_scorer.rows, "count", 8)
    made = toy_scorer(mixed)
    assert [answer.logps for answer in made] == [pytest.approx(logps, abs=1e-4) for logps in expected]
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_a_model_whose_logits_are_no_numbers_is_an_error_that_names_the_sample(toy, mixed):
    broken = scorer(toy.root / "model")
    with torch.no_grad():
        broken.generator.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(RunError, match=r"sample '.+': the model's logits are no finite numbers; choose model\.dtype"):
        broken(mixed[:2])
