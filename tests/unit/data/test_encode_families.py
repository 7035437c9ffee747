"""Every family's processor makes the same kind of rows: labels, prompts, lengths, batches; no weights are read."""

import re
from functools import cache

import pytest
import torch
from families import models
from families.vocabularies import byte_level
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mirage_dist.data.encoding.collate import IGNORE, Encoder
from mirage_dist.data.encoding.pictured import Pictured
from mirage_dist.data.sample import Sample
from mirage_dist.model.families import configs, processors, roles
from mirage_dist.schema import ConfigError

NAMES = [name for name in models.FAMILIES if name != "paligemma"]  # which has no template
PICTURED = [name for name in NAMES if not name.endswith("_text")]
TURNS = (("Describe the picture , please .", "It shows a red square ."),)
SIZES = {"wide": (200, 120), "tall": (60, 170), "small": (40, 40)}


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")

    @cache
    def make(name, **options):
        folder = root / name
        if not folder.exists():
            models.write_files(name, folder)
        return Encoder(processors.load(folder), picture_token=roles.picture_token(configs.load(folder)), **options)

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in SIZES.items():
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in SIZES}


def sample(image=None, answer="The picture shows a table .", history=(), begun=""):
    question = "What is in this picture ?"
    return Sample("one", image, question, answer, True, "", "t.json", tuple(history), (), begun)


def rows_of(batch):
    """Each row's tokens and labels without padding."""
    mask_BS = batch.inputs["attention_mask"].bool()
    every = zip(batch.inputs["input_ids"], batch.labels_BS, mask_BS, strict=True)
    return [(ids[mask].tolist(), labels[mask].tolist()) for ids, labels, mask in every]


def labelled(labels):
    runs, before = [], IGNORE
    for label in labels:
        if label != IGNORE:
            runs += [[]] if before == IGNORE else []
            runs[-1].append(label)
        before = label
    return runs


@pytest.mark.parametrize("history", [(), TURNS], ids=["one turn", "two turns"])
@pytest.mark.parametrize("name", NAMES)
def test_labels_are_each_answer_and_its_end_token(encoder_of, pictures, name, history):
    encoder = encoder_of(name)
    one = sample(None if encoder.text_only else pictures["wide"], history=history)
    (row,) = rows_of(encoder.encode([one]))
    answers = [answer for _, answer in (*history, (one.question, one.answer))]
    runs = labelled(row[1])
    assert [encoder.tokenizer.decode(run[:-1]).strip() for run in runs] == answers
    # The end token is the family's own: one at which its generation ends, or the tokenizer's.
    ends = {encoder.tokenizer.eos_token, *models.FAMILIES[name].ends}
    assert {encoder.tokenizer.convert_ids_to_tokens(run[-1]) for run in runs} <= ends


@pytest.mark.parametrize("history", [(), TURNS], ids=["one turn", "two turns"])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_starts_its_training_row_and_ends_with_the_generation_prompt(encoder_of, pictures, name, history):
    encoder = encoder_of(name)
    one = sample(None if encoder.text_only else pictures["wide"], history=history)
    begun = sample(one.image, history=history, begun="The picture")
    (row, labels), ids = rows_of(encoder.encode([one]))[0], encoder.prompts([one])["input_ids"][0].tolist()
    assert row[: len(ids)] == ids
    assert row[len(ids) :] == labelled(labels)[-1]
    generation = encoder.conversation.text(one.image is not None, [], one.question)[-12:]
    assert "".join(encoder.tokenizer.decode(ids).split()).endswith("".join(generation.split()))
    started = encoder.prompts([begun])["input_ids"][0].tolist()
    assert row[: len(started)] == started
    assert encoder.tokenizer.decode(started[len(ids) :]).strip() == "The picture"


