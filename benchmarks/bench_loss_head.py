"""The loss head against its peers: time and peak memory of a forward and backward, and the products' floor.

    python benchmarks/bench_loss_head.py --device cpu
    python benchmarks/bench_loss_head.py --device cuda        # bfloat16, LLaVA-1.5-7B and larger vocabularies

A batch is M rows of hidden states of which N predict a response token. Every version gets the same rows and labels and
must leave the gradients of hidden states and weight; ours select the N rows first, and so do the versions named
"selected". The floor is the same three matrix products on N rows and nothing else, timed in the same run (four products
where logits are made twice, two where the weight is frozen). Peers that are not installed, or have no backend for the
device, are named as missing. Each version is timed in two rounds; a time is the median over both, and the medians of
either are shown so that noise can be seen. Memory is the peak beyond what was there before and the gradients.

Writes benchmarks/results/loss_head_DEVICE.json and prints the tables in Markdown. `pip install liger-kernel
cut-cross-entropy` adds the peers.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import common
import torch
import torch.nn.functional as F
from common import MIB
from loss_versions import CASES, Batch, Case, Loss, versions
from torch import Tensor

from mirage_dist.kernels.steer import steer_mse

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")


def floors(batch: Batch) -> dict[int, Callable[[], None]]:
    """2, 3 and 4 matrix products on the wanted rows, into tensors that are there."""
    hidden, weight = batch.hidden.detach()[batch.index], batch.weight.detach()
    dz = torch.randn(batch.case.wanted, batch.case.vocabulary, device=hidden.device).to(hidden.dtype)
    logits, dhidden, dweight = torch.empty_like(dz), torch.empty_like(hidden), torch.empty_like(weight)

    def run(products: int) -> None:
        for _ in range(2 if products == 4 else 1):
            torch.mm(hidden, weight.T, out=logits)
        torch.mm(dz, weight, out=dhidden)
        if products > 2:
            torch.mm(dz.T, hidden, out=dweight)

    return {n: functools.partial(run, n) for n in (2, 3, 4)}


def reference(batch: Batch) -> list[Tensor]:
    """Gradients of the mean cross entropy in float32, written plainly, a thousand rows at a time."""
    hidden, labels = batch.selected()
    hidden = hidden.detach().float().requires_grad_()
    weight = batch.weight.detach().float().requires_grad_()
    for first in range(0, len(labels), 1024):
        part = slice(first, first + 1024)
        (F.cross_entropy(hidden[part] @ weight.T, labels[part], reduction="sum") / len(labels)).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [torch.zeros_like(batch.hidden, dtype=torch.float32).index_copy_(0, batch.index, hidden.grad), weight.grad]


def step(batch: Batch, loss: Loss) -> None:
    batch.clear()
    loss().backward()


def times(function: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls, after a first one that does not count."""
    function()
    if device == "cpu":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            found.append(1000 * (time.perf_counter() - start))
        return found
    # The host only queues, so that it is the device that is timed; between calls the cache fills with other contents.
    flush = torch.empty(256 * MIB, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def extra_memory(batch: Batch, loss: Loss, device: str) -> float:
    """Peak MiB of tensors that a step makes, beyond what was there before and the gradients."""
    step(batch, loss)
    batch.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(batch, loss)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        # The allocator's own record: what the process has resident depends on what malloc keeps.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(batch, loss)
        told = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((e.start_ns(), number, e.nbytes()) for number, e in enumerate(told) if e.name() == "[memory]")
        peak = max(itertools.accumulate(size for _, _, size in changes))
    return (peak - batch.gradient_bytes) / MIB


def measure(case: Case, device: str, repeats: int) -> dict[str, Any]:
    batch = Batch(case, device)
    losses: dict[str, Loss] = {}
    result: dict[str, Any] = {"case": case.title, "name": case.name, "floor_ms": {}, "versions": {}}
    told = result["versions"]
    chosen = versions(case)
    exact = reference(batch)
    for version in chosen:
        told[version.name] = {"rounds_ms": [], "all_ms": []}  # in the order of the table
        try:
            losses[version.name] = version.make(batch)
            step(batch, losses[version.name])
            if version.checked:
                told[version.name]["gradient_error"] = worst(batch, exact)
        except Exception as error:  # a peer that fails is a row of the table, not the end of the run
            losses.pop(version.name, None)
            why = f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("Missing: ")
            told[version.name] = {"missing": why}
        batch.clear()
    del exact
    products = floors(batch)
    floor: dict[int, list[float]] = {n: [] for n in products}
    for _ in range(2):
        for n, run in products.items():
            floor[n] += times(run, device, repeats)
        for name, loss in losses.items():
            spent = times(lambda loss=loss: step(batch, loss), device, repeats)
            told[name]["rounds_ms"].append(median(spent))
            told[name]["all_ms"] += spent
            batch.clear()
    del products
    result["floor_ms"] = {n: median(spent) for n, spent in floor.items()}
    for version in chosen:
        entry = told[version.name]
        if version.name in losses:
            entry["ms"] = median(entry.pop("all_ms"))
            entry["floor_ms"] = result["floor_ms"][version.products]
            batch.weight.requires_grad_("frozen" not in version.name)  # what its gradients are
            entry["extra_mib"] = extra_memory(batch, losses[version.name], device)
            batch.weight.requires_grad_(True)
    return result


def worst(batch: Batch, exact: list[Tensor]) -> float:
    """The larger relative error of the two gradients; of one, where the weight is frozen."""
    pairs = zip((batch.hidden.grad, batch.weight.grad), exact, strict=True)
    return max(((g.float() - x).norm() / x.norm()).item() for g, x in pairs if g is not None)


def measure_steering(device: str, repeats: int) -> dict[str, Any]:
    """steer_mse on every row of a layer's activations, against plain torch and against a copy of as many bytes."""
    rows, hidden, dtype = (16_384, 4096, torch.bfloat16) if device == "cuda" else (10_240, 1024, torch.float32)
    generator = torch.Generator().manual_seed(0)
    act = torch.randn(1, rows, hidden, generator=generator).to(device, dtype).requires_grad_()
    target, mask = torch.randn(hidden, generator=generator).to(device), torch.ones(1, rows, device=device)
    other = torch.empty_like(act)

    def ours() -> None:
        act.grad = None
        steer_mse(act, target, None, mask.flatten()).backward()

    def plainly() -> None:
        act.grad = None
        ((act.float() - target).square().mean(-1) * mask).sum().backward()

    def copy() -> None:
        other.copy_(act.detach())

    rounds = [[median(times(f, device, repeats)) for f in (copy, plainly, ours)] for _ in range(2)]
    copied, written, fused = (median(x) for x in zip(*rounds, strict=True))
    return {
        "case": f"steer_mse: {rows} rows, D={hidden}, {str(dtype).removeprefix('torch.')}",
        "copy_ms": copied,
        "plain_ms": written,
        "steer_mse_ms": fused,
        "rounds_ms": rounds,
        "of_copy_bandwidth": copied / fused,
    }


def table(result: dict[str, Any]) -> str:
    baseline = result["versions"]["eager"].get("ms")
    floors_ms = ", ".join(f"{n} products {ms:.1f} ms" for n, ms in result["floor_ms"].items())
    lines = [
        f"**{result['case']}** (floors: {floors_ms})",
        "",
        "| version | ms | rounds | × eager | × floor | MiB beyond gradients | gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in result["versions"].items():
        if "ms" not in entry:
            lines.append(f"| {name} | missing: {entry['missing']} | | | | | |")
            continue
        cells = (
            f"{entry['ms']:.1f}",
            " / ".join(f"{x:.1f}" for x in entry["rounds_ms"]),
            "" if baseline is None else f"{baseline / entry['ms']:.2f} faster",
            f"{entry['ms'] / entry['floor_ms']:.2f}",
            f"{entry['extra_mib']:.1f}",
            f"{entry['gradient_error']:.1e}" if "gradient_error" in entry else "",
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets(results: list[dict[str, Any]], steering: dict[str, Any], device: str) -> list[tuple[str, bool]]:
    """What the loss head should reach, on the cases that were run."""
    found: list[tuple[str, bool]] = []
    by_name = {r["name"]: r["versions"] for r in results}

    def ratio(case: str, slow: str, fast: str) -> float | None:
        pair = [by_name.get(case, {}).get(x, {}).get("ms") for x in (slow, fast)]
        return None if None in pair else pair[0] / pair[1]

    def floor(case: str, name: str) -> float | None:
        entry = by_name.get(case, {}).get(name, {})
        return entry["ms"] / entry["floor_ms"] if "ms" in entry else None

    def judge(what: str, value: float | None, met: Callable[[float], bool]) -> None:
        if value is not None:
            found.append((f"{what} (is {value:.2f})", met(value)))

    if device == "cpu":
        small = next((n for n in by_name.get("response", {}) if n.startswith("linear_ce,")), "")
        judge(
            "response rows: linear_ce >= 8 x faster than eager",
            ratio("response", "eager", "linear_ce"),
            lambda x: x >= 8,
        )
        judge("response rows: and in the small workspace", ratio("response", "eager", small), lambda x: x >= 8)
        extra = by_name.get("response", {}).get(small, {}).get("extra_mib")
        judge("response rows: MiB beyond the gradients <= 10 in the small workspace", extra, lambda x: x <= 10)
        judge("all rows: linear_ce within 1.1 x eager's time", ratio("all", "linear_ce", "eager"), lambda x: x <= 1.1)
        return found
    for case in ("all_4k_128k", "all_128k", "all_152k"):
        judge(f"{case}: linear_ce <= 1.25 x floor", floor(case, "linear_ce"), lambda x: x <= 1.25)
        judge(f"{case}: recompute <= 1.3 x floor", floor(case, "linear_token_logps, recompute"), lambda x: x <= 1.3)
    cached = "linear_token_logps, cached"
    judge("llava: cached, ms <= 1.6", by_name.get("llava", {}).get(cached, {}).get("ms"), lambda x: x <= 1.6)
    judge("llava: cached >= 5 x faster than eager", ratio("llava", "eager", cached), lambda x: x >= 5)
    judge("llava: linear_ce >= 6 x faster than Liger", ratio("llava", "Liger", "linear_ce"), lambda x: x >= 6)
    extra = by_name.get("llava", {}).get("linear_ce", {}).get("extra_mib")
    judge("llava: linear_ce, MiB beyond the gradients <= 307", extra, lambda x: x <= 0.3 * 1024)
    judge("steer_mse >= 0.75 of copy bandwidth", steering["of_copy_bandwidth"], lambda x: x >= 0.75)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", nargs="+", help="only these; " + ", ".join(c.name for d in CASES.values() for c in d))
    parser.add_argument("--repeats", type=int, default=None, help="calls timed in a round: 7 on a CPU, 30 on a GPU")
    parsed = parser.parse_args()
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    repeats = parsed.repeats or (30 if parsed.device == "cuda" else 7)
    result: dict[str, Any] = {
        **common.record(parsed.device, PACKAGES, sys.argv[1:], torch.get_num_threads()),
        "repeats": repeats,
        "cases": [],
    }
    for case in CASES[parsed.device]:
        if parsed.case is None or case.name in parsed.case:
            result["cases"].append(measure(case, parsed.device, repeats))
            print(table(result["cases"][-1]), "\n", flush=True)
    result["steering"] = measure_steering(parsed.device, repeats)
    print(
        "{case}: {steer_mse_ms:.2f} ms, plain torch {plain_ms:.2f} ms, copy {copy_ms:.2f} ms".format(
            **result["steering"]
        )
    )
    judged = targets(result["cases"], result["steering"], parsed.device)
    result["targets"] = common.say_targets(judged)
    common.write(f"loss_head_{parsed.device}", result)


if __name__ == "__main__":
    main()
