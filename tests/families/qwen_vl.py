"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from typing import Any

from families import templates
from families.parts import CLIP_MEAN, HALF_MEAN, PATCH, PIXELS, TEXT, WIDTH, Family, Ids, chatml

FAMILIES: dict[str, Family] = {}

_VISION_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}


def _qwen_ids(ids: Ids) -> dict[str, int]:
    names = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    names |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    return {f"{name}_token_id": ids(token) for name, token in names.items()}


def _qwen_pictures(processor: str, **options: Any) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor,
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 2,
        **PIXELS,
        **CLIP_MEAN,
        **options,
    }


_QWEN_TEXT = {**TEXT, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}
_QWEN_GENERATION = {"do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1}
# Published with the text's options at the top of config.json, and the size of pictures as numbers of pixels.
FAMILIES["qwen2_vl"] = Family(
    tokenizer=lambda: chatml(*_VISION_MARKS),
    config=lambda ids: {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **_QWEN_TEXT,
        "rope_scaling": _MROPE,
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **_qwen_ids(ids),
    },
    files={"preprocessor_config.json": _qwen_pictures("Qwen2VLProcessor", min_pixels=1024, max_pixels=9216)},
    template=templates.QWEN2_VL,
    template_file="chat_template.json",
    generation=_QWEN_GENERATION,
    ends=("<|im_end|>", "<|endoftext|>"),
)
FAMILIES["qwen2_5_vl"] = Family(
    tokenizer=lambda: chatml(*_VISION_MARKS),
    config=lambda ids: {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **_QWEN_TEXT,
        "rope_scaling": _MROPE,
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        **_qwen_ids(ids),
    },
    files={"preprocessor_config.json": _qwen_pictures("Qwen2_5_VLProcessor", min_pixels=1024, max_pixels=9216)},
    template=templates.QWEN2_VL,
    template_file="chat_template.json",
    generation={**_QWEN_GENERATION, "repetition_penalty": 1.05},
    ends=("<|im_end|>", "<|endoftext|>"),
)
_QWEN3_PICTURES = _qwen_pictures(
    "Qwen3VLProcessor",
    image_processor_type="Qwen2VLImageProcessorFast",
    size={"shortest_edge": 1024, "longest_edge": 9216},
    **HALF_MEAN,
)
FAMILIES["qwen3_vl"] = Family(
    tokenizer=lambda: chatml(*_VISION_MARKS),
    config=lambda ids: {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": False,
        "text_config": {
            **_QWEN_TEXT,
            "model_type": "qwen3_vl_text",
            "head_dim": 16,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        **_qwen_ids(ids),
    },
    files={
        "preprocessor_config.json": _QWEN3_PICTURES,
        "video_preprocessor_config.json": {
            **{name: value for name, value in _QWEN3_PICTURES.items() if name != "image_processor_type"},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    },
    template=templates.QWEN3_VL,
    template_file="chat_template.json",
    generation=_QWEN_GENERATION,
    ends=("<|im_end|>", "<|endoftext|>"),
)
