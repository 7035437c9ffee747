"""What the parts of one training process share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from mirage_dist.objectives.base import Objective
from mirage_dist.ranks import Group
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.lease import Lease


class Identity(TypedDict):
    """What the run's manifest and the manifest of every checkpoint agree on; world_size is of this start."""

    config_hash: str
    base_hash: str
    wandb_id: str
    world_size: int


@dataclass(frozen=True)
class Run:
    """One process of a run, from the moment its model is loaded.

    engine: DeepSpeed's, of the policy. deepspeed: its completed configuration. lease: held by rank 0; on the other
    ranks it names the same directories.
    """

    recipe: TrainRecipe
    group: Group
    objective: Objective
    feed: Feed
    engine: Any
    deepspeed: dict[str, Any]
    manifest: Identity
    lease: Lease

    @property
    def root(self) -> Path:
        """The run directory."""
        return self.lease.root