@pytest.mark.parametrize("name", PICTURED)
def test_rows_of_a_batch_are_those_of_each_sample_alone(encoder_of, pictures, name):
    encoder = encoder_of(name)
    several = [sample(pictures["wide"]), sample(history=TURNS), sample(pictures["small"], history=TURNS)]
    together, prompts = encoder.encode(several), encoder.prompts(several)
    for number, one in enumerate(several):
        alone, prompt = encoder.encode([one]), encoder.prompts([one])
        own = alone.inputs["attention_mask"][0].bool()
        mask, left = together.inputs["attention_mask"][number].bool(), prompts["attention_mask"][number].bool()
        for values in ("input_ids", *encoder.neutral):
            assert torch.equal(together.inputs[values][number][mask], alone.inputs[values][0][own])
            if values in prompt:
                assert torch.equal(prompts[values][number][left], prompt[values][0])
            assert not together.inputs[values][number][~mask].any() or values == "input_ids"
    assert all(isinstance(value, torch.Tensor) for value in together.inputs.values())


@pytest.mark.parametrize("name", PICTURED)
def test_text_alone_shows_the_model_one_hidden_picture(encoder_of, name):
    encoder = encoder_of(name)
    batch = encoder.encode([sample(), sample(history=TURNS)])
    assert set(encoder.placeholder_picture) <= set(batch.inputs)
    assert not batch.text_BS[batch.inputs["input_ids"] == encoder.picture_token].any()
    assert (batch.labels_BS[batch.unpadded_BS == 0] == IGNORE).all()
    assert not set(encoder.placeholder_picture) & set(encoder.prompts([sample()]))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["llama_text", "qwen3_text"])
def test_a_text_only_model_trains_on_text_alone(encoder_of, name, packing):
    encoder = encoder_of(name, packing=packing)
    batch = encoder.encode([sample(), sample(history=TURNS)])
    assert set(batch.inputs) - {"position_ids", "attention_mask"} - {n for n in batch.inputs if "_q" in n or "_k" in n}
    assert torch.equal(batch.text_BS, batch.unpadded_BS)
    assert len(batch.labels_N) == sum(
        len(run)
        for one in (sample(), sample(history=TURNS))
        for run in labelled(rows_of(encoder_of(name).encode([one]))[0][1])
    )
    with pytest.raises(ConfigError, match="text-only model cannot answer questions about pictures"):
        encoder.encode([sample("a.png")])


# ------------------------------------------------------------------------------------------------ lengths


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(20, 420), st.integers(20, 420), st.sampled_from(["auto", "pad", "processor"]))
@pytest.mark.parametrize("name", PICTURED)
def test_a_length_is_the_encoded_rows_for_a_picture_of_any_size(
    encoder_of, tmp_path_factory, name, width, height, aspect
):
    encoder = encoder_of(name, image_aspect=aspect)
    path = str(tmp_path_factory.mktemp("sized") / "x.png")
    Image.new("RGB", (width, height), "red").save(path)
    one = sample(path, history=TURNS)
    (row,) = rows_of(encoder.encode([one]))
    assert encoder.length(one) == sum(encoder.sizes(one)) == len(row[0])
    # A row for a picture that is known already is the processor's, too.
    first = encoder.conversation.pieces(one, answered=False)[0]
    assert encoder.pictured.known_row(first, path)["input_ids"] == row[0][: encoder.sizes(one)[0]]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_a_turned_picture_is_as_long_as_it_is_encoded(encoder_of, tmp_path, suffix):
    encoder, path = encoder_of("qwen2_vl"), tmp_path / f"x.{suffix}"
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by 90 degrees
    Image.new("RGB", (300, 40), "red").save(path, exif=turned)
    one = sample(str(path))
    assert encoder.length(one) == len(rows_of(encoder.encode([one]))[0][0])


def test_what_cannot_be_measured_names_sample_and_file(encoder_of, tmp_path):
    encoder, file = encoder_of("qwen2_vl"), tmp_path / "x.png"
    with pytest.raises(ConfigError, match=r"t\.json: sample 'one': .*x\.png: no such file"):
        encoder.length(sample(str(file)))
    Image.new("RGB", (1, 2000)).save(file)  # more than the family's 200 times as high as wide
    for measure in (encoder.length, lambda one: encoder.encode([one, one])):
        with pytest.raises(ConfigError, match=r"t\.json: sample 'one': .*aspect ratio"):
            measure(sample(str(file)))


# ------------------------------------------------------------------------------------- aspect, options, outputs


