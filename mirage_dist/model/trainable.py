"""Which parameters train: a selection by role or name, or adapters."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch

from mirage_dist.config import nearest
from mirage_dist.model import activations
from mirage_dist.model.families.roles import Parts
from mirage_dist.model.policy import HeadedModel
from mirage_dist.schema import ConfigError, ModelConfig


def prepare(hf: Any, model: ModelConfig, depth: int | None) -> HeadedModel:
    """The model with adapters, or with the parameters selected that train; none after `depth` decoder layers.

    Raises ConfigError as `policy` does.
    """
    if model.lora is not None:
        built = HeadedModel(_with_adapters(hf, model))
    else:
        choose(hf, model.train, model.freeze)
        built = HeadedModel(hf)
    if depth is not None:
        activations.check_layer(built.backbone, depth - 1)
        for parameter in built.unused(depth):
            parameter.requires_grad_(False)
        if not any(p.requires_grad for p in built.parameters()):
            raise ConfigError(
                f"objective.layer={depth - 1}: no trained parameter lies below that layer's output, and no term uses a "
                "later layer; change model.train, or model.lora.targets"
            )
    return built


def choose(hf: Any, train: Sequence[str] | None, freeze: Sequence[str]) -> list[str]:
    """Set requires_grad by roles and patterns (see `Parts.matching`); returns the names of the parameters that train.

    train: None is the decoder and the connector. freeze: wins over `train`. Raises ConfigError for a role or pattern
    that matches no parameter, or when no parameter is left to train.
    """
    parts = Parts(hf)
    if train is None:
        train = [role for role in ("decoder", "connector") if role in parts.roles]
    chosen = _matching(parts, train, "model.train") - _matching(parts, freeze, "model.freeze")
    if not chosen:
        raise ConfigError(f"model.freeze={list(freeze)} leaves nothing of model.train={list(train)} to train")
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in parts.role_of if name in chosen]


def _matching(parts: Parts, patterns: Sequence[str], key: str) -> set[str]:
    names: set[str] = set()
    for pattern in patterns:
        matches = parts.matching(pattern)
        if not matches:
            raise ConfigError(f"{key}: {pattern!r} matches no parameter; {parts.nearest(pattern)}")
        names.update(matches)
    return names


def _with_adapters(hf: Any, model: ModelConfig) -> Any:
    import peft

    options = model.lora
    assert options is not None
    linear = [name for name, module in hf.named_modules() if isinstance(module, torch.nn.Linear)]
    for pattern in options.targets:
        if not fnmatch.filter(linear, pattern):
            raise ConfigError(f"model.lora.targets: {pattern!r} matches no linear layer; {nearest(pattern, linear)}")
    targets = [name for name in linear if any(fnmatch.fnmatchcase(name, p) for p in options.targets)]
    for pattern in options.also_train:
        if not fnmatch.filter((name for name, _ in hf.named_parameters()), pattern):
            raise ConfigError(f"model.lora.also_train: {pattern!r} matches no parameter")
    wrapped = peft.get_peft_model(
        hf,
        peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets),
    )
    for name, parameter in wrapped.named_parameters():
        if any(fnmatch.fnmatchcase(name, p) for p in options.also_train):
            parameter.requires_grad_(True)
    return wrapped
