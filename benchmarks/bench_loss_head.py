"""The loss head that a training step calls against its peers: time and peak memory of a forward and backward.

    python benchmarks/bench_loss_head.py --device cpu
    python benchmarks/bench_loss_head.py --device cuda        # bfloat16, LLaVA-1.5-7B and larger vocabularies

A batch is M rows of hidden states of which N predict a response token. `linear_token_logps` computes the
log-probabilities of those N; a mean cross entropy (CE) or NPO's forget loss on top gives the loss. The eager versions
compute the logits of all M rows as a Hugging Face model does; those named "selected" select the N rows first. Every
version gets the same rows and labels and must give the reference's loss and gradients of hidden states and weight, or
it is reported as different and not timed. A version that cannot run on the device is reported as missing.

The versions take turns: a round times each of them once (CPU) or `--calls` times (GPU), after a first round that does
not count. Times are medians over rounds; "times as fast as eager" is the median over rounds of the ratio to the eager
version of the same loss in the same round, with the smallest and largest, so that noise can be seen. On a CPU the ratio
of processor times is given too, which other processes on the machine affect less; on a GPU the time that the host takes
to queue a call, which is hidden where the device has other work. The floor is the version's matrix
products on N rows and nothing else: three, four where logits are computed twice, two where the weight is frozen. Memory
is the peak beyond what existed before and the gradients.

Writes benchmarks/results/loss_head_DEVICE.json and prints the tables in Markdown. `pip install liger-kernel
cut-cross-entropy` adds those peers.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import common
import torch
from common import MIB
from loss_versions import CASES, LOSSES, Batch, Case, Missing, Step, Version, versions
from torch import Tensor

from mirage_dist.kernels.steer import steer_mse

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
IDLE_CYCLES = 10_000_000  # some 5 ms, longer than a host takes to queue one call
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative error of a loss or of a gradient


def floors(batch: Batch) -> dict[int, Callable[[], None]]:
    """2, 3 and 4 matrix products on the labelled rows, into tensors that exist already."""
    hidden, weight = batch.hidden.detach()[batch.index], batch.weight.detach()
    dz = torch.randn(batch.case.labelled, batch.case.vocabulary, device=hidden.device).to(hidden.dtype)
    logits, dhidden, dweight = torch.empty_like(dz), torch.empty_like(hidden), torch.empty_like(weight)

    def run(products: int) -> None:
        for _ in range(2 if products == 4 else 1):
            torch.mm(hidden, weight.T, out=logits)
        torch.mm(dz, weight, out=dhidden)
        if products > 2:
            torch.mm(dz.T, hidden, out=dweight)

    return {n: functools.partial(run, n) for n in (2, 3, 4)}


def reference(batch: Batch, loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients of hidden states and weight in float32, written plainly, 1024 rows at a time."""
    selected, labels = (x.detach() for x in batch.selected())
    hidden, weight = (x.float().requires_grad_() for x in (selected, batch.weight.detach()))

    def logps(part: slice) -> Tensor:
        return (hidden[part] @ weight.T).log_softmax(1).gather(1, labels[part, None]).squeeze(1)

    parts = [slice(first, first + 1024) for first in range(0, len(labels), 1024)]
    with torch.no_grad():
        logp = torch.cat([logps(part) for part in parts])
    logp.requires_grad_()
    value = LOSSES[loss](logp, batch)
    (upstream,) = torch.autograd.grad(value, logp)
    for part in parts:
        logps(part).backward(upstream[part])
    assert hidden.grad is not None
    assert weight.grad is not None
    dhidden = torch.zeros_like(batch.hidden, dtype=torch.float32).index_copy_(0, batch.index, hidden.grad)
    return value.detach(), dhidden, weight.grad


def step(batch: Batch, forward: Step) -> Tensor:
    batch.clear()
    loss = forward()
    loss.backward()
    return loss.detach()


