"""`mirage plan`: memory, time, communication, disk and cost of a run, computed before any weights load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mirage_dist.config import find
from mirage_dist.data import pictures
from mirage_dist.data.records import value as json_value
from mirage_dist.data.sources import Source
from mirage_dist.model import load, vision
from mirage_dist.model.adapters import quantization
from mirage_dist.progress import log
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.caches import vision as vision_cache
from mirage_dist.train.checkpoints import commit as checkpoint
from mirage_dist.train.feed import Feed, steps_of
from mirage_dist.train.planning import advice, batch, check, setting, sharding
from mirage_dist.train.planning.advice import Case, Change
from mirage_dist.train.planning.costs import duration, memory
from mirage_dist.train.planning.costs.duration import Run, Step
from mirage_dist.train.planning.costs.facts import caches_vision, facts, lengths_of, with_pictures
from mirage_dist.train.planning.costs.hardware import Hardware, hardware
from mirage_dist.train.planning.costs.lengths import Described, Lengths
from mirage_dist.train.planning.costs.memory import Place
from mirage_dist.train.planning.setting import Setting


@dataclass(frozen=True)
class Cluster:
    """Where a run is planned to go. ranks: GPUs of all nodes; gpus: of one. price: of a GPU-hour, in any currency."""

    ranks: int
    gpus: int
    on: Hardware
    price: float | None = None


def cluster(
    on: Hardware,
    nodes: int | None = None,
    gpus: int | None = None,
    ranks: int | None = None,
    price: float | None = None,
) -> Cluster:
    """Nodes of GPUs; what is not given follows from the rest, or is one usual node.

    Raises ConfigError for numbers that contradict each other.
    """
    if gpus is not None:
        on = replace(on, gpus_per_node=gpus)
    if ranks is None:
        gpus = gpus or on.gpus_per_node
        return Cluster(gpus * (nodes or 1), gpus, on, price)
    gpus = gpus or (on.gpus_per_node if nodes is None else max(1, ranks // nodes))
    if nodes is not None and nodes * gpus != ranks:
        raise ConfigError(f"--ranks {ranks}: not {nodes} nodes × {gpus} GPUs; leave one of the three out")
    return Cluster(ranks, min(gpus, ranks), on, price)


@dataclass
class Plan:
    """What a run will need. Sections of rows are name -> (value, note); bytes are `Place`s or, on disk, whole numbers.

    case: the recipe as planned. given: its global batch and micro-batch where these do not suit the number of ranks;
    such a run is refused as it stands. smallest: the smallest cluster that fits. changes: what makes it fit.
    """

    case: Case
    cluster: Cluster
    steps: int
    given: tuple[int, int | str] | None = None
    cautions: list[str] = field(default_factory=list)
    data: dict[str, tuple[int | str, str]] = field(default_factory=dict)
    parameters: dict[str, tuple[int | str, str]] = field(default_factory=dict)
    disk: dict[str, tuple[int, str]] = field(default_factory=dict)

    @cached_property
    def memory(self) -> dict[str, tuple[Place, str]]:
        return self.case.parts

    @cached_property
    def step(self) -> Step:
        return self._step_of(self.case.at)

    @cached_property
    def stages(self) -> dict[str, Step]:
        """The recipe's own buckets under every stage; hpZ only where a node has several ranks of many nodes."""
        at = self.case.at
        plain = {name: value for name, value in at.zero.items() if name != sharding.KEY}
        stages: dict[str, Mapping[str, Any]] = {"ZeRO-2": {**plain, "stage": 2}, "ZeRO-3": {**plain, "stage": 3}}
        if at.nodes > 1 and at.ranks % at.gpus == 0:
            stages["ZeRO-3, hpZ"] = {**plain, "stage": 3, sharding.KEY: at.gpus}
        return {name: self._step_of(replace(at, zero=zero)) for name, zero in stages.items()}

    def _step_of(self, at: Setting) -> Step:
        case = self.case
        return duration.step(case.sizes, at, self.cluster.on, case.objective.needs, case.lengths)

    @cached_property
    def run(self) -> Run:
        case = self.case
        saves = len(saved_steps(case.recipe, self.steps))
        export = self.disk["export"][0] if "export" in self.disk else 0
        return duration.run(
            case.sizes,
            case.at,
            self.cluster.on,
            case.objective.needs,
            case.lengths,
            self.step,
            self.steps,
            saves,
            self.disk["a checkpoint"][0],
            export,
            case.recipe.train.save_in_background,
        )

    @cached_property
    def smallest(self) -> Case | None:
        return advice.smallest(self.case, self.cluster.on)

    @cached_property
    def changes(self) -> list[Change]:
        return [] if self.fits else advice.changes(self.case, self.cluster.on, zero_of)

    @property
    def peak(self) -> Place:
        """Bytes of one GPU at the peak, and of its process in host memory."""
        return setting.peak(self.memory, self.case.at)

    @property
    def fits(self) -> bool:
        return self.case.fits(self.cluster.on)

    @property
    def gpu_hours(self) -> float:
        return self.run.seconds * self.cluster.ranks / 3600


