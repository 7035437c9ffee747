"""Control tokens come from the chat template alone, whatever the data spell and however a tokenizer splits its text."""

import dataclasses
from functools import cache

import pytest
import torch
from families import models
from families.vocabularies import SENTENCES, byte_level, sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from mirage_dist.data.encoding.collate import IGNORE, Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.embedded import model as embedded_model
from mirage_dist.model.families import configs, processors, roles
from mirage_dist.schema import ConfigError

CHATML = """\
{%- for m in messages -%}{{ "<|im_start|>" ~ m.role ~ "\n" ~ m.content ~ "<|im_end|>\n" }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\n" }}{%- endif -%}"""
# DeepSeek-R1's way: its roles are added tokens that are not special, and a thought is no mark of a turn.
ROLES = """\
{%- for m in messages -%}
{%- if m.role == "user" -%}{{ "<｜User｜>" ~ m.content }}
{%- else -%}{{ "<｜Assistant｜>" ~ m.content ~ "<｜end｜>" }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{ "<｜Assistant｜>" }}{%- endif -%}"""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<unk>"]


def trained(backend, trainer, template=CHATML, eos="<|im_end|>", **tokens):
    backend.train_from_iterator([*SENTENCES, "user assistant system"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, **tokens)
    made.chat_template = template
    return made


def unigram():
    """T5's and ALBERT's kind: NFKC, and a vocabulary that has its control tokens as pieces of text."""
    backend = Tokenizer(kinds.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    alphabet = sorted({*"".join(SENTENCES), *"<|>_imstartend"})
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    return trained(backend, trainer, unk_token="<unk>")


def wordpiece():
    """BERT's kind: lower case, accents removed, and control tokens that are looked for in the normalised text."""
    backend = Tokenizer(kinds.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([AddedToken(mark, normalized=True) for mark in SPECIAL])
    return trained(
        backend,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
        unk_token="<unk>",
    )


def words():
    """The embedded world's kind, with a mark as a word of the vocabulary."""
    backend = Tokenizer(kinds.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return trained(backend, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False), unk_token="<unk>")


def roles_not_special():
    made = byte_level(["<｜begin｜>", "<｜end｜>"], eos_token="<｜end｜>", pad_token="<｜end｜>")
    made.add_tokens(
        [AddedToken(mark, special=False) for mark in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")]
    )
    made.chat_template = ROLES
    return made


def metaspace():
    made = sentencepiece(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ '[INST] ' ~ m.content ~ ' [/INST]' if m.role == 'user' else ' ' ~ m.content ~ "
        "'</s>' }}{% endfor %}"
    )
    return made


TOKENIZERS = {
    "byte-level": lambda: byte_level_chatml(),
    "sentencepiece": metaspace,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "words": words,
    "roles that are not special": roles_not_special,
}


def byte_level_chatml():
    made = byte_level(SPECIAL[:2], eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = CHATML
    return made


@cache
def text_encoder(name):
    return Encoder(TOKENIZERS[name]())


def marks_of(encoder):
    tokens = encoder.tokenizer.added_tokens_decoder
    return {i: t.content for i, t in tokens.items() if t.special or "｜" in t.content}


def controls(encoder, ids):
    """The control tokens in a row, in order; each picture's tokens count once."""
    marks = marks_of(encoder).keys() - {encoder.tokenizer.unk_token_id} | {encoder.picture_token}
    kept = [i for i in ids if i in marks]
    return [i for place, i in enumerate(kept) if i != encoder.picture_token or kept[place - 1 : place] != [i]]


def sample(question="What is it?", answer="A table.", history=(), image=None, begun="", shown=0):
    return Sample("odd", image, question, answer, True, "", "t.json", tuple(history), (), begun, shown)


def rows(encoder, one):
    batch = encoder.encode([one])
    mask = batch.inputs["attention_mask"][0].bool()
    return batch.inputs["input_ids"][0][mask].tolist(), batch.labels_BS[0][mask].tolist()


def spelling(encoder, draw, label):
    """A text made of the model's own marks, of look-alikes that a normaliser may turn into marks, and of words."""
    marks = list(marks_of(encoder).values())
    wide = [mark.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)}) for mark in marks]
    parts = [
        *marks,
        *wide,
        *map(str.upper, marks),
        "\ufdd0",
        "\ufdd00\ufdd1",
        "<",
        "|",
        ">",
        "What",
        "is it",
        "assistant",
        "\n",
        " ",
        "é",
        "</think>",
    ]
    return "x" + "".join(draw(st.lists(st.sampled_from(parts), max_size=6), label=label)) + "x"


@settings(max_examples=20, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_conversation_has_the_control_tokens_that_its_template_writes_and_no_others(name, data):
    encoder = text_encoder(name)
    question, answer, past, reply = (spelling(encoder, data.draw, label) for label in ("q", "a", "past", "reply"))
    one, plain = sample(question, answer, [(past, reply)]), sample(history=[("Who?", "Me.")])
    ids, labels = rows(encoder, one)
    assert controls(encoder, ids) == controls(encoder, rows(encoder, plain)[0])
    # One end token for each answer, and the answer is what was given, where the tokenizer keeps every text.
    runs = [label for label in labels if label != IGNORE]
    assert controls(encoder, runs) == controls(encoder, [label for label in rows(encoder, plain)[1] if label != IGNORE])
    if name in ("byte-level", "roles that are not special"):
        assert encoder.tokenizer.decode(ids).count(question) >= 1
        assert answer in encoder.tokenizer.decode(runs)
    prompt = encoder.prompts([one])["input_ids"][0].tolist()
    assert ids[: len(prompt)] == prompt
    assert encoder.length(one) == len(ids)
    begun = encoder.prompts([dataclasses.replace(one, begun=answer)])["input_ids"][0].tolist()
    assert controls(encoder, begun) == controls(encoder, prompt)
    assert encoder.prompt(one)[0] == prompt


@pytest.mark.parametrize("name", ["byte-level", "unigram", "words"])
def test_a_spelled_mark_is_encoded_as_the_tokenizer_encodes_words(name):
    """Not cut up in another way than any other word of these letters would be."""
    encoder = text_encoder(name)
    control = encoder.conversation.control
    shown = control.shielded("is it <|im_end|> or")
    ids = encoder.tokens.first(shown)
    backend = Tokenizer.from_str(encoder.tokenizer.backend_tokenizer.to_str())
    if name == "byte-level":  # whose model does not know the mark as a word
        backend.encode_special_tokens = True
        assert ids == backend.encode("is it <|im_end|> or").ids
    assert controls(encoder, ids) == []
    assert encoder.tokens.first("is it <|im_end|> or") == encoder.tokenizer("is it <|im_end|> or")["input_ids"]


def test_a_thought_in_an_answer_stays_the_models_own_token_and_a_role_does_not():
    encoder = text_encoder("roles that are not special")
    thought, role = encoder.tokenizer.convert_tokens_to_ids(["<think>", "<｜User｜>"])
    ids = rows(encoder, sample(answer="<think>So.</think>It is <｜User｜>."))[0]
    assert ids.count(thought) == 1
    assert ids.count(role) == 1


@pytest.mark.parametrize("name", ["words", "byte-level"])
def test_the_system_prompt_writes_no_control_token_either(name):
    spelled, plain = (
        Encoder(text_encoder(name).tokenizer, system_prompt=text) for text in ("Be <|im_end|> kind", "Be kind")
    )
    assert controls(spelled, rows(spelled, sample())[0]) == controls(plain, rows(plain, sample())[0])


class Slow(PreTrainedTokenizerFast):
    """A tokenizer that does not show its parts, as one written in Python."""

    @property
    def backend_tokenizer(self):
        raise AttributeError("backend_tokenizer")


def test_where_a_mark_cannot_be_encoded_as_text_the_sample_and_the_mark_are_named():
    whole = byte_level_chatml()
    slow = Slow(tokenizer_object=whole._tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    slow.chat_template = CHATML
    encoder = Encoder(slow)
    assert rows(encoder, sample())[0] == rows(text_encoder("byte-level"), sample())[0]
    for spelled in (sample("Say <|im_end|>."), sample(answer="<|im_end|>"), sample(history=[("<|im_end|>", "No.")])):
        for encode in (
            encoder.length,
            lambda one: encoder.encode([one]),
            lambda one: encoder.prompts([one]),
            encoder.prompt,
        ):
            if spelled.answer == "<|im_end|>" and encode not in (encoder.length,):
                continue
            with pytest.raises(
                ConfigError, match=r"t\.json: sample 'odd': a text spells '<\|im_end\|>', which is a control"
            ):
                encode(spelled)


# ------------------------------------------------------------------------------------- models with pictures

PICTURED = [name for name in models.FAMILIES if not name.startswith("paligemma") and not name.endswith("_text")]


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")

    @cache
    def make(name):
        if name == "world":
            return Encoder(embedded_model.make_processor(embedded_model.make_tokenizer()))
        models.write_files(name, root / name)
        config = configs.load(root / name)
        return Encoder(processors.load(root / name), picture_token=roles.picture_token(config))

    return make


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "x.png"
    Image.effect_noise((120, 80), 90).convert("RGB").save(file)
    return str(file)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("name", [*PICTURED, "world"])
def test_pictures_stand_where_the_template_shows_them_whatever_the_texts_spell(encoder_of, picture, name, data):
    encoder = encoder_of(name)
    spelled = [spelling(encoder, data.draw, label) for label in ("q", "a", "past", "reply")]
    one = sample(spelled[0], spelled[1], [(spelled[2], spelled[3])], picture)
    plain = sample(history=[("Who?", "Me.")], image=picture)
    ids = rows(encoder, one)[0]
    expected = rows(encoder, plain)[0]
    assert controls(encoder, ids) == controls(encoder, expected)
    assert ids.count(encoder.picture_token) == expected.count(encoder.picture_token)
    assert encoder.length(one) == len(ids)
    prompts = encoder.prompts([plain, one])
    shown = prompts["attention_mask"][1].bool()
    assert prompts["input_ids"][1][shown].tolist() == ids[: int(shown.sum())]
    pixels = {name: encoder.encode([one]).inputs[name] for name in encoder.placeholder_picture}
    assert all(torch.equal(pixels[name], encoder.encode([plain]).inputs[name]) for name in pixels)


def test_a_mark_beside_a_picture_is_refused_where_the_processor_writes_text_of_its_own_there(encoder_of, picture):
    """PaliGemma's, which puts its start token between the picture and the question."""
    encoder = encoder_of("paligemma_templated")
    plain = sample("What is x?", image=picture)
    for encode in (encoder.length, lambda one: encoder.encode([plain, one]), lambda one: encoder.prompts([one])):
        with pytest.raises(ConfigError, match=r"t\.json: sample 'odd': PaliGemmaProcessor .* spells a control token"):
            encode(sample("What is <eos>?", image=picture))


@pytest.mark.parametrize("name", PICTURED)
def test_a_picture_stands_in_the_turn_that_shows_it(encoder_of, picture, name):
    """As the processor alone encodes the whole conversation, with the labels of the answers before the picture, too."""
    encoder = encoder_of(name)
    past = [("Who are you?", "A model."), ("And where?", "Here.")]
    one = sample(history=past, image=picture, shown=1)
    if name == "mllama":  # whose template writes its dates at the start only if no picture follows
        with pytest.raises(ConfigError, match="sample 'odd': the chat template rewrites earlier turns"):
            encoder.length(one)
        return
    ids, labels = rows(encoder, one)
    runs = encoder.tokenizer.decode([label for label in labels if label != IGNORE])
    assert [text in runs for text in ("A model.", "Here.", "A table.")] == [True] * 3
    assert encoder.length(one) == len(ids)
    at = ids.index(encoder.picture_token)
    before, after = encoder.tokenizer.decode(ids[:at]), encoder.tokenizer.decode(ids[at:])
    assert ("A model." in before, "And where" in after, "And where" in before) == (True, True, False)
    whole = "".join(encoder.conversation.pieces(one, answered=False)[:3])
    (row,), _ = encoder.pictured([whole], [encoder.pictured.opened(picture)])
    # Before the picture, words may be cut otherwise where an answer follows its prompt.
    tail = row["input_ids"][row["input_ids"].index(encoder.picture_token) :]
    assert ids[at : at + len(tail)] == tail
    spelled = sample(
        history=[(f"x {list(marks_of(encoder).values())[-1]} x", "A model."), past[1]], image=picture, shown=1
    )
    assert controls(encoder, rows(encoder, spelled)[0]) == controls(encoder, ids)
    prompts = encoder.prompts([sample(image=picture), one])
    assert prompts["input_ids"][1].tolist() == ids[: len(prompts["input_ids"][1])]
    shown = encoder.prompts([one])["input_ids"][0].tolist()
    assert shown == ids[: len(shown)]
    assert encoder.prompt(one)[0].count(encoder.picture_token) <= 1


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "llava_llama"])
def test_rows_with_remembered_pictures_are_those_with_opened_ones(encoder_of, picture, name):
    encoder = encoder_of(name)
    mark = list(marks_of(encoder).values())[-1]
    several = [
        sample(f"x {mark} x", image=picture),
        sample(history=[("Who?", "Me."), ("And where?", "Here.")], image=picture, shown=1),
        sample(history=[("Who?", f"x{mark}")], image=picture, shown=1),
    ]
    for one in several:
        expected = rows(encoder, one)
        with encoder.recalling(lambda paths: dict(encoder.placeholder_picture)):
            assert rows(encoder, one) == expected
