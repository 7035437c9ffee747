"""The ranks of an allocation together: bandwidth of the collectives that ZeRO makes, slow ranks and links, clocks.

Bandwidths are bus bandwidths, which do not depend on the number of ranks n: bytes / second × 2 (n - 1) / n for an
all-reduce, (n - 1) / n for an all-gather or reduce-scatter of that many bytes in all (nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from mirage_dist.doctor.checks import Context, Verdict, failed, not_here, ok, warning
from mirage_dist.ranks import barrier, everyones

MIB = 1 << 20
SIZES = {"cuda": 256 * MIB, "cpu": 8 * MIB}  # bytes in one collective
CALLS = {"cuda": 10, "cpu": 3}
PRODUCTS = {"cuda": (4096, 20), "cpu": (512, 4)}  # width of a square product, and how many are timed at once
ROUNDS = 5  # the fastest counts, so that other work for a moment does not
SLOW_COMPUTE = {"cuda": 0.85, "cpu": 0.4}  # of the others' median: a rank below it is named
SLOW_LINK = 0.5
SLOW_NCCL = 5e9  # bytes/s of bus bandwidth: of a 7B model ZeRO-3 moves some 40 GB a step and GPU
CLOCK_WARNING, CLOCK_FAILURE = 1.0, 60.0  # seconds; MUNGE, which Slurm trusts, refuses 300
ALONE = "one process; start it on the allocation: srun launch/node.sh doctor, or launch/local.sh N doctor"


def straggler(values: Sequence[float], share: float) -> int | None:
    """The index of the least of these speeds where it is below `share` of the others' median; None for none."""
    if len(values) < 2:
        return None
    least = min(range(len(values)), key=values.__getitem__)
    others = [value for number, value in enumerate(values) if number != least]
    return least if values[least] < share * median(others) else None


def _timed(context: Context, work: Callable[[], object], calls: int) -> float:
    """Seconds of one call of `work`, the least of `ROUNDS` rounds; all ranks begin a round together."""
    import torch

    gpu, best = context.group.device.type == "cuda", float("inf")
    work()  # connects, compiles, allocates
    for number in range(ROUNDS):
        barrier(context.group, f"round {number}")
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / calls)
    return best