def plan(
    recipe: TrainRecipe, ranks: int, cluster: Cluster | None = None, data: Described | None = None, picture: int = 0
) -> Plan:
    """What `recipe` will need on `ranks` ranks; reads recipe, data and the model's configuration.

    cluster: the GPUs; None is H100s in nodes of eight. data: describes samples that are not there yet. picture: tokens
    of a picture, where the configuration does not say. Raises ConfigError for everything that `mirage train --check`
    checks, except broken pictures and batches that the model cannot compute. A batch that does not suit the ranks is
    no error here: the plan is for the nearest that does, and says so.
    """
    cluster = cluster or Cluster(ranks, 8, hardware("h100"))
    recipe, given = suited(recipe, ranks)
    checked = check.check_recipe(recipe, ranks, min(cluster.gpus, ranks))
    objective, chooses = checked.objective, recipe.train.micro_batch == "auto"
    recipe = check.divided(recipe, objective.needs, ranks)
    feed, streams = None, dict[str, Source]()
    if data is None:
        streams = _streams(checked)
        processor = load.processor(recipe.model)
        recipe = check.resolved(recipe, processor, planned=True)
        feed = Feed(recipe, objective.needs, streams, processor)
        feed.check_lengths(Group(0, 0, 1, torch.device("cpu")))
        check.check_balance(feed)
        lengths = lengths_of(feed)
    else:
        check.check_weights(recipe, objective.needs, False)
        load.check_names(recipe.model, recipe.data, objective.needs.layers, objective.needs.depth, recipe.train.dtype)
        recipe = _without_processor(recipe)
        lengths = {name: data.of(recipe.data.max_length) for name in objective.needs.streams}
    sizes = with_pictures(facts(recipe, objective), feed, picture)
    # What the JSON says of hpZ, which means another number of ranks on another cluster.
    written = {name: value for name, value in zero_of(recipe.deepspeed).items() if name == sharding.KEY}
    zero = {**checked.deepspeed["zero_optimization"], **written}
    at = Setting.of(recipe, objective.needs, ranks, cluster.gpus, zero)
    case = Case(recipe, objective, sizes, at, lengths)
    if chooses:
        rows = advice.largest_micro_batch(case, cluster.on) or 1
        recipe = replace(recipe, train=replace(recipe.train, micro_batch=rows))
        case = replace(case, recipe=recipe, at=replace(at, micro_batch=rows))
    epoch = recipe.train.epoch_stream or objective.needs.streams[0]
    needs = Plan(case, cluster, steps_of(recipe.train, lengths[epoch].samples), given)
    _data(needs, epoch)
    _parameters(needs)
    _disk(needs, feed, streams)
    _cautions(needs, data)
    return needs


