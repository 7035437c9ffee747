"""The linear layers that adapters wrap, chosen by role or name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from mirage_dist.model.families.roles import ROLES, Parts, closest, matcher
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError, LoraConfig


def wrap(hf: Any, options: LoraConfig) -> Any:
    """The model with adapters (peft), which train, and with `also_train`'s parameters, which train whole.

    Raises ConfigError for a role or pattern that matches no linear layer, or no parameter.
    """
    import peft

    parts = Parts(hf)
    layers = chosen(hf, parts, options.targets)
    names = parts.selected(options.also_train, "model.lora.also_train")
    whole = [parameter for name, parameter in hf.named_parameters() if name in names]
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=layers
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers has renamed
        wrapped = peft.get_peft_model(hf, config)
    for parameter in whole:
        parameter.requires_grad_(True)
    return wrapped


def chosen(hf: Any, parts: Parts, targets: Sequence[str]) -> list[str]:
    """The names of the linear layers that roles, and globs over names or role-relative names, match.

    Raises ConfigError for an entry that matches none.
    """
    linear = {
        name: (parts.role_of[f"{name}.weight"], parts.alias_of[f"{name}.weight"].removesuffix(".weight"))
        for name, module in hf.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in parts.role_of
    }
    names: set[str] = set()
    for target in targets:
        if target in ROLES:
            matches = {name for name, (role, _) in linear.items() if role == target}
        else:
            is_match = matcher(target)
            matches = {name for name, (_, alias) in linear.items() if is_match(name) or is_match(alias)}
        fused = _fused(hf, parts, target)
        if not matches:
            near = closest(target, [(alias, name) for name, (_, alias) in linear.items()])
            raise ConfigError(
                f"model.lora.targets: {target!r} matches no linear layer"
                + (f" (adapters cannot wrap {parts.alias_of[fused[0]]}, which is a stack of experts)" if fused else "")
                + f"; roles here: {', '.join(parts.roles)}; nearest layers: {near}"
            )
        if fused and target in ROLES:
            log.warning(
                f"model.lora.targets: {len(fused)} stacks of experts of the {target} have no adapters, such as "
                f"{parts.alias_of[fused[0]]}: adapters wrap linear layers only"
            )
        names |= matches
    return [name for name in linear if name in names]


def _fused(hf: Any, parts: Parts, target: str) -> list[str]:
    """Parameters that `target` matches, or below what it matches, and that hold one matrix for each expert."""
    stacks = {
        f"{name}.{own}" if name else own
        for name, module in hf.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if len(getattr(parameter, "ds_shape", parameter.shape)) == 3 and not hasattr(module, "kernel_size")
    }
    below = [] if target in ROLES else parts.matching(f"{target}.*")
    return [name for name in [*parts.matching(target), *below] if name in stacks]
