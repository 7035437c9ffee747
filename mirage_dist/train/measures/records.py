"""metrics.jsonl: what a step's record holds, and how its lines are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NotRequired, TypedDict

from mirage_dist import config as configs
from mirage_dist import state
from mirage_dist.progress import log
from mirage_dist.schema import ConfigError

# Keys whose values differ between two runs that compute the same.
CLOCKED = ("tokens_per_s", "tokens_per_s_gpu", "step_seconds", "memory_mib", "seconds", "slowest", "memory", "mfu")
COMPARED = ("terms", "values")  # groups whose means retention can compare
HELD_OUT = "validation.loss"  # and the one value that is no mean
RECALLED = 100


class Slowest(TypedDict):
    """The rank with the most time of its own in a step (see `timing.Stopwatch.own`); data: its wait for its batch."""

    rank: int
    host: str
    seconds: float
    data: float


class Spike(TypedDict):
    """What stood out in a step (see `spikes`), and the samples of all ranks: stream -> ids."""

    scores: dict[str, float]
    samples: dict[str, list[str]]


class Record(TypedDict):
    """One step in metrics.jsonl; null stands for a value that is not finite.

    step: from 1. terms, values: what the objective returned (see `objectives.base`), divided by the global counts;
    `values` is left out when it is empty. group_lr: the rate of each entry of train.groups, by its patterns.
    micro_batch: what `train.micro_batch` came to. skipped:
    the gradient was not finite, so no weight changed. tokens: input tokens of all ranks, without padding. padding:
    fraction of the positions. cut: samples whose answer was truncated. flops: of the real tokens of all ranks (see
    `flops`). validation: loss and tokens of the held-out stream after this step; null where a stop came before they
    were measured, until the next start adds them.

    By the clock: seconds: means over ranks by part, and `waiting`, the mean wait for the slowest one. memory: MiB, each
    the most of any rank.
    """

    step: int
    loss: float | None
    terms: dict[str, float | None]
    values: NotRequired[dict[str, float | None]]
    grad_norm: float | None
    lr: float
    micro_batch: int
    group_lr: NotRequired[dict[str, float]]
    skipped: bool
    tokens: int
    padding: float
    cut: int
    flops: float
    seconds: dict[str, float]
    slowest: NotRequired[Slowest]
    memory: dict[str, float]
    memory_mib: float
    step_seconds: NotRequired[float]
    tokens_per_s: NotRequired[float]
    tokens_per_s_gpu: NotRequired[float]
    mfu: NotRequired[float]
    validation: NotRequired[dict[str, float | None] | None]
    spike: NotRequired[Spike]


def drop_from(
    file: Path, first_step: int, out: Path, amended: Mapping[str, Any] | None = None
) -> Sequence[dict[str, Any]]:
    """Write the records of steps up to `first_step` to `out`, and return the last RECALLED; later steps are repeated.

    amended: what the record of `first_step` lacks. Raises as `records`.
    """
    kept = deque[dict[str, Any]](maxlen=RECALLED)
    with out.open("wb") as handle:
        for line, record in records(file, first_step) if file.exists() else ():
            if record["step"] > first_step:
                continue
            if amended and record["step"] == first_step:
                record |= amended
                line = state.sealed("metrics", record).encode()
            handle.write(line)
            kept.append(record)
    last = kept[-1]["step"] if kept else 0
    if last < first_step:
        log.warning(f"{file}: holds no whole record of steps {last + 1} to {first_step}; the run goes on without them")
    return kept


def records(file: Path, needed: int | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of metrics.jsonl and the object in each, without its seal.

    A killed run's last line may be cut off: what is damaged after the last whole line is left out. Raises state.Damaged
    for any other damaged line, unless all lines after it are of later steps than `needed` (None: all are needed).
    """
    damage: state.Damaged | None = None
    for number, (_, line) in enumerate(state.lines(file), 1):
        try:
            record = state.parse("metrics", line, f"{file}: line {number}")
        except state.Damaged as error:
            damage = damage or error
            continue
        if damage is not None and (needed is None or record["step"] <= needed):
            raise state.Damaged(f"{damage}. Restore the file, or delete the line to go on without its record")
        yield line, record


def held_out(measured: Mapping[str, float | None] | None) -> dict[str, float]:
    """The metric by which retention compares a record's `validation`; none where it was not measured or not finite."""
    loss = None if measured is None else measured["loss"]
    return {} if loss is None else {HELD_OUT: loss}


class Means:
    """Means of loss, terms and logged values over the steps since the last checkpoint; retention compares them.

    The held-out loss is no mean: it is that of the weights of the last step, if it was measured there.
    best: the metric that retention minimises. Raises ConfigError at the first step when no metric has that name.
    """

    def __init__(self, best: str | None) -> None:
        self.best = best
        self.values: dict[str, list[float]] = {}
        self.held_out: dict[str, float] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        grouped = {f"{group}.{name}": value for group in COMPARED for name, value in record.get(group, {}).items()}
        metrics = {"loss": record["loss"], **grouped}
        if self.best not in (None, HELD_OUT, *metrics):
            raise ConfigError(f"train.keep_best={self.best}: {configs.nearest(self.best, [*metrics, HELD_OUT])}")
        for name, value in metrics.items():
            if value is not None:  # None in a skipped step
                self.values.setdefault(name, []).append(value)
        self.held_out = held_out(record.get("validation"))

    def recall(self, file: Path, since: int, step: int) -> None:
        """Add what metrics.jsonl has of the steps after `since` up to `step`, which an earlier start made.

        Raises as `add` and `records`.
        """
        if since < step and file.exists():
            for _, record in records(file, step):
                if since < record["step"] <= step:
                    self.add(record)

    def take(self) -> dict[str, float]:
        """The means so far, and the held-out loss of the last step; the next ones start anew."""
        means = {name: fmean(values) for name, values in self.values.items()} | self.held_out
        self.values.clear()
        return means
