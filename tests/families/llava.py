"""LLaVA: 1.5 with three decoders, NeXT, OneVision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from families import templates
from families.parts import (
    CLIP_MEAN,
    HALF_MEAN,
    PATCH,
    PINPOINTS,
    PIXELS,
    SIDE,
    SQUARE,
    TEXT,
    TOWER,
    Family,
    Ids,
    chatml,
)
from families.tokenizers import sentencepiece

FAMILIES: dict[str, Family] = {}


def _llava_tokenizer() -> Any:
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokens = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    return sentencepiece(special, {"image_token": "<image>"}, **tokens)


def _llava(text: Mapping[str, Any], ids: Ids, **options: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": ids("<image>"),
        "image_seq_length": 16,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {**TOWER, "model_type": "clip_vision_model"},
        "text_config": {**TEXT, **text},
        **options,
    }


_CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "size": {"shortest_edge": SIDE},
    "crop_size": SQUARE,
    "do_center_crop": True,
    **PIXELS,
    **CLIP_MEAN,
}
_LLAVA = {
    "processor_class": "LlavaProcessor",
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
}
_SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "processor_class": "LlavaProcessor",
    "size": SQUARE,
    **PIXELS,
    **HALF_MEAN,
}
_SIGLIP_TOWER = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}

FAMILIES["llava_llama"] = Family(
    tokenizer=_llava_tokenizer,
    config=lambda ids: _llava({"model_type": "llama"}, ids),
    files={"preprocessor_config.json": _CLIP, "processor_config.json": _LLAVA},
    template=templates.LLAVA,
    template_file="chat_template.json",
)
FAMILIES["llava_mistral"] = Family(
    tokenizer=_llava_tokenizer,
    config=lambda ids: _llava({"model_type": "mistral", "sliding_window": None}, ids),
    files={"preprocessor_config.json": _CLIP, "processor_config.json": _LLAVA},
    template=templates.MISTRAL_INST,
)
FAMILIES["llava_qwen2"] = Family(
    tokenizer=lambda: chatml(image_token="<image>"),
    config=lambda ids: _llava(
        {"model_type": "qwen2", "tie_word_embeddings": True},
        ids,
        vision_config=_SIGLIP_TOWER,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    ),
    files={
        "preprocessor_config.json": _SIGLIP,
        "processor_config.json": {
            **_LLAVA,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
        },
    },
    template=templates.LLAVA_QWEN,
    template_file="tokenizer_config.json",
)
FAMILIES["llava_next"] = Family(
    tokenizer=_llava_tokenizer,
    config=lambda ids: _llava(
        {"model_type": "mistral", "sliding_window": None},
        ids,
        architectures=["LlavaNextForConditionalGeneration"],
        model_type="llava_next",
        image_grid_pinpoints=PINPOINTS,
    ),
    files={
        "preprocessor_config.json": {
            **_CLIP,
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "LlavaNextProcessor",
            "image_grid_pinpoints": PINPOINTS,
            "do_pad": True,
        },
        "processor_config.json": {**_LLAVA, "processor_class": "LlavaNextProcessor"},
    },
    template=templates.MISTRAL_INST,
    template_file="chat_template.json",
)
FAMILIES["llava_onevision"] = Family(
    tokenizer=lambda: chatml(image_token="<image>", video_token="<video>"),
    config=lambda ids: {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": ids("<image>"),
        "video_token_index": ids("<video>"),
        "image_grid_pinpoints": [[32, 32], *PINPOINTS],
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": True,
        "vision_config": _SIGLIP_TOWER,
        "text_config": {**TEXT, "model_type": "qwen2", "tie_word_embeddings": True},
    },
    files={
        "preprocessor_config.json": {
            **_SIGLIP,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "image_grid_pinpoints": [[32, 32], *PINPOINTS],
            "do_pad": True,
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    },
    template=templates.ONEVISION,
)
