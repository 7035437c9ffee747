"""`train.micro_batch: auto` on GPUs: the most rows for which the plan finds room in their memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mirage_dist.ranks import Group, everyones
from mirage_dist.schema import ConfigError
from mirage_dist.train import engine
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning import advice, check, sharding
from mirage_dist.train.planning.advice import Case
from mirage_dist.train.planning.check import Checked
from mirage_dist.train.planning.costs.facts import facts, lengths_of, with_pictures
from mirage_dist.train.planning.costs.hardware import GIB, Hardware, hardware
from mirage_dist.train.planning.setting import Setting


def rows_that_fit(checked: Checked, feed: Feed, group: Group) -> int:
    """The most rows of each stream that fit on every rank's GPU; `check.UNMEASURED` on a CPU. Every rank calls this.

    Call `Feed.check_lengths` first. Raises ConfigError, the same on every rank, when not even one row fits, with the
    numbers of ranks on which one does.
    """
    own = torch.cuda.get_device_properties(group.device).total_memory if group.device.type == "cuda" else 0
    if not (memory := min(everyones(group, own))):
        return check.UNMEASURED
    node = sharding.node_size(checked.deepspeed["zero_optimization"], group)
    provisional = check.divided(checked.recipe, checked.needs, group.size)
    deepspeed = engine.deepspeed_config(provisional, group.size, len(feed.samples), node)
    return largest(case_of(checked, feed, deepspeed["zero_optimization"]), memory)


def case_of(checked: Checked, feed: Feed, zero: Mapping[str, Any]) -> Case:
    """The run as a plan has it, at one row of each stream at once."""
    recipe, needs = feed.recipe, checked.needs
    at = Setting.of(recipe, needs, checked.ranks, checked.ranks, zero)
    return Case(recipe, checked.objective, with_pictures(facts(recipe, checked.objective), feed), at, lengths_of(feed))


def largest(case: Case, memory: int) -> int:
    """The largest micro-batch that fits into `memory` bytes of a GPU and divides a rank's share; raises ConfigError."""
    on = _gpu(memory)
    if rows := advice.largest_micro_batch(case, on):
        return rows
    at = case.at
    more = [n for n in range(at.ranks + 1, at.global_batch + 1) if at.global_batch % n == 0]
    fitting = [n for n in more if replace(case, at=replace(at, ranks=n, gpus=n)).fits(on)]
    ways = f"{' or '.join(map(str, fitting))} ranks have room for one" if fitting else "nor on any number of ranks"
    raise ConfigError(
        f"train.micro_batch=auto: not even one row of each stream fits on one of {at.ranks} ranks "
        f"({case.peak / GIB:.1f} GiB of {on.usable / GIB:.1f} usable); {ways}. `mirage plan` says what else to change"
    )


def _gpu(memory: int) -> Hardware:
    """A GPU of this memory, in a host that has room; nothing else of a plan's hardware decides what fits."""
    return replace(hardware("h100"), memory_gib=memory / GIB, host_memory_gib=float("inf"))
