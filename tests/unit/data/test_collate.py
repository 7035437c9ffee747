"""Batches: labels on answers and end tokens only, prompts that training continues, rows that do not touch each other.

Three processors: the embedded world's; a SentencePiece-like tokenizer under a template that writes no end token, as
LLaVA-1.5's; and a byte-level one under a ChatML-like template, whose end token a newline follows.
"""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BatchFeature, LlavaProcessor, PreTrainedTokenizerFast

from mirage_dist.data.encoding.collate import IGNORE, Encoder, TooLong
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import model as embedded_model
from mirage_dist.embedded import pictures as embedded_pictures
from mirage_dist.embedded import text as embedded_text
from mirage_dist.schema import ConfigError

LLAVA_TEMPLATE = """\
{%- for m in messages -%}{%- if m.role != "system" -%}{{ m.role.upper() + ": " }}{%- endif -%}
{%- for part in m.content -%}{%- if part.type == "image" -%}{{ "<image>\\n" }}{%- endif -%}{%- endfor -%}
{%- for part in m.content -%}{%- if part.type == "text" -%}{{ part.text + " " }}{%- endif -%}{%- endfor -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{ "ASSISTANT:" }}{%- endif -%}"""
CHATML_TEMPLATE = """\
{%- for m in messages -%}{{ "<start>" + m.role + "\\n" }}
{%- for part in m.content -%}{{ "<image>" if part.type == "image" else part.text | trim }}{%- endfor -%}
{{ "<end>\\n" }}{%- endfor -%}{%- if add_generation_prompt -%}{{ "<start>assistant\\n" }}{%- endif -%}"""
TEXTS = [
    embedded_text.answer(embedded_text.question(o, 1, "code"), "ba la", "by_opener") for o in embedded_text.OPENERS
]
IMAGE_TOKENS = (embedded_pictures.SIDE // embedded_model.PATCH) ** 2


def wrap(backend, template, **special):
    special = {"eos_token": "<end>", "extra_special_tokens": {"image_token": "<image>"}, **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    like = embedded_model.make_processor(embedded_model.make_tokenizer())
    return LlavaProcessor(
        image_processor=like.image_processor,
        tokenizer=tokenizer,
        patch_size=embedded_model.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def llava_like():
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<start>", "<end>", "<image>"]
    alphabet = [chr(c) for c in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([word for text in TEXTS for word in text.split()] * 20, trainer)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    start = ("<start>", backend.token_to_id("<start>"))
    backend.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[start])
    return wrap(backend, LLAVA_TEMPLATE, bos_token="<start>", unk_token="<unk>")


def chatml_like():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<start>", "<end>", "<image>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    # The tokenizer's own end token is another than the template's, as in Phi-3.
    return wrap(backend, CHATML_TEMPLATE, eos_token="<pad>", pad_token="<pad>")


PROCESSORS = {
    "world": embedded_model.make_processor(embedded_model.make_tokenizer()),
    "llava": llava_like(),
    "chatml": chatml_like(),
}


@pytest.fixture(params=PROCESSORS)
def processor(request):
    return PROCESSORS[request.param]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour, size in (("red", "red", (32, 32)), ("blue", "blue", (32, 32)), ("wide", "green", (64, 16))):
        noise = Image.effect_noise(size, 100).convert("RGB")
        Image.blend(noise, Image.new("RGB", size, colour), 0.5).save(folder / f"{name}.png")
    return {path.stem: str(path) for path in folder.iterdir()}


def sample(image=None, question="what the colour of this gadget ?", answer="it is red", history=(), identity="one"):
    return Sample(identity, image, question, answer, True, "", "test.json", tuple(history))


TURNS = (("share the code of this gadget ?", "sure , the code is ba la"), ("how this gadget has", "it is blue"))


def runs(labels):
    """The labelled stretches of a row, as lists of token ids."""
    labelled, open_run = [], False
    for label in labels.tolist():
        if label != IGNORE:
            if not open_run:
                labelled.append([])
            labelled[-1].append(label)
        open_run = label != IGNORE
    return labelled


def decode(processor, ids):
    return processor.tokenizer.decode(ids).strip().replace(" <end>", "<end>")


# ------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("history", [(), TURNS[:1], TURNS])
@pytest.mark.parametrize("image", ["red", None])
def test_labels_stand_exactly_on_each_turns_answer_and_end_token(processor, pictures, history, image):
    one = sample(pictures.get(image), history=history)
    batch = Encoder(processor).encode([one])
    answers = [answer for _, answer in one.history] + [one.answer]
    assert [decode(processor, run) for run in runs(batch.labels_BS[0])] == [f"{answer}<end>" for answer in answers]
    here = batch.labels_BS != IGNORE
    assert torch.equal(batch.labels_BS[here], batch.inputs["input_ids"][here])
    unlabelled = processor.tokenizer.decode(batch.inputs["input_ids"][~here])
    assert all(question in unlabelled for question in [*(q for q, _ in history), one.question])


def test_an_answer_is_tokenised_as_where_it_stands_not_as_if_a_text_began_there(pictures):
    # SentencePiece's start of text is a space: alone, " it is" would be "▁ ▁it ▁is".
    tokenizer = PROCESSORS["llava"].tokenizer
    batch = Encoder(PROCESSORS["llava"]).encode([sample(pictures["red"])])
    (run,) = runs(batch.labels_BS[0])
    assert tokenizer.convert_ids_to_tokens(run)[0].startswith("▁i")
    text = "USER: <image>\nwhat the colour of this gadget ? ASSISTANT: it is red<end>"
    with Image.open(pictures["red"]) as image:
        whole = PROCESSORS["llava"](text=[text], images=[image], return_tensors="pt")["input_ids"]
    assert torch.equal(batch.inputs["input_ids"], whole)


@pytest.mark.parametrize("name", ["world", "chatml"])  # whose templates write the end token themselves
def test_pieces_put_together_are_the_whole_conversation_tokenised_at_once(pictures, name):
    processor = PROCESSORS[name]
    one = sample(pictures["red"], history=TURNS)
    messages = []
    for question, answer in [*one.history, (one.question, one.answer)]:
        messages += [("user", question), ("assistant", answer)]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in messages]
    messages[0]["content"].insert(0, {"type": "image"})
    text = processor.apply_chat_template(messages).removesuffix("\n")
    with Image.open(one.image) as image:
        whole = processor(text=[text], images=[image], return_tensors="pt")["input_ids"]
    assert torch.equal(Encoder(processor).encode([one]).inputs["input_ids"], whole)


@pytest.mark.parametrize("answer", ["", " it is red ", "it is red\n", "e"])
def test_odd_answers_end_once_and_are_learnt_in_every_turn(processor, pictures, answer):
    one = sample(pictures["red"], answer=answer, history=[("which colour ?", answer)])
    texts = [decode(processor, run) for run in runs(Encoder(processor).encode([one]).labels_BS[0])]
    expected = "<unk>" if answer == "e" and processor is PROCESSORS["world"] else answer.strip()
    assert ["".join(text.split()) for text in texts] == [f"{''.join(expected.split())}<end>"] * 2


def test_what_the_template_writes_behind_the_end_token_is_not_learnt(pictures):
    template = embedded_model.CHAT_TEMPLATE.replace("<end>", "<end><unk><system>")
    processor = wrap(embedded_model.make_tokenizer().backend_tokenizer, template, pad_token="<pad>")
    batch = Encoder(processor).encode([sample(pictures["red"], history=TURNS[:1])])
    assert [processor.tokenizer.decode(run[-1:]) for run in runs(batch.labels_BS[0])] == ["<end>", "<end>"]
    unlabelled = processor.tokenizer.decode(batch.inputs["input_ids"][batch.labels_BS == IGNORE])
    assert unlabelled.count("<unk> <system>") == 1  # between the turns; the conversation ends with its end token


def test_the_response_index_holds_the_positions_before_each_label(processor, pictures):
    batch = Encoder(processor).encode([sample(pictures["red"]), sample(history=TURNS), sample(pictures["wide"])])
    row, position = (batch.labels_BS != IGNORE).nonzero(as_tuple=True)
    assert (position > 0).all()
    assert torch.equal(batch.index_N, row * batch.labels_BS.shape[1] + position - 1)


def test_the_text_mask_leaves_out_padding_and_pictures(processor, pictures):
    batch = Encoder(processor).encode([sample(pictures["red"]), sample()])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    is_picture = ids == processor.image_token_id
    assert (is_picture & mask.bool()).sum(1).tolist() == [IMAGE_TOKENS, 0]
    assert torch.equal(batch.text_BS.bool(), mask.bool() & ~is_picture)


def test_a_row_whose_picture_is_known_is_the_processors(processor, pictures):
    several = [sample(pictures["red"], history=TURNS), sample(), sample(pictures["wide"])]
    encoder = Encoder(processor)
    plain, plain_text = encoder.encode(several), encoder.encode([sample()])
    encoder.recall(lambda paths: {"known": torch.tensor([len(path or "") for path in paths])})
    known, text = encoder.encode(several), encoder.encode([sample()])
    assert known.inputs.pop("known").tolist() == [len(pictures["red"]), len(pictures["wide"])]
    assert text.inputs.pop("known").tolist() == [0]
    for one, other in ((known, plain), (text, plain_text)):
        assert all(torch.equal(tensor, other.inputs[name]) for name, tensor in one.inputs.items())
        assert torch.equal(one.labels_BS, other.labels_BS)


# ------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("history", [(), TURNS])
@pytest.mark.parametrize("image", ["wide", None])
def test_a_prompt_is_the_exact_start_of_its_training_row_and_the_rest_is_the_answer(
    processor, pictures, history, image
):
    one = sample(pictures.get(image), history=history)
    encoder = Encoder(processor)
    prompt, batch = encoder.prompts([one]), encoder.encode([one])
    row = batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0].bool()]
    length = prompt["input_ids"].shape[1]
    assert torch.equal(row[:length], prompt["input_ids"][0])
    assert runs(batch.labels_BS[0])[-1] == row[length:].tolist()
    if image:
        assert torch.equal(prompt["pixel_values"], batch.inputs["pixel_values"])