@pytest.mark.parametrize("name", PICTURED)
def test_only_a_processor_that_cuts_pictures_off_gets_them_padded(encoder_of, name):
    assert encoder_of(name).image_aspect == ("pad" if name in ("llava_llama", "llava_mistral") else "processor")
    assert encoder_of(name, image_aspect="pad").image_aspect == "pad"


THINKING = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}
{% if m.role == "assistant" and loop.last -%}<think>

</think>

{% endif -%}{{ m.content }}<|im_end|>
{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}<think>

</think>

{% endif -%}{%- endif -%}"""


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_an_empty_block_of_thoughts_is_part_of_the_prompt_or_left_out(encoder_of, tmp_path, options):
    models.write_files("qwen3_text", tmp_path / "model")
    processor = processors.load(tmp_path / "model")
    processor.chat_template = THINKING
    encoder = Encoder(processor, template_options=options)
    one = sample(history=(*TURNS, *TURNS))
    ((ids, labels),) = rows_of(encoder.encode([one]))
    texts = [processor.decode(run) for run in labelled(labels)]
    assert texts == [f"{answer}<|im_end|>" for answer in [TURNS[0][1]] * 2 + [one.answer]]
    assert processor.decode(ids).count("<think>\n\n</think>\n\n") == (3 if options else 0)
    assert ids[: len(encoder.prompts([one])["input_ids"][0])] == encoder.prompts([one])["input_ids"][0].tolist()


def test_an_option_that_the_template_does_not_have_is_an_error_that_names_those_it_has(tmp_path):
    models.write_files("qwen3_text", tmp_path / "model")
    processor = processors.load(tmp_path / "model")
    processor.chat_template = THINKING
    with pytest.raises(ConfigError, match=r"template_options: .* no option enable_thought; it has enable_thinking"):
        Encoder(processor, template_options={"enable_thought": False})
    with pytest.raises(ConfigError, match="no option messages"):
        Encoder(processor, template_options={"messages": []})


ODD = {
    "a mask of all pairs": (lambda ids: {"pairs": torch.ones(1, ids.shape[1], ids.shape[1])}, "'pairs' of shape"),
    "positions": (lambda ids: {"position_ids": torch.arange(ids.shape[1])[None]}, "'position_ids' whose values"),
    "places of pictures": (lambda ids: {"ends": torch.tensor([[ids.shape[1]]])}, "'ends' whose values depend"),
    "a list": (lambda ids: {"num_crops": [1]}, "'num_crops' as list, which is no tensor"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_output_that_cannot_be_continued_with_an_answer_is_refused_by_name(encoder_of, monkeypatch, name):
    more, words = ODD[name]
    made = Pictured._outputs
    monkeypatch.setattr(Pictured, "_outputs", lambda *a: (out := made(*a)) | more(out["input_ids"]))
    like = encoder_of("llava_llama")
    with pytest.raises(ConfigError, match=f"LlavaProcessor returns {re.escape(words)}"):
        Encoder(like.processor)


def test_a_processor_that_takes_no_lists_of_pictures_gets_none(pictures):
    """GOT-OCR 2's, which refuses several pictures for one text."""
    from transformers import GotOcr2Processor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer = byte_level(["<|end|>", "<imgpad>", "<img>", "</img>"], {}, eos_token="<|end|>", pad_token="<|end|>")
    processor = GotOcr2Processor(GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    processor.chat_template = (
        "{% for m in messages %}{% for p in m.content %}{{ '<img><imgpad></img>' if p.type == 'image' else p.text }}"
        "{% endfor %}{{ '<|end|>' }}{% endfor %}"
    )
    encoder = Encoder(processor, picture_token=tokenizer.convert_tokens_to_ids("<imgpad>"))
    batch = encoder.encode([sample(pictures["wide"]), sample(), sample(pictures["small"])])
    assert len(batch.inputs["pixel_values"]) == 2
    assert (batch.labels_BS != IGNORE).any(1).all()


def test_a_directory_without_a_template_is_refused(tmp_path):
    models.write_files("paligemma", tmp_path / "model")
    with pytest.raises(ConfigError, match="chat template"):
        Encoder(processors.load(tmp_path / "model"))
