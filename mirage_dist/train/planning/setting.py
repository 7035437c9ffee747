"""A recipe on a number of ranks: what the formulas take beside the model's sizes, and the memory that it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mirage_dist.kernels.logprob import WORKSPACE_MB
from mirage_dist.kernels.projection import CONVERTED_BYTES
from mirage_dist.objectives.base import Needs
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.planning import sharding
from mirage_dist.train.planning.costs import memory
from mirage_dist.train.planning.costs.facts import Facts, head_rows
from mirage_dist.train.planning.costs.lengths import Lengths, padded
from mirage_dist.train.planning.costs.memory import Place

STATES = ("weights", "gradients", "optimizer")
REDUCED = "a bucket of gradients and those of one layer"
# Parts that are there all the time.
ALWAYS = ("weights", "optimizer", "secondary weights", "reference")


@dataclass(frozen=True)
class Setting:
    """How a model is trained. gpus: ranks of a node. packed: whether rows are. zero: DeepSpeed's `zero_optimization`.

    reference: as in the recipe; None where the objective compares with none. fp32: the model's dtype. on_cpu: that it
    runs on a CPU, whose loss head has a smaller workspace, whose dropout keeps masks in the model's dtype, and where a
    page counts from when it is written.
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
    fp32: bool = False
    on_cpu: bool = False

    @classmethod
    def of(cls, recipe: TrainRecipe, needs: Needs, ranks: int, gpus: int, zero: Mapping[str, Any]) -> Setting:
        """Of a resolved recipe, at one row of each stream where its micro-batch is still `auto`."""
        return cls(
            ranks=ranks,
            gpus=gpus,
            global_batch=recipe.train.global_batch,
            micro_batch=1 if recipe.train.micro_batch == "auto" else recipe.train.rows,
            checkpointing=recipe.model.gradient_checkpointing,
            packed=recipe.data.packing is True,
            reference=recipe.reference if needs.reference else None,
            cached_vision=recipe.data.cache_vision,
            zero=zero,
            fp32=recipe.train.dtype == "fp32",
        )

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
        given = self.zero.get(sharding.KEY, 1)
        size = min(self.gpus, self.ranks) if given == "auto" else int(given)
        return size if size < self.ranks and self.ranks % size == 0 else 1

    def width(self, lengths: Mapping[str, Lengths]) -> float | None:
        """Tokens of a row as it is computed on average: padded to the longest of its micro-batch; None where packed."""
        return None if self.packed else padded(lengths, self.micro_batch)


def parts(facts: Facts, at: Setting, needs: Needs, lengths: Mapping[str, Lengths]) -> dict[str, tuple[Place, str]]:
    """Memory of the rank that has most, by part, at the longest rows: name -> (place, note)."""
    zero, ranks, item = at.zero, at.ranks, facts.item
    trained, bucket = facts.trained, memory.bucket(zero, "reduce_bucket_size")
    made: dict[str, tuple[Place, str]] = {}
    weights = memory.weights(facts.sizes, item, zero, ranks, facts.quantized)
    dtype = {2: "bf16", 4: "fp32"}[item]
    made["weights"] = (
        weights,
        f"{dtype}{', 4-bit base' if facts.quantized else ''}, ZeRO-{zero['stage']}, {ranks} rank{'s' * (ranks > 1)}",
    )
    gradients = memory.gradients(trained.groups, zero, ranks, item, at.accumulation > 1)
    made["gradients"] = gradients, "float32"
    optimizer = memory.optimizer(trained.groups, trained.states, trained.elementwise, zero, ranks)
    made["optimizer"] = optimizer, "float32 master copy and the optimizer's state"
    if at.partition > 1:
        second = memory.secondary(facts.sizes, item, at.partition)
        made["secondary weights"] = second, f"hpZ, among {at.partition} ranks of a node"
    gathered = memory.gathered(facts.sizes, item, zero, ranks, facts.largest)
    made["gathered weights"] = gathered, "whole parameters of the module that runs, and ahead"
    made["buckets"] = memory.buckets(item, zero), "reduce buckets"
    made["activations, about"] = _activations(facts, at, lengths)
    if responses := at.micro_batch * head_rows(needs, lengths):
        kl = bool(needs.kl)
        size, space = facts.vocabulary * facts.width, WORKSPACE_MB["cpu" if at.on_cpu else "cuda"] << 20
        held = memory.loss_head(responses, facts.vocabulary, facts.width, item, kl, facts.head_trains, space)
        if needs.distributions and not kl:  # the teacher's logits
            held += responses * facts.vocabulary * memory.FP32
        if at.on_cpu and item != memory.FP32:
            held += min(CONVERTED_BYTES, size * memory.FP32)  # blocks of the weight, in float32
        made["loss head"] = Place(held), f"{responses:,} rows, vocabulary {facts.vocabulary:,}"
        if facts.head_trains and size > bucket:
            own = memory.reduction(size, item, zero, ranks, alone=True, on_cpu=at.on_cpu)
            made["its gradient"] = own, "after the loss head"
    wide = Place(memory.backward(facts.text, _tokens(at, lengths)[0], item))
    made["reduction"] = wide + memory.reduction(min(bucket, trained.elements), item, zero, ranks), REDUCED
    if at.reference == "engine":
        frozen = memory.weights(facts.reference, item, zero, ranks)
        made["reference"] = frozen + memory.secondary(facts.reference, item, at.partition), "a second, frozen model"
    flat = memory.update(trained.groups, zero, ranks, item)
    if not trained.elementwise:
        flat += memory.exchange(trained.groups, zero["stage"], ranks)
    made["update"] = flat, "when nothing is left of activations"
    return {name: pair for name, pair in made.items() if pair[0] != Place() or name in STATES}


