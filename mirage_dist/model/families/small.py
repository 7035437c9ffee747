"""A small model of a family's own classes, to be measured before any weights load.

It has the configuration's kinds of layers, attention and token ids, but few layers, one head and a narrow MLP
in each, and random weights that share their memory: a model of seven billion parameters takes a second.
"""

from __future__ import annotations

import copy
import zlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mirage_dist.model.families import narrowing, roles, truncation

# What may be left out, most first: widths and layers; layers; nothing.
SIZES = ("narrow", "shallow", "whole")
LAYERS = 2  # of the decoder, at least; more where a later layer is the first one of its kind
TOWER_LAYERS = 2  # of encoders of pictures and sounds; shared by the counts of one that has several
VOCABULARY = 61  # tokens that the LM head knows; labels are taken modulo this
SHARED = 1 << 23  # random numbers of a width at most; larger matrices have rows that overlap in them


def made(config: Any, attention: str | None = None, size: str = "narrow", window: int | None = None) -> Any:
    """The model on the CPU, in float32, without dropout.

    attention: the implementation, None for transformers' choice. size: one of `SIZES`; a family may need what the first
    leaves out. window: see `narrowing`. Raises what the family's classes raise.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config) if size == "whole" else shrunk(config, size == "narrow", window)
    options = {} if attention is None else {"attn_implementation": attention}
    # Buffers, such as frequencies of positions, keep the values that they are made with.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        hf = roles.auto_class(config).from_config(config, dtype=torch.float32, **options)
    head = hf.get_output_embeddings()
    hf.set_output_embeddings(nn.Linear(head.in_features, VOCABULARY, bias=head.bias is not None, device="meta"))
    _fill(hf)
    if head.bias is not None:  # not zero, as others are: logits may be scaled with it or without
        hf.get_output_embeddings().bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY), requires_grad=False)
    for module in hf.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ((name == "p" and isinstance(module, nn.Dropout)) or "dropout" in name):
                setattr(module, name, 0.0)
    return hf.eval()


def shrunk(config: Any, narrow: bool = True, window: int | None = None) -> Any:
    """A copy of the configuration with few layers, of every kind, and narrow MLPs; `narrow`: with one head, too."""
    small = copy.deepcopy(truncation.shortened(config, _depth(truncation.Key(config))))
    text = small.get_text_config()
    for part in narrowing.parts(small):
        if part is not text:
            _shorten(part)
    if narrow:
        return narrowing.narrowed(small, window)
    narrowing.narrow_mlps(small)
    return small


@lru_cache(maxsize=8)
def _depth(key: truncation.Key) -> int:
    """How many decoder layers hold all kinds."""
    kinds = [_kind(layer) for layer in roles.decoder(truncation.weightless(key.config)).layers]
    return max(LAYERS, *(1 + kinds.index(kind) for kind in set(kinds)))


def _shorten(tower: Any) -> None:
    """Fewer layers of a tower; lists of its layers' numbers keep their lengths, which widths may depend on."""
    names = [n for n in vars(tower) if n == "depth" or (n.startswith("num_") and n.endswith("_layers"))]
    numbers = {name: value for name in names if isinstance(value := getattr(tower, name), int)}
    layers = max(1, TOWER_LAYERS // max(1, len(numbers)))
    for name, whole in numbers.items():
        setattr(tower, name, min(whole, layers))
    whole = max(numbers.values(), default=0)
    for name, value in vars(tower).items():
        listed = isinstance(value, (list, tuple)) and value and all(type(v) is int and 0 <= v <= whole for v in value)
        if listed and ("layer" in name or "index" in name) and max(value) >= layers:
            setattr(tower, name, [v * layers // (whole + 1) for v in value])


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What layers of one kind have in common: the classes of their modules, and settings that are no numbers."""
    return tuple(
        (type(module), *(value for value in vars(module).values() if isinstance(value, (bool, str))))
        for module in layer.modules()
    )


def _fill(hf: nn.Module) -> None:
    """Give every parameter random values, of a size at which layers neither fade nor dominate; tied ones stay tied."""
    generator = torch.Generator().manual_seed(0)
    sizes: dict[int, int] = {}  # width of rows -> the largest matrix with such rows
    for parameter in hf.parameters():
        width = _width(parameter)
        sizes[width] = max(sizes.get(width, 0), parameter.numel())
    normal = torch.randn(min(SHARED, 2 * max(sizes.values())), generator=generator)
    shared = {width: normal[: max(2 * size, 2 * width)] / width**0.5 for width, size in sizes.items()}
    filled: dict[int, nn.Parameter] = {}
    for prefix, module in hf.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in filled:
                if parameter.dim() > 1:
                    start = zlib.crc32(f"{prefix}.{name}".encode())
                    values = _rows(shared[_width(parameter)], parameter.shape, start)
                else:  # of norms and gates
                    values = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
                filled[id(parameter)] = nn.Parameter(values, requires_grad=False)
            module._parameters[name] = filled[id(parameter)]


def _width(parameter: Tensor) -> int:
    return parameter.shape[-1] if parameter.dim() > 1 else 1


def _rows(values: Tensor, shape: torch.Size, start: int) -> Tensor:
    """A tensor of this shape in the memory of `values`, from `start` on; its rows overlap where it is larger."""
    count, row = shape[0], shape[1:].numel()
    room = len(values) - min(len(values) // 4, len(values) - row)
    if row > room:
        return torch.randn(shape) / shape[-1] ** 0.5
    step = max(1, min(row, (room - row) // max(1, count - 1)))
    strides = [1]
    for length in reversed(shape[2:]):
        strides.append(strides[-1] * length)
    return values.as_strided(shape, (step, *reversed(strides)), start % (len(values) - (step * (count - 1) + row) + 1))