def compute(context: Context) -> Verdict:
    """Matrix products: names a rank that is slow by itself, such as a GPU that is hot or capped."""
    import torch

    device = context.group.device
    width, count = PRODUCTS[device.type]
    left = torch.randn(width, width, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    out = torch.empty_like(left)
    seconds = _timed(context, lambda: torch.mm(left, left, out=out), count)
    speeds = everyones(context.group, 2 * width**3 / seconds / 1e12)
    text = f"{median(speeds):.3g} TFLOP/s a rank (products of {width} × {width})"
    values = {"teraflops": speeds}
    if (slow := straggler(speeds, SLOW_COMPUTE[device.type])) is not None:
        return warning(
            f"{context.peers[slow]} is slow: {speeds[slow]:.3g} TFLOP/s, the others {median(speeds):.3g}",
            "every step waits for it: look at its temperature, clocks and other processes, or exclude the node",
            **values,
        )
    return ok(text, **values)


def all_reduce(context: Context) -> Verdict:
    import torch.distributed as dist

    def prepared(whole: Any, _: Any) -> Callable[[], object]:
        return lambda: dist.all_reduce(whole)

    return _collective(context, prepared, 2.0)


def all_gather(context: Context) -> Verdict:
    import torch.distributed as dist

    return _collective(context, lambda whole, part: lambda: dist.all_gather_into_tensor(whole, part), 1.0)


def reduce_scatter(context: Context) -> Verdict:
    import torch.distributed as dist

    return _collective(context, lambda whole, part: lambda: dist.reduce_scatter_tensor(part, whole), 1.0)


def _collective(context: Context, prepared: Callable[[Any, Any], Callable[[], object]], factor: float) -> Verdict:
    import torch

    group = context.group
    if group.size == 1:
        return not_here(ALONE)
    count = SIZES[group.device.type] // 4 // group.size * group.size
    whole = torch.zeros(count, device=group.device)
    part = torch.zeros(count // group.size, device=group.device)
    try:
        seconds = _timed(context, prepared(whole, part), CALLS[group.device.type])
    except RuntimeError as error:
        return failed(
            f"ends with an error: {str(error).splitlines()[0]}",
            "NCCL_DEBUG=INFO shows what NCCL tries; MIRAGE_INTERFACE names the network between nodes",
        )
    # A collective ends at about the same time everywhere, so the slowest rank's time is the collective's.
    seconds = max(everyones(group, seconds))
    speed = factor * (group.size - 1) / group.size * 4 * count / seconds
    hosts = len({peer.host for peer in context.peers})
    backend = "NCCL" if group.device.type == "cuda" else "gloo"
    text = (
        f"{speed / 1e9:.2f} GB/s by {backend} over {group.size} ranks on {hosts} host{'s' if hosts > 1 else ''} "
        f"({4 * count / MIB:.0f} MiB in {1000 * seconds:.1f} ms)"
    )
    values = {"bytes_per_second": speed, "bytes": 4 * count, "seconds": seconds, "backend": backend}
    if backend == "NCCL" and speed < SLOW_NCCL:
        return warning(
            f"{text}: ZeRO-3 will wait for it",
            "NCCL_DEBUG=INFO shows the transport; MIRAGE_INTERFACE=ib0 names the network; ask for whole nodes",
            **values,
        )
    return ok(text, **values)


def links(context: Context) -> Verdict:
    """Every rank sends to the next one at the same time: names a link that is slower than its like.

    Links within a host are compared with each other, and those between hosts.
    """
    import torch
    import torch.distributed as dist

    group = context.group
    if group.size == 1:
        return not_here(ALONE)
    sent = torch.zeros(SIZES[group.device.type] // 16, device=group.device)
    received = torch.empty_like(sent)
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size

    def around() -> None:
        send, receive = dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)
        # Of two, one sends first: over gloo both would otherwise wait for the other.
        for request in dist.batch_isend_irecv([send, receive] if group.rank % 2 else [receive, send]):
            request.wait()

    seconds = _timed(context, around, CALLS[group.device.type])
    speeds = everyones(group, sent.nbytes / seconds)  # of the link from the rank before
    kinds: dict[str, list[int]] = {"within hosts": [], "between hosts": []}
    for number, peer in enumerate(context.peers):
        kinds["within hosts" if context.peers[number - 1].host == peer.host else "between hosts"].append(number)
    values = {"bytes_per_second": speeds}
    for kind, members in kinds.items():
        slow = straggler([speeds[number] for number in members], SLOW_LINK) if len(members) > 2 else None
        if slow is not None:
            number = members[slow]
            return warning(
                f"from {context.peers[number - 1]} to {context.peers[number]}: {speeds[number] / 1e9:.2f} GB/s, other "
                f"links {kind} {median(speeds[m] for m in members) / 1e9:.2f}",
                "exclude the host that is named in every such line (sbatch --exclude), and report it",
                **values,
            )
    text = ", ".join(_of_links(kind, [speeds[m] for m in members]) for kind, members in kinds.items() if members)
    return ok(text, **values)


def _of_links(kind: str, speeds: Sequence[float]) -> str:
    return f"{median(speeds) / 1e9:.2f} GB/s {kind} (least {min(speeds) / 1e9:.2f})"


def clocks(context: Context) -> Verdict:
    """How far the hosts' clocks are apart, to the precision of a barrier."""
    group = context.group
    if len({peer.host for peer in context.peers}) == 1:
        return not_here("one host")
    rounds = []
    for number in range(ROUNDS):
        barrier(group, f"clocks, round {number}")
        rounds.append(everyones(group, time.time()))
    skews = [median(times[rank] - times[0] for times in rounds) for rank in range(group.size)]
    return judged_clocks(context, skews)


def judged_clocks(context: Context, skews: Sequence[float]) -> Verdict:
    """skews: seconds by which each rank's clock is ahead of rank 0's."""
    worst = max(range(len(skews)), key=lambda rank: abs(skews[rank] - median(skews)))
    apart = abs(skews[worst] - median(skews))
    values = {"seconds": list(skews)}
    if apart <= CLOCK_WARNING:
        return ok(f"at most {apart:.2g} s apart", **values)
    text = f"the clock of {context.peers[worst]} is {apart:.3g} s off"
    remedy = "the host's time service (chronyd, ntpd) is to be started; times in logs and files mislead"
    return (failed if apart > CLOCK_FAILURE else warning)(text, remedy, **values)
