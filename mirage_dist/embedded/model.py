"""The embedded world's model: an untrained LLaVA of about 260 000 parameters, saved as a Hugging Face model.

CLIP encodes 32 × 32 pixels as 16 image tokens, Llama has four layers of width 64, and the tokenizer has the words
of `embedded.text` and a chat template. Nothing in it needs the network or torchvision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mirage_dist import disk
from mirage_dist.embedded import pictures as embedded_pictures
from mirage_dist.embedded import text as embedded_text
from mirage_dist.worlds import llava

SPECIAL = ("<pad>", "<end>", "<unk>", "<image>", "<system>", "<user>", "<assistant>")
PATCH = embedded_pictures.CELL
# Text and images in their order in the message; the text before an answer is an exact prefix of the full text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<{{ message.role }}>
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == "image" -%}<image>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- if message.role == "assistant" -%}<end>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""
# At the default scale (.02) a model this small stays on a plateau for hundreds of steps.
TEXT_INIT = 0.12
CLIP_INIT_FACTOR = 4.0
# Otherwise image tokens would have several times the norm of text tokens and dominate RMU's squared error.
PROJECTOR_SCALE = 0.25


def make(out: Path, seed: int) -> None:
    """Write the untrained model to `out`: configuration, fp32 safetensors weights, tokenizer and processor.

    The weights are a function of `seed`; the global random state does not change. `out` is whole or absent. Raises
    ConfigError when `out` exists.
    """
    with disk.folder(out) as folder:
        tokenizer = make_tokenizer()
        make_model(tokenizer, seed).save_pretrained(folder)
        make_processor(tokenizer).save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark of the world, in lower case; other words become <unk>."""
    words = [*SPECIAL, *embedded_text.vocabulary()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(SPECIAL))  # so that the role marks are never split into < user >
    return as_tokenizer(backend, model_max_length=256)


def as_tokenizer(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with the words of `backend`, which include SPECIAL, and the world's chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **options,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP's own preprocessing at the world's picture size, and the tokenizer."""
    return llava.make_processor(tokenizer, CHAT_TEMPLATE, embedded_pictures.SIDE, PATCH)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """The model with freshly drawn weights."""
    token_ids = tokenizer.get_vocab()
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=embedded_pictures.SIDE,
        patch_size=PATCH,
        initializer_factor=CLIP_INIT_FACTOR,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=TEXT_INIT,
        pad_token_id=token_ids["<pad>"],
        bos_token_id=None,
        eos_token_id=token_ids["<end>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token_ids["<image>"],
        image_seq_length=(embedded_pictures.SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(PROJECTOR_SCALE)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
