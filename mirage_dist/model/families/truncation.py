"""A model with fewer decoder layers, where its first layers are those of the whole model."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mirage_dist.model.families import roles

PLAIN = (bool, int, float, str, tuple, type(None))


def truncated(config: Any, depth: int) -> Any:
    """A configuration with `depth` decoder layers; the given one where a shorter model's layers would differ.

    They differ in families whose layers depend on the number of all layers (Gemma 3n's later layers share keys and
    values with earlier ones, counted from the end). Both models are made on the meta device and compared.
    """
    shorter = shortened(config, depth)
    if shorter is config:
        return config
    return shorter if _alike(Key(config), depth) else config


def shortened(config: Any, depth: int) -> Any:
    """A copy of the configuration with at most `depth` decoder layers, also in its lists of one value a layer."""
    whole = config.get_text_config().num_hidden_layers
    if depth >= whole:
        return config
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and "layer" in name and len(value) == whole:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return shorter


class Key:
    """A configuration as a key of a cache: equal to those of its class with the same content."""

    def __init__(self, config: Any) -> None:
        self.config = copy.deepcopy(config)
        self._content = (type(config), config.to_json_string())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)


def weightless(config: Any) -> Any:
    """The model on the meta device, without adapters and without the time that initialisation takes."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        return roles.auto_class(config).from_config(config)


@lru_cache(maxsize=8)  # a start asks for the same depth at every load
def _alike(key: Key, depth: int) -> bool:
    """Whether all modules that both models have are of one class, with equal settings and shapes of parameters."""
    try:
        long, short = weightless(key.config), weightless(shortened(key.config, depth))
        return _prefix(long, short, depth)
    except Exception:  # of any kind: a family's own checks refuse a configuration that it did not foresee
        return False


def _prefix(long: Any, short: Any, depth: int) -> bool:
    place = next(name for name, module in long.named_modules() if module is roles.decoder(long).layers)
    later = tuple(f"{place}.{number}." for number in range(depth, len(roles.decoder(long).layers)))
    own = {name: module for name, module in long.named_modules() if not f"{name}.".startswith(later)}
    others = dict(short.named_modules())
    return list(own) == list(others) and all(_same(own[name], others[name]) for name in own)


def _same(module: nn.Module, shorter: nn.Module) -> bool:
    # A setting that only the whole model has is one of a later layer's kind.
    own, other = vars(module), vars(shorter)
    settings = all(name in own and own[name] == value for name, value in other.items() if isinstance(value, PLAIN))
    return type(module) is type(shorter) and settings and _shapes(module) == _shapes(shorter)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}
