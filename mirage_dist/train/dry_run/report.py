"""What a dry run measured, and what follows from it for the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from mirage_dist.model.load import DTYPES
from mirage_dist.ranks import Group, place
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.plan import kept_checkpoints

# Of the measured peak: what the allocator loses to fragments in a long run, and batches of other shapes.
MARGIN = 1.05
TIGHT = 0.92  # of the device's memory
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Rank:
    """What one rank measured: bytes and seconds by phase. reserved: of PyTorch's allocator on a GPU, at most."""

    rank: int
    host: str
    peaks: dict[str, int]
    reserved: int
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        """Bytes that a run of this recipe takes on this rank, with the margin for a long one."""
        return int(MARGIN * max(self.reserved, *self.peaks.values()))


@dataclass(frozen=True)
class Measured:
    """steps: seconds of each. caches, checkpoint: bytes on disk, caches of the dry run's few samples only.

    parameters: of the model. differing: what a load did not give back. free: bytes on the disk. longest: tokens, by
    stream. share: of an average micro-batch in the dry run's.
    """

    steps: list[float]
    skipped: int
    checkpoint: int
    caches: int
    parameters: int
    differing: list[str]
    free: int
    longest: dict[str, int] = field(default_factory=dict)
    share: float = 1.0


def rows(feed: Feed) -> int:
    """Rows of each stream in a micro-batch."""
    return feed.recipe.train.rows


def text(feed: Feed, measured: Measured, every: Sequence[Rank], total: int, group: Group) -> str:
    """The report, a line a finding."""
    steps = feed.steps
    most = max(every, key=lambda rank: rank.peak)
    shapes = ", ".join(f"{name} {rows(feed)} × {tokens}" for name, tokens in measured.longest.items())
    gpu = group.device.type == "cuda"
    out = [
        f"dry run: two steps of the longest samples on {group.size} × {group.device.type}",
        _row("micro-batch", f"{shapes} tokens"),
        _row("peak memory", f"{size(most.peak)} of {size(total)} ({most.peak / total:.0%})", _whose(most, group)),
    ]
    out += [_row(f"  {name}", size(max(rank.peaks.get(name, 0) for rank in every))) for name in most.peaks]
    if gpu and most.peak > TIGHT * total:
        out.append(_row("", f"above {TIGHT:.0%}: a long run may fail; lower train.micro_batch or use checkpointing"))
    slowest = {name: max(rank.seconds.get(name, 0.0) for rank in every) for name in most.seconds}
    step, save = measured.steps[-1], slowest.get("save", 0.0)
    out.append(_row("step", f"{step:.2f} s", f"the first {measured.steps[0]:.2f} s"))
    if measured.skipped:
        out.append(_row("", f"{measured.skipped} of the steps had a gradient that is not finite; see train.lr"))
    same = "bitwise what was saved" if not measured.differing else f"NOT what was saved: {measured.differing[0]}"
    out.append(_row("save", f"{save:.2f} s", size(measured.checkpoint)))
    out.append(_row("load", f"{slowest.get('load', 0.0):.2f} s", same))
    out += _duration(feed, measured, slowest)
    out += _disk(feed, measured)
    out.append(f"nothing of the run was touched; start it without train.dry_run ({steps} steps)")
    return "\n".join(out)


def _duration(feed: Feed, measured: Measured, slowest: dict[str, float]) -> list[str]:
    train, steps, step = feed.recipe.train, feed.steps, measured.steps[-1]
    saves = -(-steps // train.save_every) if train.save_every else 1
    # In the background only the last one is waited for.
    saving = slowest.get("save", 0.0) * (1 if train.save_in_background else saves)
    before = slowest.get("model and engine", 0.0) + _cached(feed, measured, slowest)
    expected = before + steps * step * measured.share + saving
    most = before + steps * step + saving
    end = datetime.now() + timedelta(seconds=expected)
    note = f"until {end:%Y-%m-%d %H:%M} if it starts now; at most {_time(most)}, if all samples were the longest"
    return [
        _row("the whole run", f"about {_time(expected)}", note),
        _row("", f"{steps} steps; an average batch has {measured.share:.0%} of this one's positions"),
    ]


def _cached(feed: Feed, measured: Measured, slowest: dict[str, float]) -> float:
    """Seconds until the reference and vision caches of the whole data are filled, by those of a micro-batch."""
    seconds = 0.0
    if feed.needs.ref_logp and feed.recipe.reference == "cache":
        batches = sum(len(feed.samples[name]) for name in feed.needs.ref_logp) / rows(feed)
        seconds += slowest.get("reference", 0.0) * batches / len(feed.needs.ref_logp) / place()[2] * measured.share
    if feed.recipe.data.cache_vision:
        batches = max(map(len, feed.samples.values())) / rows(feed)
        seconds += slowest.get("vision cache", 0.0) * batches / place()[2]
    return seconds


def _disk(feed: Feed, measured: Measured) -> list[str]:
    recipe = feed.recipe
    kept = kept_checkpoints(recipe, feed.steps) + 1
    export = (
        0 if recipe.train.export in ("off", "adapter") else measured.parameters * DTYPES[recipe.train.dtype].itemsize
    )
    samples = sum(map(len, feed.samples.values()))
    caches = int(measured.caches * samples / (rows(feed) * len(feed.samples)))
    needed = kept * measured.checkpoint + export + caches
    note = f"{kept} checkpoints, one of them while it is written; export {size(export)}; caches {size(caches)}"
    short = "" if needed <= measured.free else "  MORE THAN IS FREE: lower train.keep_last, or free space"
    return [_row("disk", f"{size(needed)} of {size(measured.free)} free{short}", note)]


def size(number: float) -> str:
    """Bytes in words."""
    unit = 0
    while number >= 1024 and unit + 1 < len(UNITS):
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {UNITS[unit]}" if unit else f"{number:.0f} B"


def _whose(rank: Rank, group: Group) -> str:
    return f"of rank {rank.rank} on {rank.host}" if group.size > 1 else ""


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<24}{value}" + (f"  ({note})" if note else "")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
