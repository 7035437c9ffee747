"""What the parts of one training process share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_dist.objectives.base import Objective
from mirage_dist.ranks import Group
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.lease import Lease


@dataclass(frozen=True)
class Run:
    """One process of a run, from the moment its model is loaded.

    engine: the policy's, DeepSpeed's. deepspeed: its completed configuration. manifest: what every checkpoint repeats
    of the run's manifest (config_hash, base_hash, wandb_id) and the number of ranks (world_size).
    lease: held by rank 0; on the other ranks it names the same directories.
    """

    recipe: TrainRecipe
    group: Group
    objective: Objective
    feed: Feed
    engine: Any
    deepspeed: dict[str, Any]
    manifest: Mapping[str, Any]
    lease: Lease

    @property
    def root(self) -> Path:
        """The run directory."""
        return self.lease.root
