"""How long a step and the whole run take: operations at a share of the peak, transfers on links, bytes on disks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mirage_dist.objectives.base import Needs
from mirage_dist.train.planning.costs import communication, flops, memory
from mirage_dist.train.planning.costs.communication import Transfer
from mirage_dist.train.planning.costs.facts import Facts
from mirage_dist.train.planning.costs.flops import Operations
from mirage_dist.train.planning.costs.hardware import GB, TERA, Hardware
from mirage_dist.train.planning.costs.lengths import Lengths
from mirage_dist.train.planning.setting import Setting


@dataclass(frozen=True)
class Step:
    """One optimizer step. policy, reference: operations of all ranks. compute, update, host: seconds of one rank.

    beside: of transfers that run beside forward and backward; after: of those that do not. host: of what offloading
    moves between GPU and host memory, taken not to overlap.
    """

    policy: Operations
    reference: Operations
    compute: float
    update: float
    host: float
    beside: float
    after: float
    tokens: float
    transfers: list[Transfer]

    @property
    def least(self) -> float:
        """Seconds when transfers hide behind computation as far as that lasts."""
        return max(self.compute, self.beside) + self.rest

    @property
    def most(self) -> float:
        """Seconds when none of them does."""
        return self.compute + self.beside + self.rest

    @property
    def rest(self) -> float:
        return self.update + self.host + self.after

    def mfu(self, ranks: int, on: Hardware) -> float:
        """Operations of the model alone, by the peak, in the least time (Chowdhery et al., 2022, appendix B)."""
        return self.policy.model / (self.least * ranks * on.tflops * TERA)


def step(facts: Facts, at: Setting, on: Hardware, needs: Needs, lengths: Mapping[str, Lengths]) -> Step:
    """Of mean rows; every rank is taken to have as much as any other."""
    width = at.width(lengths)
    computed = at.reference in ("engine", "adapters_off")
    together = None if facts.flash else at.micro_batch * sum(own.mean for own in lengths.values())
    policy, reference = flops.step(
        facts.work, lengths, needs, at.global_batch, width, at.checkpointing, computed, at.cached_vision, together
    )
    own = memory.largest_share(facts.trained.groups, at.zero["stage"], at.ranks)
    transfers = communication.transfers(facts, at)
    seconds = [(one.overlaps, one.seconds(on, at.gpus)) for one in transfers]
    offloaded = memory.place_of(at.zero, "offload_optimizer") != "none"
    # Fused AdamW reads four float32 numbers of each element and writes three; before it the gradient is copied flat and
    # its norm is read, after it the weights are written.
    update = own * (40 + facts.item) / (on.memory_gb_s * GB)
    host = 0.0
    if offloaded:
        update = own * 28 / (on.host_gb_s * GB / min(at.gpus, at.ranks))
        host += own * (memory.FP32 + facts.item) / (on.pcie_gb_s * GB)
    if at.zero["stage"] == 3 and memory.place_of(at.zero, "offload_param") != "none":
        host += 2 * at.accumulation * facts.elements * facts.item / at.ranks / (on.pcie_gb_s * GB)
    return Step(
        policy=policy,
        reference=reference,
        compute=(policy.all + reference.all) / at.ranks / on.rate,
        update=update,
        host=host,
        beside=sum(time for overlaps, time in seconds if overlaps),
        after=sum(time for overlaps, time in seconds if not overlaps),
        tokens=at.global_batch * sum(own.mean for own in lengths.values()),
        transfers=transfers,
    )


@dataclass(frozen=True)
class Run:
    """The whole run in seconds. caching: the reference's log-probabilities, before the first step.

    save: until a checkpoint is on the disk; waiting: how long training stands still for it. saves: their number.
    """

    steps: int
    training: float
    caching: float
    save: float
    waiting: float
    saves: int
    export: float

    @property
    def seconds(self) -> float:
        return self.training + self.caching + self.saves * self.waiting + self.export


def run(
    facts: Facts,
    at: Setting,
    on: Hardware,
    needs: Needs,
    lengths: Mapping[str, Lengths],
    one: Step,
    steps: int,
    saves: int,
    checkpoint: int,
    export: int,
    background: bool,
) -> Run:
    """checkpoint, export: bytes. background: whether a save only waits for the copy to host memory."""
    write = on.written_gb_s(at.nodes) * GB
    save = checkpoint / write
    waiting = checkpoint / at.ranks / (on.pcie_gb_s * GB) if background else save
    operations = 0.0
    if at.reference == "cache":
        width = at.width(lengths)
        for name in needs.ref_logp:
            own = lengths[name]
            each = flops.reference_row(facts.work, own, width, own.response, at.cached_vision)
            operations += each.all * own.samples
    caching, exporting = operations / at.ranks / on.rate, export / write  # by all ranks
    return Run(steps, steps * one.least, caching, save, waiting, saves, exporting)