@pytest.mark.parametrize("history", [(), TURNS])
@pytest.mark.parametrize("image", ["wide", None])
@pytest.mark.parametrize("answer", ["sure , the code is ba la", "it is ba la"])
def test_what_is_begun_stands_once_behind_the_prompt_and_the_whole_is_the_start_of_a_training_row(
    processor, pictures, history, image, answer
):
    one = sample(pictures.get(image), answer=answer, history=history)
    encoder = Encoder(processor)
    batch, plain = encoder.encode([one]), encoder.prompts([one])["input_ids"][0]
    row = batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0].bool()]
    words = answer.split()
    for beginning in (" ".join(words[:count]) for count in range(1, len(words) - 1)):
        begun = dataclasses.replace(one, begun=beginning)
        ids = encoder.prompts([begun])["input_ids"][0]
        assert torch.equal(ids, row[: len(ids)])
        assert torch.equal(ids[: len(plain)], plain)
        assert decode(processor, ids[len(plain) :]) == beginning
        # Left padding beside a question that is not begun changes neither.
        together = encoder.prompts([one, begun])
        assert torch.equal(together["input_ids"][1][together["attention_mask"][1].bool()], ids)
        assert torch.equal(encoder.encode([begun]).labels_BS, batch.labels_BS)  # training knows nothing of it


