"""What a plan needs to know of a recipe's model: sizes alone, taken once from the model on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mirage_dist.model import load, vision
from mirage_dist.model.adapters import quantization
from mirage_dist.model.families import packing
from mirage_dist.model.families.roles import Parts, decoder
from mirage_dist.model.policy import HeadedModel
from mirage_dist.objectives.base import Needs, Objective
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.optimizers import base as optimizers
from mirage_dist.train.optimizers.groups import split
from mirage_dist.train.planning.costs import flops
from mirage_dist.train.planning.costs.flops import Work
from mirage_dist.train.planning.costs.lengths import Lengths, measured

PICTURES = 64  # of the data, whose mean size stands for all


@dataclass(frozen=True)
class Trained:
    """Sizes of the trained parameters, by group, and bytes of their optimizer state, in the same order.

    matches: the patterns of each group.
    """

    matches: list[list[str] | None]
    groups: list[list[int]]
    states: list[int]
    elementwise: bool

    @classmethod
    def of(cls, policy: HeadedModel, recipe: TrainRecipe) -> Trained:
        optimizer, groups = optimizers.make(recipe.train.optimizer), split(policy, recipe.train)
        named = [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]
        return cls(
            matches=[group["match"] for group in groups],
            groups=[[p.numel() for p in group["params"]] for group in groups],
            states=[optimizer.state_bytes(name, p.shape) for name, p in named],
            elementwise=optimizer.elementwise,
        )

    @property
    def elements(self) -> int:
        return sum(map(sum, self.groups))


@dataclass(frozen=True)
class Facts:
    """Sizes of one recipe's model.

    sizes: elements of every parameter in the order of the forward. differentiable: elements of those that the backward
    pass goes through, so not of frozen embeddings. largest: elements of the largest module that is gathered at once.
    item: bytes of an element. merged, adapter: elements of the two forms of an export. quantized: elements that are
    loaded in 4 bits. reference: sizes of a second, frozen model; empty without one. connector: elements that a
    picture's token leaves in the connector for the backward pass. adapted: inputs and ranks of one layer's adapted
    matrices, summed, and whether they have dropout; None where the layers themselves train.
    """

    sizes: list[int]
    trained: Trained
    differentiable: int
    largest: int
    item: int
    depth: int
    text: Any
    eager: bool
    flash: bool
    vocabulary: int
    width: int
    head_trains: bool
    merged: int
    adapter: int
    quantized: int
    reference: list[int]
    connector: int
    adapted: tuple[int, int, bool] | None
    work: Work
    policy: HeadedModel = field(repr=False)

    @property
    def elements(self) -> int:
        return sum(self.sizes)


def facts(recipe: TrainRecipe, objective: Objective) -> Facts:
    """Build the model without memory and measure it. Raises ConfigError as `load.policy` does."""
    needs, dtype = objective.needs, load.DTYPES[recipe.train.dtype]
    policy = load.weightless(recipe.model, needs.depth, recipe.train.dtype)
    parts, text, head = Parts(policy.base), decoder(policy.backbone), policy.base.get_output_embeddings()
    named = dict(policy.base.named_parameters())
    role_of = {name: parts.role_of[name] for name in named}
    tower_trains = any(p.requires_grad for name, p in named.items() if role_of[name] == "vision")
    passed = {"decoder", "head", "connector", "vision"} if tower_trains else {"decoder", "head", "connector"}
    embedding = policy.base.get_input_embeddings().weight
    idle = {id(embedding)} if not embedding.requires_grad and embedding is not head.weight else set()
    quantized = 0
    if quantization.wanted(recipe.model):
        wide = (p for name, p in named.items() if role_of[name] == "decoder" and ".layers." in name and p.ndim == 2)
        quantized = sum(p.numel() for p in wide if not p.requires_grad)
    sizes = {"merged": 0, "adapter": 0}
    for name, parameter in policy.named_parameters():  # adapters are merged
        sizes["adapter" if "lora_" in name else "merged"] += parameter.numel()
    reference: list[int] = []
    if needs.reference and recipe.reference == "engine":
        frozen = load.weightless(replace(recipe.model, lora=None), needs.reference_depth)
        reference = [p.numel() for p in frozen.parameters()]
    connector = [p.shape for name, p in named.items() if role_of[name] == "connector" and p.ndim == 2]
    return Facts(
        sizes=[p.numel() for p in policy.parameters()],
        trained=Trained.of(policy, recipe),
        differentiable=sum(p.numel() for name, p in named.items() if role_of[name] in passed and id(p) not in idle),
        largest=max(sum(p.numel() for p in module.parameters()) for module in (*text.layers, head)),
        item=dtype.itemsize,
        depth=len(text.layers),
        text=text.config,
        eager=text.config._attn_implementation == "eager",
        flash=packing.costly(policy.base.config, text.config._attn_implementation, dtype, planned=True) is None,
        vocabulary=head.out_features,
        width=head.in_features,
        head_trains=bool(head.weight.requires_grad),
        merged=sizes["merged"],
        adapter=sizes["adapter"],
        quantized=quantized,
        reference=reference,
        connector=sum(shape[1] for shape in connector[:1]) + sum(2 * shape[0] for shape in connector[:-1]),
        adapted=_adapted(recipe, text.layers),
        work=flops.work(policy, needs, recipe.model.gradient_checkpointing),
        policy=policy,
    )


def _adapted(recipe: TrainRecipe, layers: Any) -> tuple[int, int, bool] | None:
    named = list(layers.named_parameters())
    if recipe.model.lora is None or any(p.requires_grad and "lora_" not in name for name, p in named):
        return None
    inner, depth = [p.shape for name, p in named if "lora_A" in name], len(layers)
    return sum(s[1] for s in inner) // depth, sum(s[0] for s in inner) // depth, recipe.model.lora.dropout > 0


def with_pictures(sizes: Facts, feed: Feed | None, picture: int = 0) -> Facts:
    """The same with the decoder's tokens of a picture.

    picture: their number; 0: the processor's, where there is one: of any picture where all take as many, else the mean
    over some pictures of the data, of which only headers are read.
    """
    if not picture and feed is not None and feed.encoder.picture_token is not None:
        if sizes.work.patches:
            picture = list(feed.encoder.placeholder["input_ids"]).count(feed.encoder.picture_token)
        else:
            picture = _mean_picture(feed)
    return replace(sizes, work=flops.with_picture(sizes.work, picture))


def lengths_of(feed: Feed) -> dict[str, Lengths]:
    """Of each stream. Call `Feed.check_lengths` first."""
    longest = feed.encoder.max_length
    return {name: measured(own, longest, feed.shown(name)) for name, own in feed.measured.items()}


def _mean_picture(feed: Feed) -> int:
    """Tokens that a picture adds to a row, on average."""
    shown = [(name, int(number)) for name in feed.samples for number in np.flatnonzero(feed.shown(name))]
    some = [feed.samples[name][number] for name, number in shown[:: -(-len(shown) // PICTURES) or 1]]
    lengths = [feed.encoder.length(one) - feed.encoder.length(replace(one, image=None)) for one in some]
    return round(sum(lengths) / len(lengths)) if lengths else 0


def head_rows(needs: Needs, lengths: Mapping[str, Lengths]) -> int:
    """The most rows of the LM head that one sample of every stream needs together."""
    return sum(_headed(needs, name, own) for name, own in lengths.items())


def _headed(needs: Needs, name: str, lengths: Lengths) -> int:
    if name in needs.kl and needs.kl_positions != "response":
        return lengths.longest
    return lengths.longest_response if name in (*needs.logp, *needs.distributions) else 0


def caches_vision(policy: HeadedModel) -> bool:
    """Whether the tower's features can be cached for this model."""
    try:
        vision.check(policy.base)
    except ConfigError:
        return False
    return True
