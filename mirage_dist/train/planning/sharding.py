"""How ZeRO-3 lays parameters over nodes: the secondary partition of hpZ (ZeRO++, Wang et al., 2023, arXiv 2306.10209).

With `zero_hpz_partition_size` each group of so many ranks keeps a second copy of the weights, cut among its own ranks.
The first forward of a step gathers what trains from all ranks. Every later gather of that step, such as those of the
backward pass and of further micro-batches, and every gather of frozen weights, stays within the group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mirage_dist.progress import log
from mirage_dist.ranks import Group, everyones
from mirage_dist.schema import ConfigError
from mirage_dist.schema.names import shown

KEY = "zero_hpz_partition_size"


def idle(zero: Mapping[str, Any]) -> bool:
    """Whether this is stage 3 without offload, which has nothing to do for one process."""
    return zero.get("stage") == 3 and all(
        zero.get(part, {}).get("device", "none") == "none" for part in ("offload_param", "offload_optimizer")
    )


def secondary(zero: Mapping[str, Any], ranks: int, node: int | None, file: Path) -> int:
    """The number of ranks that share a secondary partition; 1 for none.

    zero: the JSON's `zero_optimization`. node: ranks of a node, None where nodes are not known yet. `auto` is the ranks
    of a node. One group of all ranks would hold the same partition twice, so there is none then. Raises ConfigError for
    a number that does not fit the ranks or the nodes.
    """
    given = zero.get(KEY, 1)
    place = f"{file}: zero_optimization.{KEY}={shown(given)}"
    if given != "auto" and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise ConfigError(f"{place}: expected a whole number above 0, or auto (the ranks of a node)")
    if given != 1 and zero.get("stage") != 3:
        raise ConfigError(f"{place}: only ZeRO stage 3 has partitioned parameters; remove it, or take stage 3")
    size = (node or ranks) if given == "auto" else given
    if ranks % size:
        ways = ", ".join(str(n) for n in range(2, ranks) if ranks % n == 0)
        raise ConfigError(
            f"{place}: {ranks} ranks do not divide into groups of {size}; take auto (the ranks of a node)"
            + (f", or one of {ways}" if ways else "")
        )
    if node is not None and node % size and size % node:
        ways = ", ".join(str(n) for n in range(1, node + 1) if node % n == 0)
        raise ConfigError(f"{place}: a node has {node} ranks, so some groups would cross nodes; take auto, or {ways}")
    if size == ranks:
        size = 1
    elif node is not None and size > node:
        log.warning(f"{place}: a group spans {size // node} nodes of {node} ranks, and gathers over their network")
    if node is not None:
        whole = f"each {size} ranks hold a second copy of the weights" if size > 1 else "no second copy of the weights"
        log.info(f"hpZ: {ranks} ranks on {ranks // node} node{'s' * (ranks > node)}: {whole}")
    return size


def node_size(zero: Mapping[str, Any], group: Group) -> int | None:
    """The number of ranks of each node, where the JSON's `zero_optimization` asks for hpZ. Every rank calls this.

    Raises ConfigError, the same on every rank, when nodes have different numbers of ranks, or when the ranks of a node
    do not follow each other: DeepSpeed's groups are consecutive ranks, and would cross nodes.
    """
    return ranks_of_a_node(everyones(group, group.local_rank)) if KEY in zero else None


def ranks_of_a_node(local_ranks: Sequence[int]) -> int:
    """The length of the runs 0, 1, 2, … of which the local ranks, in the order of ranks, consist.

    Raises ConfigError when they are not such runs, or the runs differ in length.
    """
    starts = [rank for rank, local in enumerate(local_ranks) if local == 0]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], len(local_ranks)], strict=True)]
    if list(local_ranks) != [local for size in sizes for local in range(size)]:
        raise ConfigError(
            f"zero_optimization.{KEY}: the ranks of a node do not follow each other (local ranks, in the order of "
            f"ranks: {', '.join(map(str, local_ranks))}); start them with srun --distribution=block, or remove the key"
        )
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"zero_optimization.{KEY}: nodes have {', '.join(map(str, sizes))} ranks; give every node as many, or "
            "remove the key"
        )
    return sizes[0]
