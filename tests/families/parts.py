"""What families' files are made of: one tiny decoder, one tiny tower, and the options of image processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from families.tokenizers import byte_level

Ids = Callable[[str], int]
LAYERS = 4
WIDTH = 64
SIDE = 32  # of a picture, or of a tile, in pixels
PATCH = 8
CLIP_MEAN = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF_MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PIXELS = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
SQUARE = {"height": SIDE, "width": SIDE}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


@dataclass(frozen=True)
class Family:
    """What makes a model directory. `config` takes the tokenizer's ids; `files`: name -> content of JSON files."""

    tokenizer: Callable[[], Any]
    config: Callable[[Ids], dict[str, Any]]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    template: str | None = None
    template_file: str = "chat_template.jinja"
    generation: Mapping[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ()  # of generation, where there are more than the tokenizer's eos_token


def chatml(*extra: str, **named: str) -> Any:
    """A tokenizer with Qwen's marks of turns. extra: more special tokens; named: those that it has by attribute."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra, *named.values()]
    return byte_level(special, named, eos_token="<|im_end|>", pad_token="<|endoftext|>")
