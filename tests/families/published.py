"""Model directories of the families' published sizes, without weights: configurations, processors, and headers.

The safetensors file has the header of a whole model and the length that it gives; its content is a hole in the file,
which takes no space. Tokenizers and vocabularies are the tiny ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from families import models
from mirage_dist.model.families import roles

CONFIG, PICTURES, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"


def _text(width: int, inner: int, layers: int, heads: int, keys: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        **more,
    }


def _tower(width: int, inner: int, layers: int, side: Any, patch: Any = 14, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": 16, "image_size": side, "patch_size": patch, **more}


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


LLAMA2, MISTRAL, LLAMA3 = _text(4096, 11008, 32, 32, 32), _text(4096, 14336, 32, 32, 8), _text(4096, 14336, 32, 32, 8)
QWEN2, QWEN3 = _text(3584, 18944, 28, 28, 4), _text(4096, 12288, 36, 32, 8, head_dim=128)
CLIP = _tower(1024, 4096, 24, 336)
SO400M = (1152, 4304, 27)
_CLIP_PICTURES = {"size": {"shortest_edge": 336}, "crop_size": _square(336)}
_NEXT_PINS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_PINS = [[384 * row, 384 * column] for row in range(1, 7) for column in range(1, 7)]
_QWEN2_TOWER = {"depth": 32, "num_heads": 16, "patch_size": 14}
_QWEN2_PIXELS = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
_QWEN2_ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}

# name -> file -> what differs from the tiny model's
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "llava_llama": {
        CONFIG: {"text_config": LLAMA2, "vision_config": CLIP, "image_seq_length": 576},
        PICTURES: _CLIP_PICTURES,
        PROCESSOR: {"patch_size": 14},
    },
    "llava_next": {
        CONFIG: {
            "text_config": MISTRAL,
            "vision_config": CLIP,
            "image_seq_length": 576,
            "image_grid_pinpoints": _NEXT_PINS,
        },
        PICTURES: {**_CLIP_PICTURES, "image_grid_pinpoints": _NEXT_PINS},
        PROCESSOR: {"patch_size": 14},
    },
    "llava_onevision": {
        CONFIG: {
            "text_config": QWEN2,
            "vision_config": _tower(1152, 4304, 26, 384),
            "image_grid_pinpoints": _ONEVISION_PINS,
        },
        PICTURES: {"size": _square(384), "image_grid_pinpoints": _ONEVISION_PINS},
        PROCESSOR: {"num_image_tokens": 729},
    },
    "qwen2_vl": {
        CONFIG: {
            **QWEN2,
            "rope_scaling": _QWEN2_ROPE,
            "vision_config": {**_QWEN2_TOWER, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4},
        },
        PICTURES: _QWEN2_PIXELS,
    },
    "qwen2_5_vl": {
        CONFIG: {
            **QWEN2,
            "rope_scaling": _QWEN2_ROPE,
            "vision_config": {
                **_QWEN2_TOWER,
                "hidden_size": 1280,
                "out_hidden_size": 3584,
                "intermediate_size": 3420,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
        },
        PICTURES: _QWEN2_PIXELS,
    },
    "qwen3_vl": {
        CONFIG: {
            "text_config": {**QWEN3, "rope_scaling": {"mrope_section": [24, 20, 20]}},
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "out_hidden_size": 4096,
                "intermediate_size": 4304,
                "num_heads": 16,
                "patch_size": 16,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
        PICTURES: {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    },
    "internvl": {
        CONFIG: {
            "text_config": QWEN2,
            "vision_config": _tower(1024, 4096, 24, [448, 448], [14, 14]),
            "image_seq_length": 256,
        },
        PICTURES: {"size": _square(448), "max_patches": 12},
        PROCESSOR: {"image_seq_length": 256},
    },
    "idefics3": {
        CONFIG: {"text_config": LLAMA3, "vision_config": _tower(*SO400M, 364)},
        PICTURES: {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
        PROCESSOR: {"image_seq_len": 169},
    },
    "smolvlm": {
        CONFIG: {
            "text_config": _text(2048, 8192, 24, 32, 32),
            "vision_config": _tower(*SO400M, 384),
            "scale_factor": 3,
        },
        PICTURES: {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
        PROCESSOR: {"image_seq_len": 81},
    },
    "gemma3": {
        CONFIG: {
            "text_config": _text(
                *(3840, 15360, 48, 16, 8),
                head_dim=256,
                query_pre_attn_scalar=256,
                sliding_window=1024,
                layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 8,
            ),
            "vision_config": _tower(*SO400M, 896),
            "mm_tokens_per_image": 256,
        },
        PICTURES: {"size": _square(896), "image_seq_length": 256},
        PROCESSOR: {"image_seq_length": 256},
    },
    "mllama": {
        CONFIG: {
            "text_config": _text(*(4096, 14336, 40, 32, 8), cross_attention_layers=list(range(3, 40, 5))),
            "vision_config": {
                "hidden_size": 1280,
                "num_hidden_layers": 32,
                "num_global_layers": 8,
                "attention_heads": 16,
                "intermediate_size": 5120,
                "vision_output_dim": 7680,
                "image_size": 560,
                "patch_size": 14,
                "intermediate_layers_indices": [3, 7, 15, 23, 30],
            },
        },
        PICTURES: {"size": _square(560)},
    },
    "mistral3": {
        CONFIG: {
            "text_config": _text(*(5120, 32768, 40, 32, 8), head_dim=128),
            "vision_config": _tower(1024, 4096, 24, 1540, head_dim=64),
        },
        PICTURES: {"patch_size": _square(14), "size": {"longest_edge": 1540}},
        PROCESSOR: {"patch_size": 14},
    },
    "llama_text": {CONFIG: LLAMA3},
    "qwen3_text": {CONFIG: QWEN3},
}


def make(name: str, folder: Path) -> Path:
    """Write the model directory of a published size to `folder`, and return it."""
    from transformers import AutoConfig

    models.write_files(name, folder)
    for file, change in SIZES[name].items():
        tree = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(_merged(tree, change), indent=2) + "\n")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = roles.auto_class(config).from_config(config)
    _write_header(folder / "model.safetensors", dict(model.named_parameters()))
    return folder


def _merged(tree: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    own = {n: _merged(tree.get(n, {}), value) if isinstance(value, dict) else value for n, value in change.items()}
    return {**tree, **own}


def _write_header(file: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of these names and shapes in bf16, all zeros, of which only the header is on the disk."""
    header, end = {}, 0
    for name, parameter in parameters.items():
        start, end = end, end + 2 * math.prod(parameter.shape)
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)
