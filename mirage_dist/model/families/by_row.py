"""Models whose layers of cross-attention read the pictures of their own row: rows without one keep out of it.

In a batch without pictures, transformers leaves such layers out. In a batch where some rows have none, it masks the
MLP of these rows, but their attention still averages over the other entry of their row, whatever that is.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

# The layer's argument (B, 1, S, 1), from which it masks the MLP: 1 for tokens that attend to a picture.
MASK = "full_text_row_masked_out_mask"


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of cross-attention; none in models that take a picture as tokens."""
    return [
        layer
        for layer in model.modules()
        if isinstance(getattr(layer, "cross_attn", None), nn.Module)
        and MASK in inspect.signature(layer.forward).parameters
    ]


def keep_apart(model: nn.Module) -> None:
    """From now on a row of which no token attends to a picture passes cross-attention unchanged.

    Other rows, and models without such layers, compute as before.
    """
    for layer in layers(model):
        _mask(layer, layer.cross_attn)


def _mask(layer: nn.Module, attention: Any) -> None:
    current: list[Tensor | None] = [None]

    def keep(_layer: nn.Module, _inputs: Any, options: dict[str, Any]) -> None:
        mask_B1S1 = options.get(MASK)
        current[0] = None if mask_B1S1 is None else mask_B1S1[:, 0].amax(1, keepdim=True)

    def apply(_attention: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        sees_B11 = current[0]
        return None if sees_B11 is None else (output[0] * sees_B11, *output[1:])

    layer.register_forward_pre_hook(keep, with_kwargs=True)
    attention.register_forward_hook(apply)
