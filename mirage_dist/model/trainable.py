"""Which parameters train: a selection by role or name, or adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mirage_dist.model import activations
from mirage_dist.model.adapters import layers
from mirage_dist.model.families.roles import ROLES, Parts
from mirage_dist.model.policy import HeadedModel
from mirage_dist.schema import ConfigError, ModelConfig


def prepare(hf: Any, model: ModelConfig, depth: int | None) -> HeadedModel:
    """The model with adapters, or with the parameters selected that train; none after `depth` decoder layers.

    Raises ConfigError as `policy` does.
    """
    if model.lora is not None:
        built = HeadedModel(layers.wrap(hf, model.lora))
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
    chosen = parts.selected(train, "model.train") - parts.selected(freeze, "model.freeze")
    if not chosen:
        raise ConfigError(f"model.freeze={list(freeze)} leaves nothing of model.train={list(train)} to train")
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in parts.role_of if name in chosen]


def summary(hf: Any) -> str:
    """What trains, by role, with numbers of parameters: `trains: decoder 6.7 B, connector 21 M, vision 0 of 304 M`."""
    parts, whole, trained, adapters = Parts(hf), Counter[str](), Counter[str](), Counter[str]()
    for name, parameter in hf.named_parameters():
        role = "decoder" if parts.role_of[name] == "head" else parts.role_of[name]
        size = getattr(parameter, "ds_numel", parameter.numel())
        if ".lora_" in name:
            adapters[role] += size
            continue
        whole[role] += size
        trained[role] += size if parameter.requires_grad else 0
    words = [f"adapters {_size(adapters.total())} on {' and '.join(adapters)}"] if adapters else []
    for role in (role for role in ROLES if role in whole):
        part = "" if trained[role] == whole[role] else f" of {_size(whole[role])}"
        words.append(f"{role} {_size(trained[role])}{part}")
    return f"trains: {', '.join(words)}"


def _size(count: int) -> str:
    """A number of parameters in words: 21 M, 6.7 B."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= 0.9995 * unit:
            scaled = count / unit
            return f"{scaled:.1f}{name}" if scaled < 9.95 else f"{scaled:.0f}{name}"
    return str(count)
