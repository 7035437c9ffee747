"""A recipe on a number of ranks: what the formulas take beside the model's sizes, and the memory that it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mirage_dist.objectives.base import Needs
from mirage_dist.train.planning import memory
from mirage_dist.train.planning.costs.lengths import Lengths, padded
from mirage_dist.train.planning.facts import Facts, head_rows
from mirage_dist.train.planning.memory import Place

# Parts that are there all the time, those of forward and backward, and those of the update.
STATES = ("weights", "gradients", "optimizer")
ALWAYS = (*STATES, "secondary weights", "reference", "buckets")
PASSES = ("gathered weights", "activations, about", "loss head", "reduction")
UPDATE = ("update",)


@dataclass(frozen=True)
class Setting:
    """How a model is trained. gpus: ranks of a node. packed: whether rows are. zero: DeepSpeed's `zero_optimization`.

    reference: as in the recipe; None where the objective compares with none. workspace: bytes of the loss head's logits.
    """

    ranks: int
    gpus: int
    global_batch: int
    micro_batch: int
    checkpointing: bool
    packed: bool
    reference: str | None
    cached_vision: bool
    zero: Mapping[str, Any]
    workspace: int = memory.WORKSPACE

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.gpus)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step."""
        return max(1, self.global_batch // (self.micro_batch * self.ranks))

    @property
    def partition(self) -> int:
        """Ranks that hold hpZ's second copy of the weights together; 1 without hpZ."""
        given = self.zero.get("zero_hpz_partition_size", 1)
        return min(self.gpus, self.ranks) if given == "auto" else int(given)

    def width(self, lengths: Mapping[str, Lengths]) -> float | None:
        """Tokens of a row as it is computed on average: padded to the longest of its micro-batch; None where packed."""
        return None if self.packed else padded(lengths, self.micro_batch)


def parts(facts: Facts, at: Setting, needs: Needs, lengths: Mapping[str, Lengths]) -> dict[str, tuple[Place, str]]:
    """Memory of the rank that has most, by part, at the longest rows: name -> (place, note)."""
    zero, ranks, item = at.zero, at.ranks, facts.item
    trained, own = facts.trained, [size for group in facts.trained.groups for size in group]
    made: dict[str, tuple[Place, str]] = {}
    weights = memory.weights(facts.sizes, item, zero, ranks, facts.quantized)
    dtype = {2: "bf16", 4: "fp32"}[item]
    made["weights"] = (
        weights,
        f"{dtype}{', 4-bit base' if facts.quantized else ''}, ZeRO-{zero['stage']}, ranks: {ranks}",
    )
    gradients = memory.gradients(trained.groups, zero, ranks, item, at.accumulation > 1)
    kept = "float32" if zero["stage"] == 3 else f"{dtype}{', the sum and the newest' if at.accumulation > 1 else ''}"
    made["gradients"] = gradients, kept
    optimizer = memory.optimizer(trained.groups, trained.states, trained.elementwise, zero, ranks)
    made["optimizer"] = optimizer, "float32 master copy and the optimizer's state"
    if at.partition > 1:
        second = memory.secondary(facts.sizes, item, at.partition)
        made["secondary weights"] = second, f"hpZ, among {at.partition} ranks of a node"
    gathered = memory.gathered(facts.sizes, item, zero, facts.largest, facts.differentiable, at.checkpointing)
    made["gathered weights"] = gathered, "whole parameters between forward and backward"
    made["buckets"] = memory.buckets(item, zero), "reduce buckets"
    made["reduction"] = memory.reduction(own, item, zero, ranks), "a bucket that is being reduced"
    made["activations, about"] = _activations(facts, at, lengths)
    if responses := at.micro_batch * head_rows(needs, lengths):
        kl = bool(needs.distributions)
        peak = memory.loss_head(responses, facts.vocabulary, facts.width, item, kl, facts.head_trains, at.workspace)
        made["loss head"] = Place(peak), f"{responses:,} rows, vocabulary {facts.vocabulary:,}"
    if at.reference == "engine":
        made["reference"] = memory.weights(facts.reference, item, zero, ranks), "a second, frozen model"
    flat = memory.update(trained.groups, zero, ranks, item)
    if not trained.elementwise:
        flat += memory.exchange(trained.groups, zero["stage"], ranks)
    made["update"] = flat, "not at the same time as activations"
    return {name: pair for name, pair in made.items() if pair[0] != Place() or name in STATES}


def _activations(facts: Facts, at: Setting, lengths: Mapping[str, Lengths]) -> tuple[Place, str]:
    longest = {name: own.longest for name, own in lengths.items()}
    width = max(longest.values())
    if at.packed:
        tokens, words = at.micro_batch * sum(longest.values()), "packed"
    else:
        tokens, words = at.micro_batch * len(longest) * width, f"{at.micro_batch * len(longest)} rows of {width}"
    kept = memory.activations(facts.text, tokens, width, facts.depth, facts.item, facts.eager, at.checkpointing)
    pictures = min(
        tokens, at.micro_batch * sum(own.pictured > 0 for own in lengths.values()) * facts.work.picture_tokens
    )
    kept += memory.around(facts.text, tokens, pictures, facts.connector, facts.item)
    how = "layer inputs only" if at.checkpointing else "everything"
    return Place(kept), f"{tokens:,} tokens ({words}), {facts.depth} layers, {how}"


def peak(made: Mapping[str, tuple[Place, str]]) -> Place:
    """What is held at once at most: the states, and either forward and backward or the update."""

    def summed(names: tuple[str, ...]) -> Place:
        return sum((made[name][0] for name in names if name in made), Place())

    always, passes, update = summed(ALWAYS), summed(PASSES), summed(UPDATE)
    return always + max(passes, update, key=lambda place: place.device)


def states(made: Mapping[str, tuple[Place, str]]) -> Place:
    """Weights, gradients and optimizer: what ZeRO's paper calls model states (Rajbhandari et al., 2020, section 3)."""
    return sum((made[name][0] for name in STATES), Place())
