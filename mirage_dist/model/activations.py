"""Outputs of decoder layers, and forwards that compute no more layers and rows than needed.

A forward has up to two parts: the backbone's own forward over all rows, and the later layers on the rows that continue
(`Narrow`). A model that shares its lower layers with another one starts from the input of the first layer that differs
(`Prefix`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from mirage_dist.model.families.roles import decoder
from mirage_dist.schema import ConfigError

# Text decoders whose forward is its layers one after the other, all called with the same arguments, then the norm. Of
# vision-language models, LLaVA (all kinds), InternVL, Idefics3, SmolVLM and Mistral 3 have these. Others are always
# run whole, for all rows: Qwen-VL, which adds features of pictures between layers or has positions on three axes, Gemma
# with its layers of two kinds, Mllama with its layers that only pictures use.
PLAIN_DECODERS = ("llama", "mistral", "qwen2", "qwen3")


class Narrow(NamedTuple):
    """Decoder layers from `first` on are computed for these rows of the batch only."""

    first: int
    rows: slice


@dataclass(frozen=True)
class Prefix:
    """The input of a decoder layer: hidden_BSD and keyword arguments. No gradient flows through it.

    ZeRO-3's hooks search tuples and dicts for tensors, but not this class, and need none of its tensors.
    """

    layer: int
    hidden_BSD: Tensor
    arguments: dict[str, Any]

    def of(self, rows: slice) -> Prefix:
        """The prefix of some rows of the batch."""
        hidden_BSD, arguments = narrowed(self.hidden_BSD, self.arguments, rows)
        return Prefix(self.layer, hidden_BSD, arguments)


@dataclass
class Seen:
    """Inputs (hidden_BSD, arguments) and outputs of the observed layers in one forward, by layer number."""

    inputs: dict[int, tuple[Tensor, dict[str, Any]]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


def check_layer(backbone: Any, layer: int) -> None:
    """Raise ConfigError unless the decoder has layer number `layer`."""
    count = len(decoder(backbone).layers)
    if layer >= count:
        raise ConfigError(f"objective: layer={layer}: the model has decoder layers 0 to {count - 1}")


def is_plain(backbone: Any) -> bool:
    """Whether the decoder's layers may be called one by one (see PLAIN_DECODERS)."""
    return plain(decoder(backbone).config)


def plain(config: Any) -> bool:
    """Whether a text decoder of this configuration is (see `is_plain`)."""
    return config.model_type in PLAIN_DECODERS and len(set(getattr(config, "layer_types", None) or ["one"])) == 1


@contextmanager
def seeing(backbone: Any, layers: set[int], depth: int | None = None) -> Iterator[Seen]:
    """Record inputs and outputs of these decoder layers during the forward inside the block.

    With `depth` the decoder runs this many layers at most: the block puts a shorter list in the place of its `layers`,
    which every decoder goes through. Raising from a hook instead would leave ZeRO-3 with gathered parameters.
    """
    text = decoder(backbone)
    seen, whole = Seen(), text.layers

    def hook(number: int) -> Any:
        def keep(_module: nn.Module, positional: Any, arguments: dict[str, Any], output: Any) -> None:
            seen.inputs[number] = (positional[0] if positional else arguments["hidden_states"], arguments)
            seen.outputs[number] = output[0] if isinstance(output, tuple) else output

        return text.layers[number].register_forward_hook(keep, with_kwargs=True)

    handles = [hook(number) for number in layers]
    try:
        if depth is not None and depth < len(whole):
            text.layers = whole[:depth]
        yield seen
    finally:
        text.layers = whole
        for handle in handles:
            handle.remove()


def run(
    backbone: Any, layers: range, hidden_BSD: Tensor, arguments: dict[str, Any], taps: Collection[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run these decoder layers one after the other: the last output, and the outputs of those among `taps`."""
    tapped = {}
    for number in layers:
        output = decoder(backbone).layers[number](hidden_BSD, **arguments)
        hidden_BSD = output[0] if isinstance(output, tuple) else output
        if number in taps:
            tapped[number] = hidden_BSD
    return hidden_BSD, tapped


def narrowed(hidden_BSD: Tensor, arguments: dict[str, Any], rows: slice) -> tuple[Tensor, dict[str, Any]]:
    """A decoder layer's input for some rows of the batch; values that all rows share are unchanged."""
    count = len(hidden_BSD)
    # The rows' dimension, from the end where there may be one before it: position_ids ([3,] B, S), cos and sin of
    # position_embeddings ([3,] B, S, d).
    places = {"attention_mask": 0, "position_ids": -2, "position_embeddings": -3}

    def cut(value: Any, place: int) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part, place) for part in value)
        if not isinstance(value, Tensor) or value.shape[place] != count:
            return value
        return value.narrow(place, rows.start, rows.stop - rows.start)

    return hidden_BSD[rows], {name: cut(v, places[name]) if name in places else v for name, v in arguments.items()}