def errors(batch: Batch, value: Tensor, exact: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Relative errors of the loss and of the worse gradient (a frozen weight has none)."""
    pairs = zip((batch.hidden.grad, batch.weight.grad), exact[1:], strict=True)
    return {
        "loss_error": ((value - exact[0]).abs() / exact[0].abs()).item(),
        "gradient_error": max(((g.float() - x).norm() / x.norm()).item() for g, x in pairs if g is not None),
    }


def time_once(function: Callable[[], object], device: str, calls: int) -> dict[str, float]:
    """Milliseconds of one call. On a CPU also the processor's; on a GPU the median of so many calls, of the device and,
    until all of a call's kernels are queued, of the host.
    """
    if device == "cpu":
        start, processor = time.perf_counter(), time.process_time()
        function()
        return {
            "ms": 1000 * (time.perf_counter() - start),
            "processor_ms": 1000 * (time.process_time() - processor),
        }
    # The device idles until the host has queued the whole call, as it does behind the layers of a model; before each
    # call the cache is filled with other contents. A version whose host waits for the device is timed with its gaps.
    flush = torch.empty(256 * MIB, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    host = []
    for begin, end in events:
        flush.zero_()
        torch.cuda._sleep(IDLE_CYCLES)
        begin.record()
        start = time.perf_counter()
        function()
        host.append(1000 * (time.perf_counter() - start))
        end.record()
        torch.cuda.synchronize()
    return {"ms": median(begin.elapsed_time(end) for begin, end in events), "host_ms": median(host)}


def take_turns(
    functions: Mapping[str, Callable[[], object]], device: str, rounds: int, calls: int
) -> dict[str, dict[str, list[float]]]:
    """{function: {quantity: its value in each round}}, quantities as in `time_once`; a first round does not count."""
    spent: dict[str, dict[str, list[float]]] = {name: {} for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            for quantity, milliseconds in time_once(function, device, calls).items():
                if number:
                    spent[name].setdefault(quantity, []).append(milliseconds)
    return spent


def extra_memory(batch: Batch, forward: Step, device: str) -> float:
    """Peak MiB of tensors that a step allocates, beyond what existed before and the gradients."""
    batch.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(batch, forward)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        # The allocator's own record: the process's resident memory depends on what malloc keeps.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(batch, forward)
        results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
        events = [e for e in results.events() if e.name() == "[memory]"]
        changes = sorted((e.start_ns(), number, e.nbytes()) for number, e in enumerate(events))
        peak = max(itertools.accumulate(size for _, _, size in changes))
    return (peak - batch.gradient_bytes) / MIB


def checked(batch: Batch, version: Version, exact: tuple[Tensor, Tensor, Tensor], device: str) -> tuple[Step, dict]:
    """The version's forward with its errors and its memory. Raises when it cannot run or gives something else."""
    forward = version.make(batch)
    measured: dict[str, Any] = errors(batch, step(batch, forward), exact)
    worst = max(measured.values())
    if version.exact and not worst <= TOLERANCES[batch.case.dtype]:
        raise ValueError(f"differs from the reference by {worst:.1e}")
    batch.weight.requires_grad_(not version.frozen)  # for `gradient_bytes`
    measured["extra_mib"] = extra_memory(batch, forward, device)
    batch.weight.requires_grad_(True)
    batch.clear()
    return forward, measured


def measure(case: Case, device: str, rounds: int, calls: int, profile: bool) -> dict[str, Any]:
    """Floors and versions of one case: errors, memory, and times by turns. profile: print ours' profiles."""
    batch = Batch(case, device)
    exact = {loss: reference(batch, loss) for loss in LOSSES}
    entries: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for version in versions(case, device):
        try:
            forward, entries[version.name] = checked(batch, version, exact[version.loss], device)
            steps[version.name] = functools.partial(step, batch, forward)
        except Exception as error:  # a peer that fails is a row of the table, not the end of the run
            reason = str(error) if isinstance(error, (Missing, ValueError)) else f"{type(error).__name__}: {error}"
            entries[version.name] = {"missing": reason.splitlines()[0]}
            batch.clear()
    del exact
    products = floors(batch)
    spent = take_turns({**{f"{n} products": run for n, run in products.items()}, **steps}, device, rounds, calls)
    for name, run in steps.items():
        if profile and name.startswith("linear_token_logps"):
            print(f"\n{case.name}, {name}\n{common.profile(run, device, rows=8)}", flush=True)
    floor_ms = {n: median(spent[f"{n} products"]["ms"]) for n in products}
    for version in versions(case, device):
        if version.name not in steps:
            continue
        entry, own = entries[version.name], spent[version.name]
        entry |= {quantity: median(milliseconds) for quantity, milliseconds in own.items()}
        entry |= {"floor_ms": floor_ms[version.products], "rounds": own}
        baseline = spent.get(version.baseline, {})
        for quantity, slow in baseline.items():
            entry[f"times_eager_{quantity}"] = [a / b for a, b in zip(slow, own[quantity], strict=True)]
    return {"case": case.title, "name": case.name, "floor_ms": floor_ms, "versions": entries}


def measure_steering(device: str, rounds: int, calls: int) -> dict[str, Any]:
    """steer_mse on every row of a layer's activations, against plain PyTorch and against a copy of as many bytes."""
    rows, hidden, dtype = (16_384, 4096, torch.bfloat16) if device == "cuda" else (10_240, 1024, torch.float32)
    generator = torch.Generator().manual_seed(0)
    act = torch.randn(1, rows, hidden, generator=generator).to(device, dtype).requires_grad_()
    target, mask = torch.randn(hidden, generator=generator).to(device), torch.ones(1, rows, device=device)
    other = torch.empty_like(act)

    def ours() -> None:
        act.grad = None
        steer_mse(act, target, mask.flatten()).backward()

    def plain() -> None:
        act.grad = None
        ((act.float() - target).square().mean(-1) * mask).sum().backward()

    def copy() -> None:
        other.copy_(act.detach())

    spent = take_turns({"copy": copy, "plain": plain, "steer_mse": ours}, device, rounds, calls)
    ms = {name: median(quantities["ms"]) for name, quantities in spent.items()}
    return {
        "case": f"steer_mse: {rows} rows, D={hidden}, {str(dtype).removeprefix('torch.')}",
        **{f"{name}_ms": milliseconds for name, milliseconds in ms.items()},
        "rounds": spent,
        "of_copy_bandwidth": ms["copy"] / ms["steer_mse"],
    }


def table(result: dict[str, Any]) -> str:
    """One case in Markdown."""
    floors_ms = ", ".join(f"{n} products {ms:.2f} ms" for n, ms in result["floor_ms"].items())
    rows = []
    for name, entry in result["versions"].items():
        if "ms" not in entry:
            rows.append([name, f"missing: {entry['missing']}", "", "", "", "", ""])
            continue
        ratios, processor = entry.get("times_eager_ms"), entry.get("times_eager_processor_ms")
        other = f"{entry['host_ms']:.2f}" if "host_ms" in entry else f"{median(processor):.2f}" if processor else ""
        rows.append(
            [
                name,
                f"{entry['ms']:.2f}",
                f"{median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})" if ratios else "",
                other,
                f"{entry['ms'] / entry['floor_ms']:.2f}",
                f"{entry['extra_mib']:.1f}",
                f"{max(entry['loss_error'], entry['gradient_error']):.1e}",
            ]
        )
    second = "host ms" if any("host_ms" in entry for entry in result["versions"].values()) else "in processor time"
    head = ["version", "ms", "times as fast as eager", second, "× floor", "MiB beyond gradients"]
    head.append("largest error")
    return f"**{result['case']}** (floors: {floors_ms})\n\n{common.markdown(head, rows)}"


def targets(results: list[dict[str, Any]], steering: dict[str, Any], device: str) -> list[tuple[str, bool]]:
    """The goals of the loss head on the cases that were run, and whether each is met."""
    judged: list[tuple[str, bool]] = []
    by_name = {r["name"]: r["versions"] for r in results}

    def entry(case: str, version: str) -> dict[str, Any]:
        return by_name.get(case, {}).get(version, {})

    def eager_ratio(case: str, version: str) -> float | None:
        ratios = entry(case, version).get("times_eager_ms")
        return median(ratios) if ratios else None

    def floor_ratio(case: str, version: str) -> float | None:
        measured = entry(case, version)
        return measured["ms"] / measured["floor_ms"] if "ms" in measured else None

    def judge(what: str, value: float | None, at_least: float | None = None, at_most: float | None = None) -> None:
        if value is not None:
            met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
            bound = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
            judged.append((f"{what} {bound} (is {value:.2f})", met))

    if device == "cpu":
        small = ", 12 MiB"
        for loss in LOSSES:
            name = f"linear_token_logps {loss}"
            judge(f"response rows, {loss}: times as fast as eager", eager_ratio("response", name), at_least=8)
            what = f"response rows, {loss}{small}: times as fast as eager"
            judge(what, eager_ratio("response", name + small), at_least=8)
            extra = entry("response", name + small).get("extra_mib")
            judge(f"response rows, {loss}{small}: MiB beyond the gradients", extra, at_most=10)
            judge(f"all rows, {loss}: times as fast as eager", eager_ratio("all", name), at_least=0.9)
        return judged
    ours = "linear_token_logps CE"
    for case in ("all_4k_128k", "all_128k", "all_152k"):
        judge(f"{case}: time over the floor of 4 products", floor_ratio(case, ours), at_most=1.3)
    judge("llava: ms", entry("llava", ours).get("ms"), at_most=1.6)
    for loss in LOSSES:
        name = f"linear_token_logps {loss}"
        judge(f"llava, {loss}: times as fast as eager", eager_ratio("llava", name), at_least=5)
    liger_ms, our_ms = (entry("llava", name).get("ms") for name in ("Liger CE", ours))
    if liger_ms is not None and our_ms is not None:
        judge("llava: times as fast as Liger", liger_ms / our_ms, at_least=6)
    judge("llava: MiB beyond the gradients", entry("llava", ours).get("extra_mib"), at_most=0.3 * 1024)
    judge("steer_mse: share of copy bandwidth", steering["of_copy_bandwidth"], at_least=0.75)
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", nargs="+", help="only these; " + ", ".join(c.name for d in CASES.values() for c in d))
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--calls", type=int, default=10, help="of a version in a round, on a GPU")
    parser.add_argument("--profile", action="store_true", help="print where the time of our versions goes")
    parsed = parser.parse_args()
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    result: dict[str, Any] = {
        **common.record(parsed.device, PACKAGES, sys.argv[1:], torch.get_num_threads()),
        "rounds": parsed.rounds,
        "calls_per_round": parsed.calls if parsed.device == "cuda" else 1,
        "cases": [],
    }
    for case in CASES[parsed.device]:
        if parsed.case is None or case.name in parsed.case:
            result["cases"].append(measure(case, parsed.device, parsed.rounds, parsed.calls, parsed.profile))
            print(table(result["cases"][-1]), "\n", flush=True)
            common.write(f"loss_head_{parsed.device}", result)  # what is measured is kept if the rest is cut off
    result["steering"] = measure_steering(parsed.device, parsed.rounds, parsed.calls)
    print(
        "{case}: {steer_mse_ms:.2f} ms, plain PyTorch {plain_ms:.2f} ms, copy {copy_ms:.2f} ms".format(
            **result["steering"]
        )
    )
    result["targets"] = common.say_targets(targets(result["cases"], result["steering"], parsed.device))
    result["hardware"] |= common.load("load_after")
    common.write(f"loss_head_{parsed.device}", result)


if __name__ == "__main__":
    main()
