"""A model with fewer decoder layers, where its first layers are those of the whole model."""

from __future__ import annotations

import copy
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
    try:
        return shorter if _alike(config, shorter, depth) else config
    except Exception:  # of any kind: a family's own checks refuse a configuration that it did not foresee
        return config


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


def _alike(config: Any, shorter: Any, depth: int) -> bool:
    """Whether all modules that both models have are of one class, with equal settings and shapes of parameters."""
    with torch.device("meta"):
        long, short = (roles.auto_class(c).from_config(c) for c in (config, shorter))
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
