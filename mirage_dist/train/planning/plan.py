"""`mirage plan`: what a run will need, computed before any weights load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from mirage_dist.data import pictures
from mirage_dist.data.sources import Source
from mirage_dist.model import load, vision
from mirage_dist.model.families.roles import decoder
from mirage_dist.model.policy import HeadedModel
from mirage_dist.objectives.base import Needs, Objective
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.caches import vision as vision_cache
from mirage_dist.train.checkpoints import commit as checkpoint
from mirage_dist.train.feed import Feed
from mirage_dist.train.optimizers import base as optimizers
from mirage_dist.train.optimizers.groups import split
from mirage_dist.train.planning import check, memory
from mirage_dist.train.planning.memory import Place

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sample of a stream after truncation: of the whole row, and of its responses."""

    rows: list[int]
    responses: list[int]


@dataclass
class Plan:
    """Sections of rows: name -> (value, note). Bytes are `Place`s or, on disk, whole numbers."""

    data: dict[str, tuple[int | str, str]] = field(default_factory=dict)
    parameters: dict[str, tuple[int | str, str]] = field(default_factory=dict)
    memory: dict[str, tuple[Place, str]] = field(default_factory=dict)
    disk: dict[str, tuple[int, str]] = field(default_factory=dict)

    def text(self) -> str:
        """The table."""
        total = sum((place for place, _ in self.memory.values()), Place())
        device, host = ({name: (getattr(p, k), n) for name, (p, n) in self.memory.items()} for k in ("device", "host"))
        sections: dict[str, Mapping[str, tuple[str, str]]] = {
            "data": _numbers(self.data),
            "parameters": _numbers(self.parameters),
            "memory of one rank": _sizes({**device, "sum": (total.device, "")}),
        }
        if total.host:
            sections["host memory of one rank"] = _sizes({**host, "sum": (total.host, "")})
        sections["disk"] = _sizes(self.disk)
        lines = []
        for title, rows in sections.items():
            lines.append(title)
            lines += [f"  {name:<28}{value:>16}  {note}".rstrip() for name, (value, note) in rows.items()]
        return "\n".join(lines)


def _numbers(rows: Mapping[str, tuple[int | str, str]]) -> dict[str, tuple[str, str]]:
    return {name: (value if isinstance(value, str) else f"{value:,}", note) for name, (value, note) in rows.items()}


def _sizes(rows: Mapping[str, tuple[int, str]]) -> dict[str, tuple[str, str]]:
    return {name: (size(value), note) for name, (value, note) in rows.items() if value}


def size(number: float) -> str:
    """Bytes in words."""
    unit = 0
    while number >= 1024 and unit + 1 < len(UNITS):
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {UNITS[unit]}" if unit else f"{number:.0f} B"


def plan(recipe: TrainRecipe, ranks: int) -> Plan:
    """What `recipe` will need on `ranks` ranks; reads recipe, data and the model's configuration.

    Raises ConfigError for everything that `mirage train --check` checks, except broken pictures and batches that the
    model cannot compute.
    """
    checked = check.check_recipe(recipe, ranks)
    objective, streams = checked.objective, check.check_inputs(checked)
    policy = load.weightless(recipe.model, objective.needs.depth, recipe.train.dtype)  # later layers are not loaded
    processor = load.processor(recipe.model)
    recipe = check.divided(check.resolved(recipe, processor), objective.needs, ranks)
    feed = Feed(recipe, objective.needs, streams, processor)
    lengths = {name: _lengths(feed, source) for name, source in streams.items() if name in feed.samples}
    needs = Plan()
    _data(needs, feed, lengths)
    trained = Trained.of(policy, recipe)
    sizes = [p.numel() for p in policy.parameters()]
    needs.parameters["all"] = sum(sizes), ""
    needs.parameters["trained"] = trained.elements, f"{trained.elements / sum(sizes):.2%}"
    if recipe.train.groups:
        for match, group in zip(trained.matches, trained.groups, strict=True):
            needs.parameters[f"group {'the rest' if match is None else '+'.join(match)}"[:28]] = sum(group), ""
    _memory(needs, recipe, objective, policy, trained, checked.deepspeed["zero_optimization"], ranks, lengths)
    _disk(needs, recipe, objective, policy, trained, feed, lengths)
    return needs


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


