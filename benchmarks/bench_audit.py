"""Seconds and memory that `mirage audit` takes for a million records.

    python benchmarks/bench_audit.py

A LLaVA file (one JSON list) and one of our own (one object a line), a million records each: questions of about 12 words
that open with one of 2000 first words, as frequent as words are (Zipf), answers of 10 to 110 words, one record in ten
refused. The whole command is timed, its start and its figure included, on one core.

Writes benchmarks/results/audit.json and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np

SECONDS, BYTES = 60.0, 1 << 30  # the targets
FIRST_WORDS, REFUSED = 2000, 0.1
REFUSAL = "I'm sorry, but I can not help with that."


def make(folder: Path, records: int) -> dict[str, Path]:
    """Format -> its file."""
    generator = np.random.default_rng(0)
    words = [common.word(number) for number in range(5000)]
    files = {"llava": folder / "llava.json", "samples": folder / "samples.jsonl"}
    with files["llava"].open("w") as listed, files["samples"].open("w") as lines:
        listed.write("[")
        for number in range(records):
            first = words[int(generator.zipf(1.3)) % FIRST_WORDS]
            question = " ".join([first, *(words[i] for i in generator.integers(0, 5000, 11))]) + "?"
            length = int(generator.integers(10, 110))
            start = int(generator.integers(0, 4800))
            answer = REFUSAL if generator.random() < REFUSED else " ".join(words[start : start + length])
            listed.write((",\n" if number else "") + json.dumps(llava(number, question, answer)))
            lines.write(json.dumps(sample(number, question, answer)) + "\n")
        listed.write("]\n")
    return files


def llava(number: int, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": f"part{number % 5}/{number:07d}.jpg", "conversations": turns}


def sample(number: int, question: str, answer: str) -> dict[str, Any]:
    labels = {"safe": answer != REFUSAL, "category": "", "source": "benchmark", "history": []}
    return {
        "id": str(number),
        "image": f"part{number % 5}/{number}.jpg",
        "question": question,
        "answer": answer,
        **labels,
    }


def measure(file: Path, out: Path) -> dict[str, float]:
    """One run of the command: wall and processor seconds, and the most memory it held."""
    command = [sys.executable, "-m", "mirage_dist.cli", "audit", str(file), "--out", str(out)]
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(child, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"the audit ended with status {os.waitstatus_to_exitcode(status)}")
    processor = used.ru_utime + used.ru_stime
    return {"seconds": wall, "processor_seconds": processor, "peak_bytes": used.ru_maxrss * 1024}


def table(result: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            f"{m['file_bytes'] / 1e6:.0f}",
            f"{m['seconds']:.1f}",
            f"{m['processor_seconds']:.1f}",
            f"{m['peak_bytes'] / common.MIB:.0f}",
        ]
        for name, m in result["measured"].items()
    ]
    return common.markdown(["format", "file, MB", "seconds", "processor seconds", "peak memory, MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parsed = parser.parse_args()
    result = common.record("cpu", ("numpy",), sys.argv[1:], threads=1)
    result |= {"records": parsed.records, "measured": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in make(Path(folder), parsed.records).items():
            measured = measure(file, Path(folder) / name)
            result["measured"][name] = {"file_bytes": file.stat().st_size, **measured}
    print(f"\n{table(result)}\n")
    judged = []
    for name, m in result["measured"].items():
        cost = f"{name}: {m['seconds']:.1f} s and {m['peak_bytes'] / common.MIB:.0f} MiB"
        right = m["seconds"] <= SECONDS and m["peak_bytes"] <= BYTES
        judged.append((f"{cost} (target: {SECONDS:.0f} s, {BYTES / common.MIB:.0f} MiB)", right))
    result["targets"] = common.say_targets(judged)
    common.write("audit", result)


if __name__ == "__main__":
    main()
