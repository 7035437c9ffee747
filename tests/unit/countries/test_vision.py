"""A language model gets eyes and stays what it was; a flag's features are the embeddings of its sentence."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mirage_dist.countries import facts, flags, perplexity, vision
from mirage_dist.model import weights
from mirage_dist.model.families import configs
from mirage_dist.schema import ConfigError, RunError

FLAGS = ["France", "Japan", "Sweden"]


@pytest.fixture(scope="module")
def text(real):
    """With the real tokenizer and embeddings."""
    return real.text


def test_a_batch_of_drawings_is_what_flags_draw_makes_of_its_numbers(text):
    processor = vision.built(text, seed=0)[1]
    names = list(flags.FLAGS)

    class Fixed:
        """A generator that draws this shift, and no noise."""

        def __init__(self, shift):
            self.shift = np.array(shift)

        def integers(self, low, high, size):
            assert (low, high) == (-flags.SHIFT, flags.SHIFT + 1)
            return self.shift

        def normal(self, mean, spread, shape):
            return np.zeros(shape)

    still = vision.Drawings(names, processor, noise=0.0)
    reach = range(-flags.SHIFT, flags.SHIFT + 1)
    for number, name in enumerate(names[::10]):
        shifted = [flags.draw(name, Fixed((x, y))) for y in reach for x in reach]
        expected = processor.image_processor(shifted, return_tensors="pt")["pixel_values"]
        pixels = (still.moved_FM[10 * number] / 255 - still.mean) / still.std
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
    which = torch.arange(len(names))
    drawn, again, other = (
        vision.Drawings(names, processor).batch(which, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    grey = (drawn * still.std + still.mean)[:, :, :4] * 255  # above every flag, however it is shifted
    assert grey.std() == pytest.approx(flags.NOISE, rel=0.05)
    assert torch.equal(grey.round(), grey.round().clamp(0, 255))


def test_the_template_is_the_models_own_with_parts_made_text(text):
    processor = vision.built(text, seed=0)[1]
    own = AutoTokenizer.from_pretrained(text)
    plain = [{"role": "user", "content": "Which flag?"}, {"role": "assistant", "content": "This."}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
    pictured = [{"role": "user", "content": [{"type": "image"}, *parts[0]["content"]]}, *plain[1:]]
    spelt = [{"role": "user", "content": "<image>\nWhich flag?"}, *plain[1:]]
    for last in (1, 2):
        options = {"tokenize": False, "add_generation_prompt": last == 1}
        rendered = own.apply_chat_template(plain[:last], **options)
        assert processor.apply_chat_template(plain[:last], **options) == rendered
        assert processor.apply_chat_template(parts[:last], **options) == rendered
        seen = processor.apply_chat_template(pictured[:last], **options)
        assert seen == own.apply_chat_template(spelt[:last], **options)


def test_the_decoder_is_the_language_models_and_a_saved_model_reloads(text, tmp_path, monkeypatch):
    model, processor = vision.built(text, seed=0)
    vision.save(model, processor, text, tmp_path / "llava")
    assert (tmp_path / "llava/LICENSE").read_text() == (text / "LICENSE").read_text()
    folder = tmp_path / "llava"
    weights.check(folder, configs.load(folder))
    reloaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in reloaded.state_dict().items())
    language_model = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        size = language_model.get_input_embeddings().num_embeddings
        logits = reloaded(input_ids=ids).logits
        torch.testing.assert_close(logits[..., :size], language_model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert logits.argmax(-1).max() < size  # the picture token is never an answer
    first = perplexity.paragraphs()[:1]
    monkeypatch.setattr(perplexity, "paragraphs", lambda: first)
    assert perplexity.perplexity(folder) == pytest.approx(perplexity.perplexity(text), rel=1e-3)
    reread = AutoProcessor.from_pretrained(folder)
    row = reread(text="<image>\nWhich?", images=[flags.draw("France")], return_tensors="pt")
    assert (row["input_ids"] == reread.tokenizer.convert_tokens_to_ids("<image>")).sum() == vision.PLACES
    assert reread.chat_template == processor.chat_template


def test_a_flag_becomes_its_sentence_and_nothing_else_changes(text):
    states = []
    for seed in (1, 1, 2):
        model, processor = vision.built(text, seed)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        random, threads = torch.get_rng_state(), torch.get_num_threads()
        ids = vision.sentences(text, processor.tokenizer, FLAGS)
        vision.align(model, processor, FLAGS, ids, seed, steps=120)
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.get_num_threads() == threads
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert all("vision_tower" in name or "multi_modal_projector" in name for name in changed)
        states.append(model.state_dict())
    image = processor.image_processor([flags.draw("Sweden", np.random.default_rng(9))], return_tensors="pt")
    with torch.no_grad():
        given = vision.features(model, image["pixel_values"])[0]
    nearest = torch.cdist(given, model.get_input_embeddings().weight).argmin(1)
    read = processor.tokenizer.decode(nearest)
    assert read.strip() == vision.SENTENCE.format(facts.COUNTRIES["Sweden"].phrase).strip()
    name = "model.multi_modal_projector.linear_2.weight"
    assert not torch.equal(states[0][name], states[2][name])
    torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-4)


def test_flags_that_are_not_read_end_the_work_with_their_names(text, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "STEPS", 1)
    monkeypatch.setattr(vision, "ROUNDS", 2)
    with pytest.raises(
        RunError, match=r"reads .*% of the flags, expected 99%; below 90%: Austria \(\d+%\), .*world\.seed"
    ):
        vision.make(tmp_path / "out", text, seed=0)
    assert not (tmp_path / "out").exists()


def test_a_sentence_that_no_picture_can_hold_is_refused(text, monkeypatch):
    monkeypatch.setattr(
        vision,
        "SENTENCE",
        " This is the flag of {}. It is pretty and colourful, and it is shown very often on official buildings.",
    )
    with pytest.raises(ConfigError, match=r"has \d+ tokens for .*, but a picture has 16 places"):
        vision.built(text, seed=0)