def suited(recipe: TrainRecipe, ranks: int) -> tuple[TrainRecipe, tuple[int, int | str] | None]:
    """The recipe with the nearest batch that divides by `ranks`, and its own batch where that is another one."""
    rows, micro = recipe.train.global_batch, recipe.train.micro_batch
    if rows % (ranks if micro == "auto" else micro * ranks) == 0:
        return recipe, None
    size = batch.rounded(rows, ranks)
    own = micro if micro == "auto" else batch.choose(size, ranks, micro)
    return replace(recipe, train=replace(recipe.train, global_batch=size, micro_batch=own)), (rows, micro)


def zero_of(file: str) -> Mapping[str, Any]:
    """`zero_optimization` of a DeepSpeed JSON."""
    content = json_value(find(file))
    return content["zero_optimization"]


def _streams(checked: check.Checked) -> dict[str, Source]:
    """The samples; a file that is not there is an error that also says how to describe what it will hold."""
    absent = [
        source.path
        for sources in checked.recipe.data.streams.values()
        for source in sources
        if "://" not in source.path and not Path(source.path).exists()
    ]
    try:
        return check.check_inputs(checked)
    except ConfigError as error:
        if not absent:
            raise
        raise ConfigError(
            f"{error}. Before there are data, describe them: --samples N (of each stream) --tokens MEAN,LONGEST (of a "
            "row with its picture) --responses MEAN,LONGEST (tokens of the answers among them)"
        ) from error


