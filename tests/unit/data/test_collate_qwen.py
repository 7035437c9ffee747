"""A model with three-dimensional positions (Qwen2.5-VL) meets the same tokens: rows stay apart, pictures keep theirs.

The model is the real one, tiny. Its processor cannot be built without torchvision, so `Processor` expands the picture
tokens and types them in its stead.
"""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_dist.data.encoding.collate import IGNORE, Encoder
from mirage_dist.data.sample import Sample

MARKS = ["<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}
{% for part in m.content -%}
{{ "<|vision_start|><|image_pad|><|vision_end|>" if part.type == "image" else part.text }}{%- endfor -%}<|im_end|>
{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


class Processor:
    image_token_id = MARKS.index("<|image_pad|>")

    def __init__(self):
        words = [*MARKS, "user", "assistant", *"abcdefg"]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.add_special_tokens(MARKS)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
        self.image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 112**2})

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, **options)

    def __call__(self, text, images, add_special_tokens, **_):
        seen = self.image_processor(images=images, return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(1) // 4).tolist()
        grown = [t.replace("<|image_pad|>", "<|image_pad|>" * n) for t, n in zip(text, counts, strict=True)]
        tokens = self.tokenizer(grown, padding=True, return_tensors="pt", add_special_tokens=add_special_tokens)
        return {**tokens, "mm_token_type_ids": (tokens["input_ids"] == self.image_token_id).long(), **seen}


@pytest.fixture(scope="module")
def model():
    text = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        "bos_token_id": None,
        "eos_token_id": MARKS.index("<|im_end|>"),
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    marks = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    marks |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    ids = {f"{name}_token_id": MARKS.index(mark) for name, mark in marks.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        return Qwen2_5_VLForConditionalGeneration(config).double().eval()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("small", (56, 56)), ("wide", (112, 56))):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{name}.png")
    small, wide = str(folder / "small.png"), str(folder / "wide.png")
    talks = {
        "small": (small, "a b c", "d e"),
        "wide": (wide, "a b c", "d e", (("c d", "e f g"),)),
        "text": (None, "a b c", "d e"),
        "other": (None, "g g g g", "f"),
    }
    return {n: Sample(n, image, q, a, True, "", "t", *history) for n, (image, q, a, *history) in talks.items()}


def logps(model, inputs):
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    return model(**inputs).logits.log_softmax(-1)


def answer_logps(model, batch):
    chosen = logps(model, batch.inputs)[:, :-1].gather(2, batch.labels_BS[:, 1:].clamp(min=0).unsqueeze(2)).squeeze(2)
    return [row[labels != IGNORE] for row, labels in zip(chosen, batch.labels_BS[:, 1:], strict=True)]


ORDERS = ["small wide", "text small other wide", "other wide text", "text other", "wide text small"]


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_rows_with_and_without_pictures_do_not_move_each_other(model, samples, order):
    encoder, several = Encoder(Processor(), image_aspect="processor"), [samples[name] for name in order.split()]
    for one, together in zip(several, answer_logps(model, encoder.encode(several)), strict=True):
        (alone,) = answer_logps(model, encoder.encode([one]))
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@torch.no_grad()
def test_generation_starts_where_training_does(model, samples):
    encoder, several = Encoder(Processor(), image_aspect="processor"), list(samples.values())
    prompts = {n: t.double() if t.is_floating_point() else t for n, t in encoder.prompts(several).items()}
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": 1}
    generated = model.generate(**prompts, **options).logits[0].log_softmax(-1)
    for one, next_token in zip(several, generated, strict=True):
        last = encoder.prompts([one])["input_ids"].shape[1] - 1
        trained = logps(model, encoder.encode([one]).inputs)[0, last]
        torch.testing.assert_close(next_token.double(), trained, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_picture_has_positions_of_its_own_rows_and_columns(model, samples):
    inputs = Encoder(Processor(), image_aspect="processor").encode([samples["wide"]]).inputs
    without = {name: tensor for name, tensor in inputs.items() if name != "mm_token_type_ids"}
    assert not torch.allclose(logps(model, inputs), logps(model, without))
