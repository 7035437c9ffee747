"""Which models can be packed: their layers keep the sequences of one row apart."""

from __future__ import annotations

from typing import Any

from mirage_dist.model.families import roles
from mirage_dist.schema import ConfigError

# Vision-language models that pass positions and the borders of packed sequences to their text decoder only. Others
# derive positions from a picture's grid (Qwen2-VL), or attention from token types (Gemma 3).
PACKABLE = {
    *("aya_vision", "cohere2_vision", "got_ocr2", "internvl", "llava", "llava_next", "llava_onevision", "mistral3"),
    "vipllava",
}
# Kinds of layers that keep packed sequences apart.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def check(backbone: Any) -> None:
    """Raise ConfigError unless the model is known to keep packed sequences apart."""
    kind, text = backbone.config.model_type, roles.decoder(backbone)
    if kind not in PACKABLE:
        raise ConfigError(
            f"data.packing: {kind} is not known to keep packed sequences apart (models that make positions of a "
            f"picture's grid, such as Qwen2-VL, do not); leave it off. Known: {', '.join(sorted(PACKABLE))}"
        )
    kinds = set(getattr(text.config, "layer_types", None) or ())
    if not text._supports_attention_backend or not kinds <= ATTENTION:
        raise ConfigError(
            f"data.packing: not every layer of {text.config.model_type} keeps packed sequences apart; leave it off"
        )
