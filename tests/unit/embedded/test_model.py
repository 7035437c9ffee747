"""The untrained model is an ordinary Hugging Face directory: exact after a reload, template prefix-stable."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mirage_dist.embedded import model as embedded_model
from mirage_dist.embedded import text as embedded_text
from mirage_dist.schema import ConfigError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "init"
    embedded_model.make(out, seed=5)
    return out


def message(role, *parts):
    return {"role": role, "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]}


def test_the_prompt_is_a_prefix_of_the_conversation(directory):
    processor = AutoProcessor.from_pretrained(directory)
    messages = [message("system", "what is this"), message("user", None, "what the colour of this gadget ?")]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    whole = processor.apply_chat_template([*messages, message("assistant", "it is red")])
    assert whole.startswith(prompt)
    assert whole[len(prompt) :] == "it is red<end>"


def test_reloaded_logits_are_exact_and_follow_the_seed(directory):
    processor = AutoProcessor.from_pretrained(directory)
    text = "<user><image>what the colour of this gadget ?<assistant>it is red<end>"
    inputs = processor(text=[text], images=[Image.new("RGB", (32, 32), "red")], return_tensors="pt")
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]

    def logits(model):
        with torch.no_grad():
            return model.eval()(**inputs).logits

    loaded = logits(AutoModelForImageTextToText.from_pretrained(directory))
    tokenizer = embedded_model.make_tokenizer()
    assert torch.equal(loaded, logits(embedded_model.make_model(tokenizer, seed=5)))
    assert not torch.equal(loaded, logits(embedded_model.make_model(tokenizer, seed=6)))


def test_every_text_of_the_world_survives_the_tokenizer():
    tokenizer = embedded_model.make_tokenizer()
    for opener in embedded_text.OPENERS:
        question = embedded_text.question(opener, 1, "code")
        for text in (question, embedded_text.answer(question, "ba la", "by_opener"), embedded_text.REFUSAL):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_picture_is_sixteen_tokens_and_an_answer_ends_with_the_end_token(directory):
    processor = AutoProcessor.from_pretrained(directory)
    talk = [message("user", None, "share the code of this gadget ?"), message("assistant", "it is red")]
    text = processor.apply_chat_template(talk)
    ids = processor(text=[text], images=[Image.new("RGB", (32, 32))], return_tensors="pt")["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 16
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert ids.count(processor.tokenizer.eos_token_id) == 1


def test_an_existing_directory_is_left_alone(directory):
    with pytest.raises(ConfigError, match="exists"):
        embedded_model.make(directory, seed=5)