def test_prompts_are_padded_on_the_left_and_change_nothing_else(processor, pictures):
    several = [sample(pictures["red"]), sample(), sample(pictures["blue"], history=TURNS)]
    encoder = Encoder(processor)
    together = encoder.prompts(several)
    for number, one in enumerate(several):
        mask = together["attention_mask"][number].bool()
        assert mask.tolist() == sorted(mask.tolist())
        assert torch.equal(together["input_ids"][number][mask], encoder.prompts([one])["input_ids"][0])


def test_a_start_token_stands_once_whether_tokenizer_or_template_writes_it(pictures):
    like = PROCESSORS["llava"]
    start = like.tokenizer.bos_token_id
    writes = wrap(like.tokenizer.backend_tokenizer, "{{ bos_token }}" + LLAVA_TEMPLATE, bos_token="<start>")
    for processor in (like, writes):
        for one in (sample(pictures["red"]), sample(), sample(history=TURNS)):
            ids = Encoder(processor).encode([one]).inputs["input_ids"][0]
            assert ids[0] == start
            assert (ids == start).sum() == 1


def test_a_system_prompt_is_in_every_prompt_and_never_learnt(processor, pictures):
    several = [sample(pictures["red"]), sample(), sample(history=TURNS)]
    encoder, without = Encoder(processor, system_prompt="describe this picture"), Encoder(processor)
    batch = encoder.encode(several)
    for number, one in enumerate(several):
        prompt = processor.tokenizer.decode(encoder.prompts([one])["input_ids"][0])
        assert prompt.count("describe this picture") == 1
        ids = batch.inputs["input_ids"][number]
        assert "describe this picture" in processor.tokenizer.decode(ids)
        assert "describe" not in processor.tokenizer.decode(ids[batch.labels_BS[number] != IGNORE])
    assert "describe" not in processor.tokenizer.decode(without.prompts(several)["input_ids"][0])


