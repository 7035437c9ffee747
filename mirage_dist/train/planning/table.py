"""A plan as text that a user can decide by, and as one JSON object."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mirage_dist.train.planning import setting
from mirage_dist.train.planning.advice import Case
from mirage_dist.train.planning.costs.duration import Step
from mirage_dist.train.planning.costs.hardware import GIB, sources
from mirage_dist.train.planning.costs.memory import Place
from mirage_dist.train.planning.plan import Plan

VERSION = "mirage.plan/1"  # docs/planning.md has its fields; a field that changes its meaning is another version
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
COLUMNS = 100
NAME, VALUE = 26, 14  # widths of the first two columns
Rows = Mapping[str, tuple[str, str]]


def text(plan: Plan) -> str:
    """The table, at most 100 columns wide; every number in it is computed."""
    at, on = plan.case.at, plan.cluster.on
    total = plan.peak
    held = {name: (size(place.device), note) for name, (place, note) in plan.memory.items() if place.device}
    host = {name: (size(place.host), note) for name, (place, note) in plan.memory.items() if place.host}
    nvme = {name: (size(place.nvme), note) for name, (place, note) in plan.memory.items() if place.nvme}
    limit = f"of {size(on.usable)} usable ({on.memory_gib:g} GiB less {on.reserved_gib:g} for CUDA and NCCL)"
    sections: dict[str, Rows] = {
        "verdict": _verdict(plan),
        "batch": {
            "rows of each stream a step": (f"{at.global_batch:,}", _batch(plan)),
        },
        "data": _numbers(plan.data),
        "parameters": _numbers(plan.parameters),
        "memory of one rank": {**held, "at the peak": (size(total.device), limit)},
    }
    if total.host:
        node = min(at.gpus, at.ranks)
        whole = f"a rank; {size(total.host * node)} of {size(on.host_memory_gib * GIB)} a node"
        sections["host memory of one rank"] = {**host, "sum": (size(total.host), whole)}
    if nvme:
        sections["NVMe of one rank"] = nvme
    sections["one step"] = _step(plan)
    if at.ranks > 1:
        sections["exchanged in a step, by each rank"] = _exchanged(plan)
    sections["the whole run"] = _run(plan)
    sections["disk"] = {name: (size(number), note) for name, (number, note) in plan.disk.items() if number}
    if plan.changes:
        sections["what to change, in this order (each with those before it)"] = _changes(plan)
    sections["computed with"] = _assumptions(plan)
    lines = [_title(plan), "Everything here is computed from sizes and data sheets; nothing was measured.", ""]
    lines += [line for caution in plan.cautions for line in _wrapped(f"CAUTION: {caution}", "")]
    for title, rows in sections.items():
        lines.append(title)
        for name, (value, note) in rows.items():
            lines += _row(name, value, note)
    return "\n".join(lines)


def _row(name: str, value: str, note: str) -> list[str]:
    head = f"  {name:<{NAME}}{value:>{VALUE}}  "
    if len(head) + len(note) <= COLUMNS:
        return [(head + note).rstrip()]
    first, *rest = _wrapped(note, "", COLUMNS - len(head))
    return [head + first, *(" " * len(head) + line for line in rest)]


def _wrapped(words: str, indent: str, columns: int = COLUMNS) -> list[str]:
    return textwrap.wrap(words, columns, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _title(plan: Plan) -> str:
    at, recipe = plan.case.at, plan.case.recipe
    adapters = recipe.model.lora
    how = "full" if adapters is None else f"{'QLoRA' if adapters.load_in_4bit else 'LoRA'} of rank {adapters.rank}"
    nodes = f"{at.nodes} node{'s' if at.nodes > 1 else ''}"
    name = recipe.objective["name"].upper()
    return f"{name}, {how}, ZeRO-{at.zero['stage']}, on {at.ranks} × {plan.cluster.on.name} ({nodes})"


def _verdict(plan: Plan) -> dict[str, tuple[str, str]]:
    on, case = plan.cluster.on, plan.case
    peak = plan.peak.device
    free = on.usable - peak
    fits = "fits" if plan.fits else "DOES NOT FIT"
    if free < 0:
        words = f"{size(peak)} of {size(on.usable)} a GPU: {size(-free)} too much"
    elif not plan.fits:
        words = "the host's memory is too small for what is offloaded"
    else:
        words = f"{size(peak)} of {size(on.usable)} a GPU: {size(free)} are free"
    rows = {"memory": (fits, words)}
    if plan.smallest is None:
        rows["smallest that fits"] = "none", f"of this recipe on {on.name}, up to 8192"
    else:
        least = plan.smallest
        batch = "" if least.at.global_batch == case.at.global_batch else f", train.global_batch={least.at.global_batch}"
        rows["smallest that fits"] = (
            f"{least.at.ranks} GPU{'s' if least.at.ranks > 1 else ''}",
            f"{least.at.nodes} node{'s' if least.at.nodes > 1 else ''}; train.micro_batch={least.at.micro_batch}{batch}"
            f"; {size(least.peak)} a GPU",
        )
    rows["time"] = span(plan.run.seconds), f"{plan.run.steps:,} steps of {_range(plan.step)} and what is around them"
    price = plan.cluster.price
    cost = "give --price for a cost" if price is None else f"cost {plan.gpu_hours * price:,.2f} at {price:g} a GPU-hour"
    rows["GPU-hours"] = f"{plan.gpu_hours:,.1f}", cost
    return rows


def _batch(plan: Plan) -> str:
    at = plan.case.at
    return f"= {at.ranks} rank{'s' * (at.ranks > 1)} × micro-batch {at.micro_batch} × accumulation {at.accumulation}"


def _step(plan: Plan) -> dict[str, tuple[str, str]]:
    step, on, at = plan.step, plan.cluster.on, plan.case.at
    policy, share = step.policy, f"at {on.utilization:.0%} of {on.tflops:g} TFLOP/s"
    rows = {
        "forward and backward": (flop(policy.forward + policy.backward), "of the decoder and the connector, all ranks"),
        "vision tower": (flop(policy.tower), ""),
        "loss head": (flop(policy.head), "on response rows only"),
        "computed again": (flop(policy.recomputed), "by gradient checkpointing"),
        "reference": (flop(step.reference.all), "in every step"),
        "computing": (seconds(step.compute), share),
        "update": (seconds(step.update), "reading and writing optimizer state once"),
        "offloading": (seconds(step.host), "between GPU and host memory"),
        "communication": (seconds(step.beside), "beside forward and backward"),
        "communication after it": (seconds(step.after), "nothing else runs"),
        "a step": (_range(step), "all communication that can hides behind computing, or none does"),
        "tokens a second": (f"{step.tokens / step.least:,.0f}", f"{step.tokens / step.least / at.ranks:,.0f} a GPU"),
        "MFU": (f"{step.mfu(at.ranks, on):.1%}", "of the model's own operations, at the shorter time"),
    }
    optional = ("vision tower", "computed again", "reference", "offloading", "communication", "communication after it")
    empty = {flop(0), seconds(0)}
    return {name: pair for name, pair in rows.items() if name not in optional or pair[0] not in empty}


def _exchanged(plan: Plan) -> dict[str, tuple[str, str]]:
    at, on = plan.case.at, plan.cluster.on
    rows = {}
    for one in plan.step.transfers:
        kind = one.kind.replace("_", "-")
        time = seconds(one.seconds(on, at.gpus))
        rows[one.name] = (
            size(one.volume),
            f"{kind} over {one.ranks} ranks, {one.calls:,} call{'s' * (one.calls > 1)}, {time}",
        )
    for name, step in plan.stages.items():
        volume = sum(one.volume for one in step.transfers)
        rows[f"in all, {name}"] = size(volume), f"{seconds(step.beside + step.after)}; a step of {_range(step)}"
    return rows


def _run(plan: Plan) -> dict[str, tuple[str, str]]:
    run, on, at = plan.run, plan.cluster.on, plan.case.at
    written = on.written_gb_s(at.nodes)
    rows = {
        "steps": (span(run.training), f"{run.steps:,} steps"),
        "reference cache": (span(run.caching), "once, before the first step"),
        "a checkpoint": (seconds(run.save), f"at {written:g} GB/s; training waits {seconds(run.waiting)} of it"),
        "checkpoints": (f"{run.saves:,}", f"training waits {span(run.saves * run.waiting)} in all"),
        "export": (span(run.export), "written once at the end"),
        "in all": (span(run.seconds), "loading, checking data and requeues are not counted"),
    }
    return {name: pair for name, pair in rows.items() if pair[0] != span(0)}


def _changes(plan: Plan) -> dict[str, tuple[str, str]]:
    rows = {}
    for change in plan.changes:
        alone = "" if change.alone is None else f"; alone {size(change.alone)}"
        note = f" ({change.note})" if change.note else ""
        fits = "fits" if change.fits else "still too much"
        rows[change.name] = size(change.together), f"{fits}{alone}: {' '.join(change.keys)}{note}"
    return rows


def _assumptions(plan: Plan) -> dict[str, tuple[str, str]]:
    on, origin = plan.cluster.on, sources(plan.cluster.on)
    units = {"gib": " GiB", "gb_s": " GB/s", "us": " µs"}
    shown = {}
    for name, value in asdict(on).items():
        if name != "name":
            unit = next((words for end, words in units.items() if name.endswith(f"_{end}")), "")
            shown[name] = f"{value:g}{unit}", re.split("[:;]", origin[name])[0]  # the whole one is in the JSON
    return shown


def as_json(plan: Plan) -> dict[str, Any]:
    """One object, described in docs/planning.md; seconds, bytes and GiB as the names say."""
    case, at, on, step, run = plan.case, plan.case.at, plan.cluster.on, plan.step, plan.run
    peak, recipe = plan.peak, plan.case.recipe
    price = plan.cluster.price
    return {
        "version": VERSION,
        "computed": True,
        "cautions": plan.cautions,
        "run": {
            "objective": recipe.objective["name"],
            "model": recipe.model.path,
            "lora_rank": None if recipe.model.lora is None else recipe.model.lora.rank,
            "dtype": recipe.train.dtype,
            "zero_stage": at.zero["stage"],
            "gradient_checkpointing": at.checkpointing,
            "packing": at.packed,
            "reference": at.reference,
        },
        "cluster": {"gpu": on.name, "gpus": at.ranks, "nodes": at.nodes, "gpus_per_node": at.gpus},
        "batch": {
            "global_batch": at.global_batch,
            "micro_batch": at.micro_batch,
            "accumulation": at.accumulation,
            "runs_as_given": plan.given is None,
        },
        "data": {
            name: {
                "samples": own.samples,
                "mean_tokens": own.mean,
                "longest_tokens": own.longest,
                "mean_response_tokens": own.response,
                "longest_response_tokens": own.longest_response,
            }
            for name, own in case.lengths.items()
        },
        "parameters": {"all": case.sizes.elements, "trained": case.sizes.trained.elements},
        "memory": {
            "model_states_gib_per_gpu": setting.states(plan.memory).device / GIB,
            "peak_gib_per_gpu": peak.device / GIB,
            "usable_gib_per_gpu": on.usable / GIB,
            "free_gib_per_gpu": (on.usable - peak.device) / GIB,
            "fits": plan.fits,
            "host_gib_per_gpu": peak.host / GIB,
            "nvme_gib_per_gpu": peak.nvme / GIB,
            "parts_gib_per_gpu": {_key(name): _places(place) for name, (place, _) in plan.memory.items()},
        },
        "step": {
            **_step_json(step, at.ranks, on),
            "flops": {
                "forward_backward": step.policy.forward + step.policy.backward,
                "vision_tower": step.policy.tower,
                "loss_head": step.policy.head,
                "recomputed": step.policy.recomputed,
                "reference": step.reference.all,
                "all": step.policy.all + step.reference.all,
            },
            "tokens": step.tokens,
            "tokens_per_second": step.tokens / step.least,
        },
        "communication": {
            "transfers": [
                {**asdict(one), "bytes_per_gpu": one.volume, "seconds": one.seconds(on, at.gpus)}
                for one in step.transfers
            ],
            "stages": {
                name: {
                    "bytes_per_gpu": sum(one.volume for one in other.transfers),
                    **_step_json(other, at.ranks, on),
                }
                for name, other in plan.stages.items()
            },
        },
        "total": {
            "steps": run.steps,
            "seconds": run.seconds,
            "training_seconds": run.training,
            "reference_cache_seconds": run.caching,
            "checkpoint_seconds": run.save,
            "checkpoint_waiting_seconds": run.waiting,
            "checkpoints": run.saves,
            "export_seconds": run.export,
            "gpu_hours": plan.gpu_hours,
            "price_per_gpu_hour": price,
            "cost": None if price is None else plan.gpu_hours * price,
        },
        "disk_bytes": {_key(name): number for name, (number, _) in plan.disk.items()},
        "smallest": None if plan.smallest is None else _least(plan.smallest),
        "changes": [
            {
                "name": change.name,
                "keys": list(change.keys),
                "peak_gib_alone": None if change.alone is None else change.alone / GIB,
                "peak_gib_together": change.together / GIB,
                "fits": change.fits,
                "note": change.note,
            }
            for change in plan.changes
        ],
        "hardware": {**asdict(on), "sources": sources(on)},
    }


def _step_json(step: Step, ranks: int, on: Any) -> dict[str, Any]:
    return {
        "seconds_least": step.least,
        "seconds_most": step.most,
        "compute_seconds": step.compute,
        "update_seconds": step.update,
        "offload_seconds": step.host,
        "communication_beside_seconds": step.beside,
        "communication_after_seconds": step.after,
        "mfu": step.mfu(ranks, on),
    }


def _least(case: Case) -> dict[str, Any]:
    at = case.at
    return {
        "gpus": at.ranks,
        "nodes": at.nodes,
        "global_batch": at.global_batch,
        "micro_batch": at.micro_batch,
        "peak_gib_per_gpu": case.peak / GIB,
    }


def _places(place: Place) -> dict[str, float]:
    return {name: number / GIB for name, number in asdict(place).items()}


def _key(name: str) -> str:
    return name.removesuffix(", about").replace(" ", "_")


def _numbers(rows: Mapping[str, tuple[int | str, str]]) -> dict[str, tuple[str, str]]:
    return {name: (value if isinstance(value, str) else f"{value:,}", note) for name, (value, note) in rows.items()}


def size(number: float) -> str:
    """Bytes in words."""
    unit = 0
    while number >= 1024 and unit + 1 < len(UNITS):
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {UNITS[unit]}" if unit else f"{number:.0f} B"


def span(value: float) -> str:
    """Seconds in words: 12 s, 3.4 min, 5.6 h, 2.1 d."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{value / unit:.0f} s" if unit == 1 else f"{value / unit:.1f} {name}"
    return f"{value / 86_400:.1f} d"


def seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def flop(number: float) -> str:
    return f"{number / 1e12:,.4g} TFLOP"


def _range(step: Step) -> str:
    low, high = seconds(step.least), seconds(step.most)
    return low if low == high else f"{low.removesuffix(' s')} to {high}"
