"""What fits: the largest micro-batch, the smallest cluster, and what to change, in order, when a run does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mirage_dist.model.adapters import quantization
from mirage_dist.objectives.base import Objective
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.schema.training import LoraConfig
from mirage_dist.train.optimizers import base as optimizers
from mirage_dist.train.planning import batch, setting
from mirage_dist.train.planning.check import check_reference
from mirage_dist.train.planning.costs import memory
from mirage_dist.train.planning.costs.facts import Facts, facts
from mirage_dist.train.planning.costs.hardware import GIB, Hardware
from mirage_dist.train.planning.costs.lengths import Lengths
from mirage_dist.train.planning.setting import Setting

LARGEST = 8192  # GPUs that are tried


@dataclass(frozen=True)
class Case:
    """A recipe with its DeepSpeed `zero_optimization`, its sizes, and how it is trained."""

    recipe: TrainRecipe
    objective: Objective
    sizes: Facts
    at: Setting
    lengths: Mapping[str, Lengths]

    @property
    def parts(self) -> dict[str, tuple[memory.Place, str]]:
        return setting.parts(self.sizes, self.at, self.objective.needs, self.lengths)

    @property
    def peak(self) -> int:
        """Bytes of a GPU's memory at the peak."""
        return setting.peak(self.parts, self.at).device

    def fits(self, on: Hardware) -> bool:
        """Whether GPU and host have the memory."""
        held = setting.peak(self.parts, self.at)
        host = held.host * min(self.at.gpus, self.at.ranks)
        return held.device <= on.usable and host <= on.host_memory_gib * GIB


@dataclass(frozen=True)
class Change:
    """One change of the recipe, by itself and with all changes before it. keys: what to write on the command line.

    alone, together: bytes of a GPU's memory at the peak; None where it cannot be had by itself. fits: together.
    """

    name: str
    keys: tuple[str, ...]
    alone: int | None
    together: int
    fits: bool
    note: str = ""


def largest_micro_batch(case: Case, on: Hardware) -> int:
    """The largest micro-batch that fits and divides a rank's share of the global batch; 0 when no row fits."""
    share = case.at.global_batch // case.at.ranks
    fitting = [size for size in batch.divisors(share) if replace(case, at=replace(case.at, micro_batch=size)).fits(on)]
    return max(fitting, default=0)


def smallest(case: Case, on: Hardware) -> Case | None:
    """The fewest GPUs on which the recipe fits, with the largest micro-batch up to its own that does; None for none.

    Tried are 1, 2, 4, … GPUs of one node and then whole nodes; where the global batch does not divide by them, a
    multiple of their number stands for it.
    """
    for ranks in numbers(on.gpus_per_node):
        size = batch.rounded(case.at.global_batch, ranks)
        tried = replace(case, at=replace(case.at, ranks=ranks, gpus=on.gpus_per_node, global_batch=size, micro_batch=1))
        largest = largest_micro_batch(tried, on)
        if largest:
            micro = batch.choose(size, ranks, min(largest, case.at.micro_batch))
            return replace(tried, at=replace(tried.at, micro_batch=micro))
    return None


def numbers(gpus: int) -> Iterator[int]:
    """1, 2, 4, … GPUs of one node, then 1, 2, 4, … nodes."""
    ranks = 1
    while ranks < gpus:
        yield ranks
        ranks *= 2
    ranks = gpus
    while ranks <= LARGEST:
        yield ranks
        ranks *= 2


def changes(case: Case, on: Hardware, zero: Callable[[str], Mapping[str, Any]]) -> list[Change]:
    """What to change, in order, until the recipe fits, each computed; all of them when even together they do not.

    zero: the `zero_optimization` of a DeepSpeed JSON of ours, by the file's path.
    """
    made: list[Change] = []
    current = case
    for name, keys, change, note in _steps(case, on, zero):
        alone, together = _tried(change, case), _tried(change, current)
        if together is None or (alone is not None and alone.peak >= case.peak and together.peak >= current.peak):
            continue
        current = together
        fits = current.fits(on)
        made.append(Change(name, keys, None if alone is None else alone.peak, current.peak, fits, note))
        if fits:
            break
    return made


def _tried(change: Callable[[Case], Case | None], case: Case) -> Case | None:
    try:
        return change(case)
    except ConfigError:
        return None  # not together with what the recipe has