def _lengths(feed: Feed, source: Source) -> Lengths:
    rows, responses = [], []
    for sample in source.samples:
        feed.encoder.length(sample)
        parts, longest = feed.encoder.sizes(sample), feed.encoder.max_length
        rows.append(min(sum(parts), longest))
        starts = accumulate(parts, initial=0)
        left = [min(part, max(0, longest - start)) for start, part in zip(starts, parts, strict=False)]
        responses.append(sum(left[1::2]))
    return Lengths(rows, responses)


def _data(plan: Plan, feed: Feed, lengths: Mapping[str, Lengths]) -> None:
    batch = feed.recipe.train.global_batch
    of_epoch = feed.epoch_stream
    plan.data["steps"] = feed.steps, f"{feed.steps * batch / len(lengths[of_epoch].rows):.2f} epochs of {of_epoch}"
    if feed.needs.reference:
        kind = feed.recipe.reference
        once = f"one forward over {', '.join(feed.needs.ref_logp)} before the first step; no second model"
        each = "one forward more each step"
        cost = {"cache": once, "adapters_off": f"{each}; no second model", "engine": f"{each}; a second model"}
        plan.data["reference"] = kind, cost[kind]
    for name, counts in lengths.items():
        samples = len(counts.rows)
        plan.data[f"{name}: samples"] = samples, f"{samples / batch:.1f} steps an epoch"
        plan.data[f"{name}: tokens an epoch"] = (
            sum(counts.rows),
            f"{sum(counts.rows) / samples:.0f} a sample, at most {max(counts.rows)}; "
            f"{sum(counts.responses) / sum(counts.rows):.1%} of them response",
        )


def _memory(
    plan: Plan,
    recipe: TrainRecipe,
    objective: Objective,
    policy: HeadedModel,
    trained: Trained,
    zero: Mapping[str, Any],
    ranks: int,
    lengths: Mapping[str, Lengths],
) -> None:
    required, train = objective.needs, recipe.train
    item = load.DTYPES[train.dtype].itemsize
    text = policy.base.config.get_text_config()
    head = policy.base.get_output_embeddings()
    sizes = [p.numel() for p in policy.parameters()]
    layers = decoder(policy.backbone).layers
    largest = max(sum(p.numel() for p in module.parameters()) for module in (*layers, head))
    weights = memory.weights(sizes, item, zero, ranks, largest)
    plan.memory["weights"] = weights, f"{train.dtype}, ZeRO-{zero['stage']}, ranks: {ranks}"
    plan.memory["gradients"] = memory.gradients(trained.groups, zero, ranks), "float32"
    optimizer = memory.optimizer(trained.groups, trained.states, trained.elementwise, zero, ranks)
    plan.memory["optimizer"] = optimizer, f"float32 master copy and the state of {train.optimizer['name']}"
    if not trained.elementwise:
        exchanged = memory.exchange(trained.groups, zero["stage"], ranks)
        plan.memory["update"] = exchanged, "values and gradients of whole parameters"
    plan.memory["communication"] = memory.buckets(item, zero), "reduce buckets"
    width = max(max(counts.rows) for counts in lengths.values())
    rows = train.rows * len(lengths)
    depth = len(layers)
    eager = decoder(policy.backbone).config._attn_implementation == "eager"

    def kept(checkpointing: bool) -> int:
        return memory.activations(text, rows * width, width, depth, item, eager, checkpointing)

    on = recipe.model.gradient_checkpointing
    plan.memory["activations, about"] = (
        Place(kept(on)),
        f"{rows} rows of {width} tokens, {depth} layers; {size(kept(not on))} with"
        f" model.gradient_checkpointing={str(not on).lower()}",
    )
    responses = train.rows * sum(_headed(required, name, lengths[name]) for name in lengths)
    if responses:
        trains = bool(head.weight.requires_grad)
        peak = memory.loss_head(
            responses, head.out_features, head.in_features, item, bool(required.distributions), trains
        )
        plan.memory["loss head"] = Place(peak), f"{responses} rows, vocabulary {head.out_features:,}"
    if required.reference and recipe.reference == "engine":
        frozen = load.weightless(recipe.model, required.reference_depth)
        held = memory.weights([p.numel() for p in frozen.parameters()], item, zero, ranks, largest)
        plan.memory["reference"] = held, f"a second, frozen model of {frozen.depth} layers"