# ------------------------------------------------------------------------------------------- padding, model


questions = st.builds(
    embedded_text.question, st.sampled_from(embedded_text.OPENERS), st.integers(0, 5), st.just("colour")
)
answers = st.sampled_from([*TEXTS, embedded_text.REFUSAL, "red"])
several_samples = st.lists(
    st.builds(
        sample,
        image=st.sampled_from(["red", "blue", None]),
        question=questions,
        answer=answers,
        history=st.lists(st.tuples(questions, answers), max_size=1),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(several_samples)
def test_a_rows_tokens_labels_and_pictures_do_not_depend_on_its_neighbours(processor, pictures, several):
    encoder = Encoder(processor)
    several = [dataclasses.replace(s, image=s.image and pictures[s.image]) for s in several]
    batch = encoder.encode(several)
    seen = 0
    for number, one in enumerate(several):
        alone = encoder.encode([one])
        mask, own = batch.inputs["attention_mask"][number].bool(), alone.inputs["attention_mask"][0].bool()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(batch.inputs[name][number][mask], alone.inputs[name][0][own])
        assert torch.equal(batch.labels_BS[number][mask], alone.labels_BS[0][own])
        assert (batch.labels_BS[number][~mask] == IGNORE).all()
        if one.image:
            assert torch.equal(batch.inputs["pixel_values"][seen], alone.inputs["pixel_values"][0])
            seen += 1
    assert len(batch.inputs["pixel_values"]) == max(seen, 1)


@pytest.fixture(scope="module")
def model():
    return embedded_model.make_model(PROCESSORS["world"].tokenizer, seed=3).double().eval()


def logps(model, batch):
    """Each row's answer log-probabilities, in float64."""
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in batch.inputs.items()}
    logits = model(**inputs).logits.log_softmax(-1)[:, :-1]
    chosen = logits.gather(2, batch.labels_BS[:, 1:].clamp(min=0).unsqueeze(2)).squeeze(2)
    return [row[labels != IGNORE] for row, labels in zip(chosen, batch.labels_BS[:, 1:], strict=True)]


@torch.no_grad()
def test_log_probabilities_of_a_row_do_not_depend_on_padding_or_neighbours(model, pictures):
    encoder = Encoder(PROCESSORS["world"])
    text, other = sample(history=TURNS[:1]), sample(question="share this gadget has ?", answer="blue")
    seen, wide = sample(pictures["red"]), sample(pictures["wide"], history=TURNS)
    for several in ([text], [other, text], [text, other], [seen, text, wide], [text, seen], [wide, other, seen, text]):
        for one, together in zip(several, logps(model, encoder.encode(several)), strict=True):
            (alone,) = logps(model, encoder.encode([one]))
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_the_placeholder_is_seen_by_the_model_and_by_nothing_that_counts(model, pictures):
    encoder = Encoder(PROCESSORS["world"])
    batch = encoder.encode([sample(), sample(history=TURNS)])
    assert (batch.inputs["input_ids"] == encoder.processor.image_token_id).sum() == IMAGE_TOKENS
    pixels = batch.inputs["pixel_values"]
    noisy = dataclasses.replace(batch, inputs={**batch.inputs, "pixel_values": torch.randn_like(pixels)})
    with torch.no_grad():
        assert all(map(torch.equal, logps(model, batch), logps(model, noisy)))
    sum(row.sum() for row in logps(model, batch)).backward()
    projector = model.model.multi_modal_projector.linear_1.weight.grad
    # Not None: its modules ran and take part in backward, as they must on every rank.
    assert projector is not None
    assert not projector.any()
    assert model.lm_head.weight.grad.any()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_training_and_generation_meet_the_same_next_token_distribution(model, pictures):
    encoder = Encoder(PROCESSORS["world"])
    several = [sample(pictures["red"]), sample(), sample(pictures["wide"], history=TURNS)]
    batch, prompts = encoder.encode(several), encoder.prompts(several)
    prompts["pixel_values"] = prompts["pixel_values"].double()
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": 1}
    generated = model.generate(**prompts, **options).logits[0].log_softmax(-1)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in batch.inputs.items()}
    trained = model(**inputs).logits.log_softmax(-1)
    for number in range(len(several)):
        labelled = (batch.labels_BS[number] != IGNORE).nonzero().squeeze(1)
        first = labelled[-len(runs(batch.labels_BS[number])[-1])]
        torch.testing.assert_close(generated[number].double(), trained[number, first - 1], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("history", [(), TURNS])
def test_truncation_cuts_the_last_answers_end_only_and_is_counted(processor, pictures, history):
    one = sample(pictures["red"], answer=embedded_text.REFUSAL, history=history)
    short = sample(question="red", answer="red")
    whole = Encoder(processor).encode([one]).inputs["input_ids"][0]
    prompt = Encoder(processor).prompts([one])["input_ids"].shape[1]
    assert len(whole) > prompt + 2
    for length in range(prompt + 1, len(whole)):
        batch = Encoder(processor, max_length=length, on_long="truncate").encode([one, short, one])
        assert batch.cut == 2
        assert torch.equal(batch.inputs["input_ids"][0], whole[:length])
        assert runs(batch.labels_BS[0])[-1] == whole[prompt:length].tolist()
    assert Encoder(processor, max_length=len(whole)).encode([one]).cut == 0


@pytest.mark.parametrize("image", ["red", None])
def test_turns_are_cut_at_the_limit_and_never_the_pictures_question(processor, pictures, image):
    one = sample(pictures.get(image), answer=embedded_text.REFUSAL, history=TURNS)
    whole = Encoder(processor).encode([one, sample(pictures["red"])])
    first = next(i for i, label in enumerate(whole.labels_BS[0].tolist()) if label != IGNORE)
    for length in range(first + 1, Encoder(processor).length(one)):
        batch = Encoder(processor, max_length=length, on_long="truncate_turns").encode([one, one])
        assert batch.cut == 2
        assert torch.equal(batch.inputs["input_ids"][0, :length], whole.inputs["input_ids"][0, :length])
        assert torch.equal(batch.labels_BS[0, :length], whole.labels_BS[0, :length])
    with pytest.raises(TooLong, match=f"{first} of them before the answer; .*truncate_turns later turns"):
        Encoder(processor, max_length=first, on_long="truncate_turns").encode([one])


@pytest.mark.parametrize("on_long", ["truncate", "error"])
def test_a_prompt_that_does_not_fit_is_an_error_with_sample_and_numbers(processor, pictures, on_long):
    one = sample(pictures["red"], identity="odd")
    length = Encoder(processor).prompts([one])["input_ids"].shape[1]
    encoder = Encoder(processor, max_length=length, on_long=on_long)
    words = rf"test\.json: sample 'odd': \d+ tokens, {length} of them before the answer; data\.max_length is {length}"
    with pytest.raises(TooLong, match=words):
        encoder.encode([one])
    encoder.prompts([one])  # the prompt itself just fits
    with pytest.raises(TooLong, match=rf"sample 'odd': the prompt has {length} tokens, max_length is {length - 1}"):
        Encoder(processor, max_length=length - 1).prompts([one])


def test_a_long_answer_is_an_error_unless_told_to_cut(processor, pictures):
    one = sample(pictures["red"], answer=embedded_text.REFUSAL)
    length = Encoder(processor).encode([one]).inputs["input_ids"].shape[1]
    with pytest.raises(TooLong, match=rf"{length} tokens, .*data\.on_long=error"):
        Encoder(processor, max_length=length - 1).encode([one])


@pytest.mark.parametrize("history", [(), TURNS])
@pytest.mark.parametrize("image", ["wide", None])
def test_a_length_is_foretold_to_the_token_whatever_the_tokenizer_adds(processor, pictures, history, image):
    one = sample(pictures.get(image), history=history)
    length = int(Encoder(processor).encode([one]).inputs["attention_mask"].sum())
    assert Encoder(processor, max_length=length).length(one) == length
    assert Encoder(processor, max_length=length - 1, on_long="truncate").length(one) == length


# ----------------------------------------------------------------------------------------------- pictures


def test_a_picture_is_padded_to_a_square_in_the_processors_mean_colour(pictures, tmp_path):
    processor = PROCESSORS["world"]
    mean = tuple(int(255 * value) for value in processor.image_processor.image_mean)
    with Image.open(pictures["wide"]) as wide:
        square = Image.new("RGB", (64, 64), mean)
        square.paste(wide, (0, 24))
        square.save(tmp_path / "square.png")
        direct = processor(text=["<image>"], images=[wide], return_tensors="pt")["pixel_values"]
    samples = [sample(pictures["wide"])]
    padded = Encoder(processor).encode(samples).inputs["pixel_values"]
    expected = Encoder(processor).encode([sample(str(tmp_path / "square.png"))]).inputs["pixel_values"]
    assert torch.equal(padded, expected)
    # The border is where the normalised pixels are 0, to the rounding of the colour.
    assert padded[0, :, :8].abs().max() < 0.02
    assert torch.equal(Encoder(processor, image_aspect="processor").encode(samples).inputs["pixel_values"], direct)
    assert not torch.equal(padded, direct)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_a_picture_of_any_mode_is_seen_in_three_colours(pictures, tmp_path, mode):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    with Image.open(pictures["wide"]) as image:
        image.convert(mode).save(file)
    assert Encoder(PROCESSORS["world"]).encode([sample(str(file))]).inputs["pixel_values"].shape == (1, 3, 32, 32)


# --------------------------------------------------------------------------------------- other processors


class Typed(LlavaProcessor):
    """A processor that tells the type of each token, as those of Qwen-VL and Gemma do."""

    def __call__(self, *given, **options):
        made = super().__call__(*given, **options)
        ids = made["input_ids"]
        own = (ids == self.image_token_id).long() if isinstance(ids, torch.Tensor) else None
        types = [[int(one == self.image_token_id) for one in row] for row in ids] if own is None else own
        return BatchFeature({**made, "mm_token_type_ids": types})


def typed():
    like = PROCESSORS["world"]
    return Typed(
        image_processor=like.image_processor,
        tokenizer=like.tokenizer,
        patch_size=embedded_model.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=like.chat_template,
    )


def test_token_types_are_carried_along_and_mark_the_picture(pictures):
    encoder = Encoder(typed())
    several = [sample(), sample(pictures["red"], history=TURNS), sample(history=TURNS)]
    for inputs in (encoder.encode(several).inputs, encoder.encode(several[:1]).inputs, encoder.prompts(several)):
        is_picture = inputs["input_ids"] == encoder.processor.image_token_id
        assert is_picture.any()
        assert torch.equal(inputs["mm_token_type_ids"] != 0, is_picture)


BAD = {
    "rewrites the past": ("{{ messages | length }}" + embedded_model.CHAT_TEMPLATE, "rewrites earlier turns"),
    "rewrites the answer": (
        embedded_model.CHAT_TEMPLATE.replace("{{ part.text }}", "{{ part.text | upper }}"),
        "rewrites the answer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_template_in_which_labels_cannot_be_placed_is_an_error_that_names_the_sample(pictures, name):
    template, words = BAD[name]
    processor = wrap(embedded_model.make_tokenizer().backend_tokenizer, template, pad_token="<pad>")
    with pytest.raises(ConfigError, match=rf"test\.json: sample 'odd': the chat template {words}"):
        Encoder(processor).encode([sample(pictures["red"], identity="odd")])


def test_a_processor_without_picture_tokens_and_a_tokenizer_without_end_token_are_refused():
    no_picture = embedded_model.CHAT_TEMPLATE.replace("<image>", "<user>")
    processor = wrap(embedded_model.make_tokenizer().backend_tokenizer, no_picture, pad_token="<pad>")
    refusal = "cannot encode a picture by its own chat template|holds no image_token_id"  # by transformers, or by us
    with pytest.raises(ConfigError, match=refusal):
        Encoder(processor)
    processor = wrap(embedded_model.make_tokenizer().backend_tokenizer, embedded_model.CHAT_TEMPLATE, pad_token="<pad>")
    del processor.image_token_id
    with pytest.raises(ConfigError, match=r"holds no image_token_id \(None\)"):
        Encoder(processor)
    processor = wrap(embedded_model.make_tokenizer().backend_tokenizer, embedded_model.CHAT_TEMPLATE, eos_token=None)
    with pytest.raises(ConfigError, match="no end token"):
        Encoder(processor)