def _steps(
    case: Case, on: Hardware, zero: Callable[[str], Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[str, ...], Callable[[Case], Case | None], str]]:
    recipe, at = case.recipe, case.at
    if not recipe.model.gradient_checkpointing:
        yield (
            "gradient checkpointing",
            ("model.gradient_checkpointing=true",),
            lambda c: _model(c, gradient_checkpointing=True),
            "a third more operations",
        )
    if at.micro_batch > 1:
        depends = case.objective.needs.depends_on_micro_batch(at.packed)
        yield (
            "micro-batch 1",
            ("train.micro_batch=1",),
            lambda c: replace(c, at=replace(c.at, micro_batch=1)),
            "another loss: this objective depends on it" if depends else "the same loss",
        )
    if not at.packed:
        yield (
            "packing",
            ("data.packing=true",),
            lambda c: replace(c, at=replace(c.at, packed=True)),
            "where the model keeps packed sequences apart; "
            + ("another loss" if case.objective.needs.depends_on_micro_batch(False) else "the same loss"),
        )
    if at.reference == "engine":
        yield "reference from a cache", ("reference=cache",), lambda c: _reference(c, "cache"), "the same loss"
        yield "reference without adapters", ("reference=adapters_off",), lambda c: _reference(c, "adapters_off"), ""
    if recipe.model.lora is None:
        yield (
            "LoRA",
            ("model.lora.rank=128", "model.lora.alpha=256", *_untrained(recipe)),
            lambda c: _model(c, lora=LoraConfig(), train=None, freeze=[]),
            "another method: adapters train, not the model",
        )
    if at.zero["stage"] == 3 and memory.place_of(at.zero, "offload_optimizer") == "none":
        file = "configs/deepspeed/zero3_offload.json"
        yield (
            "offload optimizer and weights",
            (f"deepspeed={file}",),
            lambda c: _offloaded(c, zero(file)),
            "slower: the host's memory and PCIe",
        )

    def more(c: Case) -> Case | None:
        least = smallest(c, on)
        return None if least is None or least.at.ranks <= c.at.ranks else least

    if (larger := more(case)) is not None:
        name = f"more GPUs: {larger.at.ranks}"
        keys = (f"--nodes {larger.at.nodes}", f"--gpus {min(larger.at.gpus, larger.at.ranks)}")
        if larger.at.global_batch != at.global_batch:
            keys += (f"train.global_batch={larger.at.global_batch}",)
        if at.micro_batch > larger.at.micro_batch:
            keys += (f"train.micro_batch={larger.at.micro_batch}",)
        yield name, keys, lambda c: _spread(c, larger.at), ""
    if not quantization.wanted(recipe.model):
        keys = ("model.lora.load_in_4bit=true", "deepspeed=configs/deepspeed/zero2.json", *_untrained(recipe))
        yield "QLoRA", keys, lambda c: _quantized(c, zero("configs/deepspeed/zero2.json")), "another method; ZeRO-2"


def _untrained(recipe: TrainRecipe) -> list[str]:
    """Keys that leave it to the adapters what trains."""
    given = {"model.train=null": recipe.model.train is not None, "model.freeze=[]": bool(recipe.model.freeze)}
    return [key for key, needed in given.items() if needed]


def _spread(case: Case, larger: Setting) -> Case:
    """The case on the ranks of a larger setting, with its batch."""
    micro = batch.choose(larger.global_batch, larger.ranks, min(case.at.micro_batch, larger.micro_batch))
    sizes = {"ranks": larger.ranks, "gpus": larger.gpus, "global_batch": larger.global_batch, "micro_batch": micro}
    return replace(case, at=replace(case.at, **sizes))


def _offloaded(case: Case, zero: Mapping[str, Any]) -> Case | None:
    """Raises ConfigError for an optimizer that cannot be offloaded."""
    if case.at.zero["stage"] != 3:
        return None
    optimizers.make(case.recipe.train.optimizer).check(zero)
    return replace(case, at=replace(case.at, zero=zero))


def _facts(recipe: TrainRecipe, case: Case) -> Facts:
    """Those of a changed recipe, with the pictures of the case."""
    made, work = facts(recipe, case.objective), case.sizes.work
    return replace(made, work=replace(made.work, patches=work.patches, picture_tokens=work.picture_tokens))


def _model(case: Case, **fields: Any) -> Case:
    recipe = replace(case.recipe, model=replace(case.recipe.model, **fields))
    at = replace(case.at, checkpointing=recipe.model.gradient_checkpointing)
    return replace(case, recipe=recipe, sizes=_facts(recipe, case), at=at)


def _reference(case: Case, kind: Any) -> Case:
    recipe = replace(case.recipe, reference=kind)
    check_reference(recipe, case.objective.needs)
    return replace(case, recipe=recipe, sizes=_facts(recipe, case), at=replace(case.at, reference=kind))


def _quantized(case: Case, zero: Mapping[str, Any]) -> Case:
    lora = replace(case.recipe.model.lora or LoraConfig(), load_in_4bit=True)
    made = _model(case, lora=lora, train=None, freeze=[])
    return replace(made, at=replace(made.at, zero=zero))
