"""Time to the first step: seconds and bytes of a first start and of a requeue, by samples and ranks.

    python benchmarks/start.py --samples 1000 100000 1000000 --ranks 1 2 4 8

Each start is `mirage train` itself (see start_rank.py) on a tiny LLaVA with one stream; the samples share 16 pictures.
It ends after its first step, with a checkpoint, from which the next one goes on. A first start parses, checks and
measures every sample; above --first-up-to samples its table is written from samples that are known, whose lengths and
pictures are, so that only requeues are measured there. One rank of 512 is replayed: what such a rank does with the
samples of a requeue, from opening the table to its first window, in a process that has loaded the libraries.

Writes benchmarks/results/start.json and prints the tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common

SIZE = common.SIZES["tiny"]
PICTURES, TEXTS = 16, 1000  # different ones
PARTS = ("libraries", "recipe and model", "process group", "samples", "directory", "model", "resume", "first step")
TARGET_SECONDS, TARGET_GROWTH = 10.0, 1.0


def make_data(folder: Path, count: int) -> Path:
    """COUNT samples in the `samples` format, which share pictures and texts and have ids of their own."""
    file = folder / f"train-{count}.jsonl"
    common.make_samples(SIZE, folder, ("shared",), PICTURES)
    shared = [json.loads(line) for line in (folder / "shared.jsonl").read_text().splitlines()]
    words = [common.word(number) for number in range(TEXTS * 40)]
    texts = []
    for number in range(TEXTS):
        own = words[number * 40 : number * 40 + 40]
        record = {**shared[number % PICTURES], "question": " ".join(own[:18]) + " ?", "answer": " ".join(own[18:])}
        texts.append(json.dumps({**record, "id": "%"}).replace('"%"', '"%d"'))
    with file.open("w") as handle:
        handle.writelines(texts[number % TEXTS] % number + "\n" for number in range(count))
    return file


def start(folder: Path, count: int, ranks: int, mode: str) -> list[dict[str, Any]]:
    """One start on so many ranks: what each measured. mode: see start_rank.py. Raises SystemExit when one fails."""
    out = folder / "figures"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    given = {"count": count, "mode": mode, "began": time.time(), "out": str(out), "folder": str(folder)}
    script = str(Path(__file__).with_name("start_rank.py"))
    log = folder / f"{mode}-{count}-{ranks}.log"
    with log.open("w") as file:
        processes = common.start_ranks([sys.executable, script, json.dumps(given)], ranks, stdout=file, stderr=file)
        for process in processes:
            process.wait()
    figures = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    if len(figures) != ranks:
        raise SystemExit(f"a rank failed:\n{log.read_text()[-3000:]}")
    return figures


def slowest(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each part and figure the largest of all ranks; the time to the first step of the rank that was last."""
    split = {
        kind: {part: max(one[kind].get(part, 0.0) for one in figures) for part in PARTS}
        for kind in ("parts", "processor")
    }
    return {**split, **{name: max(one[name] for one in figures) for name in figures[0] if name not in split}}


def tables(result: Mapping[str, Any]) -> str:
    head = ["samples", "ranks", "start", "seconds to the first step", "of these, samples", "read by a rank, MB"]
    head += ["opened by a rank, of data", "of the table", "memory of a rank, MB"]
    rows = [
        [
            f"{one['samples']:,}",
            str(one["ranks"]),
            one["start"],
            f"{one['seconds']:.1f}",
            f"{one['parts']['samples']:.2f} ({one['processor']['samples']:.2f} of processor)",
            f"{one['bytes_read'] / 1e6:.1f}",
            str(one["opens_data"]),
            str(one["opens_table"]),
            f"{one['rss'] / 1e6:.0f}",
        ]
        for one in result["starts"]
    ]
    head_parts = ["samples", "ranks", "start", "seconds", *PARTS]
    parts = [
        [f"{one['samples']:,}", str(one["ranks"]), one["start"], kind, *(f"{one[name][part]:.2f}" for part in PARTS)]
        for one in result["starts"]
        for kind, name in (("elapsed", "parts"), ("of processor", "processor"))
    ]
    head_one = ["samples", "seconds", "read, MB", "opened", "memory added, MB"]
    replayed = [
        [
            f"{one['samples']:,}",
            f"{one['seconds']:.3f}",
            f"{one['bytes_read'] / 1e6:.2f}",
            str(one["opens_table"]),
            f"{one['added'] / 1e6:.1f}",
        ]
        for one in result["one_of_512"]
    ]
    return "\n\n".join(
        [common.markdown(head, rows), common.markdown(head_parts, parts), common.markdown(head_one, replayed)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--first-up-to", type=int, default=100_000, help="samples of a measured first start")
    parser.add_argument("--first-ranks", type=int, nargs="+", default=[1, 2], help="ranks of measured first starts")
    parsed = parser.parse_args()
    packages = ("torch", "transformers", "tokenizers", "deepspeed", "pyarrow", "pillow")
    result: dict[str, Any] = common.record("cpu", packages, sys.argv[1:], threads=1)
    result |= {"starts": [], "one_of_512": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        common.make_model(SIZE, folder / "model", "cpu")
        for count in parsed.samples:
            make_data(folder, count)
            measured = count <= parsed.first_up_to
            for ranks in parsed.first_ranks if measured else [1]:
                shutil.rmtree(folder / f"run-{count}", ignore_errors=True)
                if not measured:
                    start(folder, count, 1, "write")
                figures = slowest(start(folder, count, ranks, "train"))
                if measured:
                    add(result, count, ranks, "first", figures)
            for ranks in parsed.ranks:
                add(result, count, ranks, "requeue", slowest(start(folder, count, ranks, "train")))
            result["one_of_512"].append({"samples": count, **slowest(start(folder, count, 1, "replay"))})
            (folder / f"train-{count}.jsonl").unlink()
            shutil.rmtree(folder / f"run-{count}")
    result["hardware"] |= common.load("load_after")
    print(f"\n{tables(result)}\n")
    result["targets"] = common.say_targets(judged(result))
    common.write("start", result)


def add(result: dict[str, Any], count: int, ranks: int, kind: str, figures: dict[str, Any]) -> None:
    result["starts"].append({"samples": count, "ranks": ranks, "start": kind, **figures})
    print(f"{count} samples, {ranks} ranks, {kind}: {figures['seconds']:.1f} s, {figures['parts']}", flush=True)
    common.write("start", result)  # what is measured stays, should the rest fail


def judged(result: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """A requeue's samples: in seconds at the most of them, and against the fewest."""
    requeues = [one for one in result["starts"] if one["start"] == "requeue"]
    most, fewest = (pick(one["samples"] for one in requeues) for pick in (max, min))
    worst = max(one["parts"]["samples"] for one in requeues if one["samples"] == most)
    rows = []
    for one in requeues:
        if one["samples"] == most:
            other = next(o for o in requeues if o["samples"] == fewest and o["ranks"] == one["ranks"])
            growth = one["processor"]["samples"] - other["processor"]["samples"]
            what = f"at {one['ranks']} ranks {most:,} samples take {growth:.2f} s of processor more than {fewest:,}"
            rows.append((f"{what}, at most {TARGET_GROWTH:g} s", growth <= TARGET_GROWTH))
    what = f"the samples of a requeue take at most {TARGET_SECONDS:g} s at {most:,} (are {worst:.2f} s)"
    return [*rows, (what, worst <= TARGET_SECONDS)]


if __name__ == "__main__":
    main()