def _without_processor(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with `data.packing` decided: padded where that needs a processor and there is none."""
    if recipe.data.packing != "auto":
        return recipe
    try:
        return check.resolved(recipe, load.processor(recipe.model), planned=True)
    except ConfigError as error:
        log.warning(f"data.packing=auto: planned as padded, since there is no processor to measure with ({error})")
        return replace(recipe, data=replace(recipe.data, packing=False))


def _cautions(plan: Plan, data: Described | None) -> None:
    """What the numbers do not hold for."""
    at, recipe = plan.case.at, plan.case.recipe
    if plan.given is not None:
        given, micro = plan.given
        plan.cautions.append(
            f"train.global_batch={given} with train.micro_batch={micro} does not divide by {at.ranks} GPUs: such a run "
            f"is refused. This plan is for train.global_batch={at.global_batch} train.micro_batch={at.micro_batch}"
        )
    if data is not None:
        plan.cautions.append("the data are described, not read: lengths are spread between 1 and the longest")
    if plan.case.sizes.work.tower.all and not plan.case.sizes.work.patches:
        plan.cautions.append(
            "config.json has no size of pictures, so the vision tower is not in the time; give --picture-tokens N"
        )
    if at.fp32:
        plan.cautions.append(
            "train.dtype=fp32: the time is computed with the GPU's bf16 operations a second, of which float32 reaches "
            "a half (TF32) to a fifteenth; give --hardware tflops=N"
        )
    if at.packed and not plan.case.sizes.flash:
        plan.cautions.append(
            "packed rows without flash-attention, for which this model or train.dtype has no kernel: every token of a "
            "micro-batch is compared with every other; data.packing=auto pads"
        )
    if recipe.data.group_by_length and not at.packed:
        plan.cautions.append("data.group_by_length: rows stand beside rows of their length; padding is less than here")
    if quantization.wanted(recipe.model) and at.zero["stage"] == 3:
        plan.cautions.append(
            "a 4-bit base is not partitioned; `mirage train` wants configs/deepspeed/zero2.json for it"
        )


def _data(plan: Plan, epoch: str) -> None:
    recipe, needs, lengths = plan.case.recipe, plan.case.objective.needs, plan.case.lengths
    size = recipe.train.global_batch
    plan.data["steps"] = plan.steps, f"{plan.steps * size / lengths[epoch].samples:.2f} epochs of {epoch}"
    if needs.reference:
        kind = recipe.reference
        once = f"one forward over {', '.join(needs.ref_logp)} before the first step; no second model"
        each = "one forward more each step"
        cost = {"cache": once, "adapters_off": f"{each}; no second model", "engine": f"{each}; a second model"}
        plan.data["reference"] = kind, cost[kind]
    for name, own in lengths.items():
        plan.data[f"{name}: samples"] = own.samples, f"{own.samples / size:.1f} steps an epoch"
        tokens = round(own.mean * own.samples)
        plan.data[f"{name}: tokens an epoch"] = (
            tokens,
            f"{own.mean:.0f} a sample, at most {own.longest}; {own.response / own.mean:.1%} of them response",
        )


def _parameters(plan: Plan) -> None:
    sizes, trained = plan.case.sizes, plan.case.sizes.trained
    plan.parameters["all"] = sizes.elements, ""
    plan.parameters["trained"] = trained.elements, f"{trained.elements / sizes.elements:.2%}"
    if plan.case.recipe.train.groups:
        for match, group in zip(trained.matches, trained.groups, strict=True):
            plan.parameters[f"group {'the rest' if match is None else '+'.join(match)}"[:28]] = sum(group), ""


def _disk(plan: Plan, feed: Feed | None, streams: Mapping[str, Source]) -> None:
    recipe, sizes = plan.case.recipe, plan.case.sizes
    required, train, lengths = plan.case.objective.needs, recipe.train, plan.case.lengths
    if required.ref_logp and recipe.reference == "cache":
        plan.disk["reference cache"] = (
            sum(_cached_logps(lengths[name]) for name in required.ref_logp),
            f"{sum(lengths[name].samples for name in required.ref_logp):,} samples of {', '.join(required.ref_logp)}",
        )
    if feed is not None:
        _vision(plan, feed, streams)
    one = sizes.trained.elements * memory.FP32 + sum(sizes.trained.states)
    plan.disk["a checkpoint"] = one, f"float32 master copy and the state of {train.optimizer['name']}"
    plan.disk["checkpoints kept"] = one * kept_checkpoints(recipe, plan.steps), "and one more while it is written"
    if train.export != "off":
        whole = {"merged": sizes.merged, "adapter": sizes.adapter}.get(train.export, sizes.merged + sizes.adapter)
        plan.disk["export"] = whole * sizes.item, train.dtype


def _cached_logps(lengths: Lengths) -> int:
    """Bytes of the reference cache's arrays: a float32 a response token, an int64 a sample and one at the end."""
    return round(lengths.response * lengths.samples) * 4 + (lengths.samples + 1) * 8


def _vision(plan: Plan, feed: Feed, streams: Mapping[str, Source]) -> None:
    """Of the pictures of all streams, those held out among them."""
    policy = plan.case.sizes.policy
    if not caches_vision(policy):
        return  # not offered for this model; a recipe that asks for it did not come so far
    digests = pictures.digests(sample.image for source in streams.values() for sample in source.samples)
    count = len(set(digests.values())) + 1  # and the placeholder
    blank = feed.encoder.picture(None)
    elements = vision.elements(policy.base, blank, len(feed.encoder.placeholder["input_ids"]))
    beside = sum(8 * t.ndim if vision.is_pixels(name) else t.nbytes for name, t in blank.items())
    note = f"{count:,} pictures, the placeholder included, of {elements:,} features as a blank one has"
    plan.disk["vision features"] = (
        count * (elements * plan.case.sizes.item + beside + vision_cache.INDEXED),
        note if feed.recipe.data.cache_vision else f"{note}; data.cache_vision is off",
    )


def saved_steps(recipe: TrainRecipe, steps: int) -> set[int]:
    """The steps after which a run of so many saves."""
    every = recipe.train.save_every or steps
    return {*range(every, steps + 1, every), steps}


def kept_checkpoints(recipe: TrainRecipe, steps: int) -> int:
    """How many checkpoints retention leaves at the end, if `keep_best` keeps one that the other rules would not."""
    saved = saved_steps(recipe, steps)
    left = checkpoint.kept({step: {} for step in saved}, recipe.train)
    return min(len(saved), len(left) + (recipe.train.keep_best is not None and recipe.train.keep_last is not None))
