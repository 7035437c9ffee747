"""A decoder layer's output, and the forward that stops behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mirage_dist.schema import ConfigError


def decoder(backbone: Any) -> Any:
    """The text decoder of a vision-language backbone: the module that has `layers`."""
    return getattr(backbone, "language_model", backbone)


def check_layer(backbone: Any, layer: int) -> None:
    """Raise ConfigError unless the decoder has layer number `layer`."""
    count = len(decoder(backbone).layers)
    if layer >= count:
        raise ConfigError(f"objective.layer={layer}: the model has decoder layers 0 to {count - 1}")


@contextmanager
def tap(backbone: Any, layer: int, stop: bool) -> Iterator[list[Tensor]]:
    """Collect the output (B, S, D) of decoder layer `layer` of the forward made inside.

    With `stop` the decoder runs no later layer: it counts its layers in its configuration, which is lowered for
    the time being. Raising from a hook would leave ZeRO-3 with parameters gathered.
    """
    text = decoder(backbone)
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = text.layers[layer].register_forward_hook(keep)
    depth = text.config.num_hidden_layers
    try:
        if stop:
            text.config.num_hidden_layers = layer + 1
        yield found
    finally:
        text.config.num_hidden_layers = depth
        handle.remove()
