"""`mirage plan`'s memory against that of real runs: DeepSpeed processes that train a few steps.

python benchmarks/plan_memory.py [--device cpu|cuda] [--sizes 20m 58m 167m] [--ranks 1 2] [--batch 4]

On a CPU: the largest resident memory of a process in its steps (VmHWM) above what it had before the model was there
and above what the same run takes beside its prediction with a tiny model; malloc gives freed blocks back at once. The
first two steps are not measured: they make the optimizer's state and ZeRO-3's trace. On a GPU: the peak of allocated
memory. Predicted is the peak of `setting.parts` at the rows that the steps
have. Prints one line a run and writes results/plan_memory_DEVICE.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import common
from common import MIB, SIZES, Job, Size
from step_rank import keep_blocks, our_run, our_step, resident

UNTIMED, STEPS = 2, 1
TARGET = 10.0  # per cent
BUCKET = 2_000_000  # elements: smaller than the matrices of the larger models, larger than those of the smallest
MODELS = {
    "tiny": SIZES["tiny"],
    "20m": replace(SIZES["58m"], name="20m", layers=4, hidden=256, intermediate=688, heads=4),
    "58m": SIZES["58m"],
    "167m": replace(SIZES["58m"], name="167m", hidden=1024, intermediate=2752, heads=16),
    "7b_quarter": SIZES["7b_quarter"],
    "7b": SIZES["7b"],
}


def recipe_of(task: Mapping[str, Any], ranks: int) -> Any:
    from omegaconf import OmegaConf

    from mirage_dist import config as configs
    from mirage_dist.schema import TrainRecipe

    size, place = MODELS[task["size"]], Path(task["place"])
    streams = ("forget", "retain")
    model: dict[str, Any] = {"path": str(place / "model"), "gradient_checkpointing": task["checkpointing"]}
    if task["lora"]:
        model["lora"] = {"rank": 32, "alpha": 64}
    tree = {
        "run": {"dir": task["out"]},
        "model": model,
        "data": {
            "max_length": size.tokens,
            "workers": 0,
            "streams": {name: [{"format": "samples", "path": str(place / f"{name}.jsonl")}] for name in streams},
        },
        "objective": {"name": "npo"},
        "reference": "cache",
        "train": {
            "lr": 1e-5,
            "global_batch": task["batch"] * ranks * task["accumulation"],
            "micro_batch": task["batch"],
            "max_steps": 1000,
            "dtype": task["dtype"],
            "schedule": "constant",
            "warmup": 0.0,
        },
        "deepspeed": task["deepspeed"],
    }
    return configs.from_tree(OmegaConf.create(tree), [], TrainRecipe, "benchmark")


def predicted(recipe: Any, ranks: int, device: str) -> dict[str, Any]:
    """Bytes by part and at the peak."""
    from mirage_dist.train.planning import plan, setting

    made = plan.plan(recipe, ranks)
    case = replace(made.case, at=replace(made.case.at, on_cpu=device == "cpu"))
    parts = case.parts
    held = {name: place.device for name, (place, _) in parts.items()}
    return {"peak": case.peak, "states": setting.states(parts).device, "parts": held}


def measured(task: Mapping[str, Any]) -> int:
    """This rank's peak in bytes; every rank calls this, in a process of its own."""
    from mirage_dist import ranks
    from mirage_dist.train.measures import usage
    from mirage_dist.train.planning import check
    from mirage_dist.train.run import reference_of

    group = ranks.start()
    gpu = group.device.type == "cuda"
    recipe = recipe_of(task, group.size)
    checked = check.check_recipe(recipe, group.size)
    data = check.check_batches(checked, check.check_inputs(checked), group)  # processor and data are no training
    before = resident("VmRSS")
    run = our_run(recipe, group)
    if not gpu:  # or frozen weights keep the whole file mapped, whose pages count although all others were copied
        for parameter in run.engine.module.parameters():
            if not parameter.requires_grad and parameter.numel():
                parameter.data = parameter.data.clone()
    step = our_step(run, reference_of(run))
    for number in range(UNTIMED):
        step(number)
    if gpu:
        usage.restart(group.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    for number in range(UNTIMED, UNTIMED + STEPS):
        step(number)
    del data
    return usage.highest(group.device)[0] if gpu else resident("VmHWM") - before


def in_fork(text: str) -> dict[str, Any]:
    """`measured` in a process that begins with the libraries imported and nothing else. text: a task as JSON."""
    task = json.loads(text)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.environ["MASTER_PORT"] = str(task["port"])
            os.write(writer, str(measured(task)).encode())
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    if os.waitpid(child, 0)[1] or not answer:
        raise common.RankFailed("a rank failed; its log says why")
    return {"bytes": int(answer)}


def rank(device: str) -> None:
    """The ranks' side: every request is a task."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llava.modeling_llava  # noqa: F401

    from mirage_dist import ranks

    ranks.name_accelerator()
    if device == "cpu":
        keep_blocks(1 << 20)
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        common.answers(in_fork)
    common.answers(lambda text: {"bytes": measured(json.loads(text))})  # CUDA cannot be forked: one case a start


def cases(parsed: argparse.Namespace, sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Both stages, full and with adapters, at every size; checkpointing, accumulation and bf16 at one of them."""
    made = []
    for size, ranks, stage, lora in itertools.product(sizes, parsed.ranks, (2, 3), (False, True)):
        case = {"size": size, "ranks": ranks, "stage": stage, "lora": lora, "checkpointing": False}
        made.append({**case, "dtype": MODELS[size].dtype, "accumulation": 1})
    middle = [case for case in made if case["size"] == sizes[len(sizes) // 2]]
    other = [{**case, "checkpointing": True} for case in middle]
    other += [{**case, "accumulation": 2} for case in middle if case["ranks"] == 1 and not case["lora"]]
    if parsed.device == "cpu":
        other += [{**case, "dtype": "bf16"} for case in middle if case["ranks"] == 1]
    return [*made, *other]


def words(case: Mapping[str, Any]) -> list[str]:
    how = "LoRA" if case["lora"] else "full"
    again = " + checkpointing" if case["checkpointing"] else ""
    twice = ", 2 micro-batches" if case["accumulation"] > 1 else ""
    return [case["size"], case["dtype"], f"ZeRO-{case['stage']}", str(case["ranks"]), f"{how}{again}{twice}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=tuple(MODELS), help="default: 20m 58m 167m, on a GPU 7b_quarter")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 2, on a GPU 1")
    parser.add_argument("--batch", type=int, default=4, help="rows of each stream in a micro-batch")
    parser.add_argument("--only", help="only cases whose words contain this")
    parser.add_argument("--out", metavar="NAME", help="results/NAME.json; default: plan_memory_DEVICE (--only: none)")
    parser.add_argument("--parts", action="store_true", help="print the predicted parts of every case")
    parsed = parser.parse_args()
    cpu = parsed.device == "cpu"
    parsed.ranks = parsed.ranks or ([1, 2] if cpu else [1])
    name = parsed.out or (f"plan_memory_{parsed.device}" if parsed.only is None else None)
    sizes = parsed.sizes or (["20m", "58m", "167m"] if cpu else ["7b_quarter"])
    result = common.record(parsed.device, ("torch", "transformers", "deepspeed", "peft"), sys.argv[1:], threads=1)
    result |= {"batch": parsed.batch, "bucket_elements": BUCKET, "sizes": {s: asdict(MODELS[s]) for s in sizes}}
    rows: list[dict[str, Any]] = []
    jobs: dict[int, Job] = {}
    beside: dict[tuple[Any, ...], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        chosen = [c for c in cases(parsed, sizes) if parsed.only is None or parsed.only in " ".join(words(c))]
        for number, case in enumerate(chosen):
            rows.append(compare(case, parsed, Path(folder), number, jobs, beside))
            result["measured"] = rows
            if name:
                common.write(name, result)
        for job in jobs.values():
            job.close()
    print("\n" + table(rows))
    errors = [abs(row["error_percent"]) for row in rows]
    judged = [
        (
            f"error <= {TARGET:g} % in every run (largest {max(errors):.1f}, median {median(errors):.1f})",
            max(errors) <= TARGET,
        )
    ]
    result["targets"] = common.say_targets(judged)
    if name:
        common.write(name, result)


def compare(
    case: Mapping[str, Any],
    parsed: argparse.Namespace,
    folder: Path,
    number: int,
    jobs: dict[int, Job],
    beside: dict[tuple[Any, ...], int],
) -> dict[str, Any]:
    """Predict and run one case. jobs: processes that wait for a case, by their number. beside: what is subtracted."""
    key = tuple(case[name] for name in ("stage", "ranks", "lora", "dtype"))
    if parsed.device == "cpu" and key not in beside:
        # What a process of such a run takes whatever its model is: pages of libraries, Python's objects.
        least = {**case, "size": "tiny", "checkpointing": False, "accumulation": 1}
        ahead, peak = _both(least, parsed, folder, f"{number}-tiny", jobs)
        beside[key] = peak - ahead["peak"]
    ahead, peak = _both(case, parsed, folder, str(number), jobs)
    peak -= beside.get(key, 0)
    error = 100 * (ahead["peak"] - peak) / peak
    row = {**case, "predicted_bytes": ahead["peak"], "states_bytes": ahead["states"], "measured_bytes": peak}
    row |= {"beside_bytes": beside.get(key, 0), "error_percent": error, "parts": ahead["parts"]}
    print(
        f"{', '.join(words(case))}: predicted {ahead['peak'] / MIB:.0f} MiB, measured {peak / MIB:.0f} MiB "
        f"(and {beside.get(key, 0) / MIB:.0f} whatever the model), error {error:+.1f} %",
        flush=True,
    )
    if parsed.parts:
        print("   " + ", ".join(f"{name} {held / MIB:.0f}" for name, held in ahead["parts"].items()), flush=True)
    return row


def _both(
    case: Mapping[str, Any], parsed: argparse.Namespace, folder: Path, name: str, jobs: dict[int, Job]
) -> tuple[dict[str, Any], int]:
    """The prediction of one case, and its measured bytes."""
    from mirage_dist.ranks import free_port

    place = folder / f"{case['size']}-{case['dtype']}"
    size: Size = replace(MODELS[case["size"]], dtype=case["dtype"])
    if not place.exists():
        common.make_model(size, place / "model", parsed.device)
        common.make_samples(size, place, ("forget", "retain"), 4 * parsed.batch)
    zero = {
        "stage": case["stage"],
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 100_000,
    }
    file = folder / f"zero-{name}.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    task = {**case, "place": str(place), "out": str(folder / f"run-{name}"), "deepspeed": str(file)}
    task |= {"batch": parsed.batch, "port": free_port()}
    ahead = predicted(recipe_of(task, case["ranks"]), case["ranks"], parsed.device)
    job = jobs.get(case["ranks"])
    if job is None:
        command = [sys.executable, __file__, "--rank", parsed.device]
        job = jobs[case["ranks"]] = Job(command, case["ranks"], folder / f"ranks-{case['ranks']}.log")
    try:
        return ahead, max(answer["bytes"] for answer in job.request(json.dumps(task)))
    finally:
        if parsed.device == "cuda":
            jobs.pop(case["ranks"]).close()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "model",
        "dtype",
        "stage",
        "ranks",
        "training",
        "model states, MiB",
        "predicted, MiB",
        "measured, MiB",
        "error",
    ]
    lines = []
    for row in rows:
        sizes = [f"{row[name] / MIB:.0f}" for name in ("states_bytes", "predicted_bytes", "measured_bytes")]
        lines.append([*words(row), *sizes, f"{row['error_percent']:+.1f} %"])
    return common.markdown(head, lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2])
    else:
        main()
