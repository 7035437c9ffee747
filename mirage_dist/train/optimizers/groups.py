"""Parameter groups: which parameters train at which rate and weight decay."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, TypedDict

from mirage_dist.model.families.roles import Parts
from mirage_dist.model.policy import HeadedModel
from mirage_dist.schema import ConfigError, TrainConfig
from mirage_dist.train.optimizers.base import Groups
from mirage_dist.train.optimizers.partitions import slices


class GroupRecord(TypedDict):
    """One parameter group in a checkpoint's manifest; `match` is null for the parameters that no pattern matches."""

    match: list[str] | None
    lr: float
    weight_decay: float
    parameters: int  # elements


class OptimizerRecord(TypedDict):
    """The optimizer in a checkpoint's manifest."""

    name: str
    groups: list[GroupRecord]


def split(policy: HeadedModel, train: TrainConfig) -> Groups:
    """The trained parameters in groups: those of each entry of `train.groups`, and first those that no entry matches.

    A parameter belongs to the first entry that matches it. `peak` is the group's largest rate, and `share` the
    same as a multiple of `train.lr`.
    Raises ConfigError when a pattern matches no trained parameter that an earlier entry has left.
    """
    left = {name: p for name, p in policy.hf.named_parameters() if p.requires_grad}
    trained, parts = list(left), Parts(policy.hf)
    groups: Groups = []
    for number, entry in enumerate(train.groups):
        matches = {}
        for pattern in entry.match:
            names = [name for name in parts.matching(pattern) if name in left]
            if not names:
                raise ConfigError(f"train.groups[{number}].match: {_unmatched(pattern, trained, parts)}")
            matches |= {name: left.pop(name) for name in names}
        decay = train.weight_decay if entry.weight_decay is None else entry.weight_decay
        groups.append(_group(matches, entry.match, train.lr if entry.lr is None else entry.lr, decay, train.lr))
    rest = [_group(left, None, train.lr, train.weight_decay, train.lr)] if left else []
    return rest + groups


def _group(parameters: dict[str, Any], match: list[str] | None, lr: float, decay: float, base: float) -> dict[str, Any]:
    named = {"params": list(parameters.values()), "names": list(parameters)}
    return {**named, "match": match, "lr": lr, "peak": lr, "share": lr / base, "weight_decay": decay}


def _unmatched(pattern: str, trained: list[str], parts: Parts) -> str:
    names = parts.matching(pattern)
    if set(names) & set(trained):
        return f"all trained parameters that {pattern!r} matches are in earlier groups; move this entry up"
    if names:
        return f"{pattern!r} matches only parameters that do not train; change model.train, model.freeze or model.lora"
    return f"{pattern!r} matches no parameter; {parts.nearest(pattern)}"


def record(engine: Any, name: str) -> OptimizerRecord:
    """What a checkpoint's manifest says of the optimizer `name` and its parameter groups."""
    sizes = Counter[int]()
    for piece in slices(engine):
        sizes[piece.group] += math.prod(piece.shape)
    groups = [
        GroupRecord(match=g["match"], lr=g["peak"], weight_decay=g["weight_decay"], parameters=sizes[number])
        for number, g in enumerate(engine.optimizer.param_groups)
    ]
    return OptimizerRecord(name=name, groups=groups)


def set_rates(optimizer: Any, rate: float) -> dict[str, float]:
    """Give every group its share of the schedule's `rate`; returns the rates of the groups with patterns, by these."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
        if group["match"] is not None:
            rates["+".join(group["match"])] = group["lr"]
    return rates