def _headed(needs: Needs, name: str, lengths: Lengths) -> int:
    """The most rows of the LM head that a sample of this stream needs."""
    if name in needs.kl and needs.kl_positions != "response":
        return max(lengths.rows)
    return max(lengths.responses) if name in (*needs.logp, *needs.distributions) else 0


def _disk(
    plan: Plan,
    recipe: TrainRecipe,
    objective: Objective,
    policy: HeadedModel,
    trained: Trained,
    feed: Feed,
    lengths: Mapping[str, Lengths],
) -> None:
    required, train = objective.needs, recipe.train
    if required.ref_logp and recipe.reference == "cache":
        plan.disk["reference cache"] = (
            sum(_cached_logps(lengths[name]) for name in required.ref_logp),
            f"{sum(len(lengths[name].rows) for name in required.ref_logp):,} samples of {', '.join(required.ref_logp)}",
        )
    _vision(plan, recipe, policy, feed)
    one = trained.elements * memory.FP32 + sum(trained.states)
    plan.disk["a checkpoint"] = one, f"float32 master copy and the state of {train.optimizer['name']}"
    plan.disk["checkpoints kept"] = one * kept_checkpoints(recipe, feed.steps), "and one more while it is written"
    if train.export != "off":
        sizes = {"merged": 0, "adapter": 0}
        for name, parameter in policy.named_parameters():  # adapters are merged
            sizes["adapter" if "lora_" in name else "merged"] += parameter.numel()
        whole = sizes.get(train.export, sum(sizes.values()))
        plan.disk["export"] = whole * load.DTYPES[train.dtype].itemsize, train.dtype


def _cached_logps(lengths: Lengths) -> int:
    """Bytes of the reference cache's arrays: a float32 a response token, an int64 a sample and one at the end."""
    return sum(lengths.responses) * 4 + (len(lengths.rows) + 1) * 8


def _vision(plan: Plan, recipe: TrainRecipe, policy: HeadedModel, feed: Feed) -> None:
    try:
        vision.check(policy.base)
    except ConfigError:
        return  # not offered for this model; a recipe that asks for it did not come so far
    digests = pictures.digests(s.image for samples in feed.samples.values() for s in samples)
    count = len(set(digests.values())) + 1  # and the placeholder
    blank = feed.encoder.picture(None)
    item = load.DTYPES[recipe.train.dtype].itemsize
    elements = vision.elements(policy.base, blank, len(feed.encoder.placeholder["input_ids"]))
    beside = sum(8 * t.ndim if vision.is_pixels(name) else t.nbytes for name, t in blank.items())
    note = f"{count:,} pictures, the placeholder included, of {elements:,} features as a blank one has"
    plan.disk["vision features"] = (
        count * (elements * item + beside + vision_cache.INDEXED),
        note if recipe.data.cache_vision else f"{note}; data.cache_vision is off",
    )


def kept_checkpoints(recipe: TrainRecipe, steps: int) -> int:
    """How many checkpoints retention leaves at the end, if `keep_best` keeps one that the other rules would not."""
    every = recipe.train.save_every or steps
    saved = {*range(every, steps + 1, every), steps}
    left = checkpoint.kept({step: {} for step in saved}, recipe.train)
    return min(len(saved), len(left) + (recipe.train.keep_best is not None and recipe.train.keep_last is not None))
