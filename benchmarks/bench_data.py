"""Samples a second of the data path: read, decode pictures, apply template and tokenizer, collate.

    python benchmarks/bench_data.py

Pictures of 336 x 336 pixels on disk, half of them JPEG and half PNG, and 676 tokens a sample, as LLaVA-1.5 has them.
The benchmark times what a step needs from its `Feed`, in this process and then in worker processes ahead of it, with
one thread each. Cold is the first epoch, including the start of the workers; warm is every later one (pictures are in
the page cache in both). The result is compared with the consumption of a step: that of bench_step.py on this CPU, if
its result exists, and that of LLaVA-1.5-7B on one GPU at the model FLOPs utilisation that we aim for.

Writes benchmarks/results/data.json and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch looks: a training rank has one core for itself

import common
import torch
from common import SIZES
from omegaconf import OmegaConf

from mirage_dist import config as configs
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.streams import read_streams
from mirage_dist.train.prefetch import made

SIZE = SIZES["7b"]
SAMPLES, BATCH = 64, 4  # of each stream; of each stream in a step
HERE = Group(0, 0, 1, torch.device("cpu"))
GPU_FLOPS, UTILISATION, PARAMETERS = 989e12, 0.45, 7.06e9  # of an H100's or H200's bf16; LLaVA-1.5-7B


def make_feed(place: Path) -> Feed:
    """NPO's two streams on generated data."""
    processor = common.make_processor(SIZE)
    streams = ("forget", "retain")
    common.make_samples(SIZE, place, streams, SAMPLES)
    tree = {
        "run": {"dir": str(place / "run")},
        "model": {"path": str(place / "model")},  # never read: the processor is made here
        "data": {"streams": {s: [{"format": "samples", "path": str(place / f"{s}.jsonl")}] for s in streams}},
        "objective": {"name": "npo"},
        "train": {"lr": 1e-5, "global_batch": BATCH, "micro_batch": BATCH},
    }
    recipe = configs.from_tree(OmegaConf.create(tree), [], TrainRecipe, "benchmark")
    needs = make(recipe.objective).needs
    return Feed(recipe, needs, read_streams(recipe, needs), processor)


def epochs(feed: Feed, workers: int, count: int) -> list[float]:
    """Samples per second of each epoch, the first one cold; as in a run, the same workers make all epochs."""
    steps, rates = SAMPLES // BATCH, []
    windows = made(lambda step: feed.window(step, HERE), range(steps * count), workers)
    for _ in range(count):
        start, seen = time.perf_counter(), 0
        for window in islice(windows, steps):
            seen += sum(len(micro.samples) for micro in window)
        rates.append(seen / (time.perf_counter() - start))
    return rates


def parts(feed: Feed) -> dict[str, float]:
    """Milliseconds of processor time per sample, of each part of the data path, in this process."""
    samples, encoder = feed.samples["forget"], feed.encoder
    pictured = encoder.pictured
    assert pictured is not None  # the benchmark's model takes pictures

    def milliseconds(act: Callable[[], Any]) -> float:
        act()
        start = time.process_time()  # of one thread that never waits, so other load on the machine does not count
        act()
        return 1000 * (time.process_time() - start) / len(samples)

    pictures = [pictured.opened(str(sample.image)) for sample in samples]
    costs = {
        "read and decode": milliseconds(lambda: [pictured.opened(str(sample.image)) for sample in samples]),
        "CLIP's transform": milliseconds(lambda: encoder.processor.image_processor(pictures, return_tensors="pt")),
        "everything": milliseconds(lambda: [encoder.encode(samples[i : i + BATCH]) for i in range(0, SAMPLES, BATCH)]),
    }
    return {**costs, "template, tokens, collate": costs["everything"] - sum(list(costs.values())[:2])}


def consumers() -> dict[str, float]:
    """Samples per second that a rank's step consumes."""
    tokens = UTILISATION * GPU_FLOPS / (6 * PARAMETERS)
    rates = {f"SFT of LLaVA-1.5-7B on one GPU at {UTILISATION:.0%} MFU": tokens / SIZE.tokens}
    file = common.RESULTS / "step_cpu.json"
    if file.is_file():
        measured = json.loads(file.read_text())
        for m in measured["measured"]:
            if m["version"]["name"] == "ours" and m["ranks"] == 1:
                rate = m["tokens"] / m["step_seconds"] / measured["size"]["tokens"]
                rates[f"{m['case']} of {measured['size']['name']} on one CPU core (results/step_cpu.json)"] = rate
    return rates


def tables(result: Mapping[str, Any]) -> str:
    alone = result["rates"]["0"]["warm"]
    head = ["workers", "cold, samples/s", "warm, samples/s", "× this process"]
    rows = [
        [
            workers if workers != "0" else "this process",
            f"{r['cold']:.1f}",
            f"{r['warm']:.1f}",
            f"{r['warm'] / alone:.2f}",
        ]
        for workers, r in result["rates"].items()
    ]
    split = [[name, f"{ms:.2f}"] for name, ms in result["milliseconds"].items()]
    best = max(r["warm"] for r in result["rates"].values())
    taken = [[name, f"{rate:.2f}", f"{best / rate:.1f}"] for name, rate in result["consumers"].items()]
    return "\n\n".join(
        [
            common.markdown(head, rows),
            common.markdown(["part, in this process", "ms a sample"], split),
            common.markdown(["a step takes", "samples/s", "× that the data path gives"], taken),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=4, help="the first one is cold")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    result = common.record("cpu", ("torch", "transformers", "pillow", "numpy"), sys.argv[1:], threads=1)
    result["samples"] = {"picture": SIZE.side, "tokens": SIZE.tokens, "an_epoch": 2 * SAMPLES, "a_step": 2 * BATCH}
    with tempfile.TemporaryDirectory() as folder:
        feed = make_feed(Path(folder))
        result["rates"] = {}
        for workers in (0, *parsed.workers):
            cold, *warm = epochs(feed, workers, parsed.epochs)
            result["rates"][str(workers)] = {"cold": cold, "warm": median(warm), "all_warm": warm}
            print(f"{workers} workers: {cold:.1f} cold, {median(warm):.1f} warm", flush=True)
        result["milliseconds"] = parts(feed)
    result["consumers"] = consumers()
    print(f"\n{tables(result)}\n")
    judged = []
    for what, rate in result["consumers"].items():
        for workers, rate_of in result["rates"].items():
            if workers != "0":
                share = rate_of["warm"] / rate
                judged.append((f"{workers} worker(s) do not starve {what} (is {share:.2f})", share >= 1))
    result["targets"] = common.say_targets(judged)
    common.write("data", result)


if __name__ == "__main__":
    main()