def _activations(facts: Facts, at: Setting, lengths: Mapping[str, Lengths]) -> tuple[Place, str]:
    tokens, width, words = _tokens(at, lengths)
    adapters = None
    if facts.adapted is not None:
        inputs, inner, drops = facts.adapted
        adapters = memory.Adapters(inputs, inner, (facts.item if at.on_cpu else 1) if drops else 0)
    text, depth, item = facts.text, facts.depth, facts.item
    kept = memory.activations(text, tokens, width, depth, item, facts.eager, at.checkpointing, adapters)
    shown = at.micro_batch * sum(own.pictured > 0 for own in lengths.values())
    kept += memory.around(text, tokens, min(tokens, shown * facts.work.picture_tokens), facts.connector, item)
    how = "layer inputs only" if at.checkpointing else "everything"
    return Place(kept), f"{tokens:,} tokens ({words}), {depth} layers, {how}"


def _tokens(at: Setting, lengths: Mapping[str, Lengths]) -> tuple[int, int, str]:
    """Tokens of a micro-batch of the longest rows, with how many one is compared, and how the rows stand, in words."""
    longest = [own.longest for own in lengths.values()]
    if at.packed:
        tokens = at.micro_batch * sum(longest)
        # On a GPU the probabilities of eager attention are those of all tokens of a packed row with each other.
        return tokens, max(longest) if at.on_cpu else tokens, "packed"
    rows = at.micro_batch * len(longest)
    return rows * max(longest), max(longest), f"{rows} rows of {max(longest)}"


def peak(made: Mapping[str, tuple[Place, str]], at: Setting) -> Place:
    """What is held at once at most: in the loss head, in the backward pass, or in the update.

    Gradients of stage 2 exist from the first reduction on; those of stage 3 and its buckets always.
    """

    def part(*names: str) -> Place:
        return sum((made[name][0] for name in names if name in made), Place())

    always, gradients = part(*ALWAYS), part("gradients")
    passes = part("activations, about", "gathered weights", "buckets")
    before = during = gradients
    if at.zero["stage"] != 3 and not gradients.host:
        # Before the first reduction of a step none is there, and of a float32 model the second one never is.
        before = Place() if at.accumulation == 1 else Place(gradients.device // (2 if at.fp32 else 1))
        if at.on_cpu and at.accumulation == 1:
            during = Place()  # it is allocated whole, but its pages are taken as layers are done with their activations
    moments = [
        before + passes + part("loss head"),
        during + passes + part("its gradient"),
        during + passes + part("reduction"),
        gradients + part("update") + (part("buckets") if at.zero["stage"] == 3 else Place()),
    ]
    return always + max(moments, key=lambda place: place.device)


def states(made: Mapping[str, tuple[Place, str]]) -> Place:
    """Weights, gradients and optimizer: what ZeRO's paper calls model states (Rajbhandari et al., 2020, section 3)."""
    return sum((made[name][0] for name in STATES), Place())
