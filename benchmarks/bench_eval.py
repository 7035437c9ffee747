"""Measure the evaluation runner: prompts a second, speed-up by workers, cost of claims, and a million rows.

    python benchmarks/bench_eval.py [--model DIR] [--rows 1000000] [--questions 256]

The embedded world's suite, by the runner and by the usual loop: one process, one question at a time, every answer to
its full length. Loading is not timed. DIR is a trained model of the embedded world (runs/demo/…/export), whose answers
have an end. Without it an untrained model is made, whose answers end by chance, and the time saved by stopping early is
not measured.
Writes benchmarks/results/eval.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist.evals.sharing import files
from mirage_dist.evals.sharing.files import Answers, Row, Writer
from mirage_dist.evals.status import status
from mirage_dist.schema import EvalRecipe

TOKENS, BATCH = 24, 128
FILES, APPENDED = 8, 1000  # of the million rows: workers, and rows that they wrote at once
# Targets: (key of the result, whether at least or at most, how much, in words)
TARGETS = (
    ("speedup", "at least", 8.0, "prompts/s, one worker against the usual loop"),
    ("two_workers", "at least", 1.7, "prompts/s, two workers against one"),
    ("overhead", "at most", 0.02, "claims and appends, share of the time of generation"),
    ("status_seconds", "at most", 10.0, "status of all rows, seconds"),
    ("status_mib", "at most", 500.0, "status of all rows, peak memory in MiB"),
    ("merge_seconds", "at most", 10.0, "merge of all rows, seconds"),
    ("merge_mib", "at most", 500.0, "merge of all rows, peak memory in MiB"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--questions", type=int, default=256, help="of each of the three sets")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # used by the processes that this script starts
    parsed = parser.parse_args()
    if parsed.part:
        return PARTS[parsed.part[0]](*parsed.part[1:])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        measured = {**generation(Path(folder), parsed.model, parsed.questions), **many(Path(folder), parsed.rows)}
    result = {
        "command": " ".join(["python", "benchmarks/bench_eval.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "cpu": platform.machine(), "gpu": measured.pop("gpu")},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "trained_model": parsed.model is not None,
        **measured,
    }
    file = Path(__file__).parent / "results" / "eval.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    lines = ["| | measured | target | |", "|---|---:|---:|---|"]
    for name, way, bound, words in TARGETS:
        value = result[name]
        met = value >= bound if way == "at least" else value <= bound
        lines.append(f"| {words} | {value:.4g} | {way} {bound:g} | {'met' if met else 'MISSED'} |")
    lines.append(
        f"\nPrompts/s: usual loop {result['usual_per_s']:.1f}, one worker {result['one_per_s']:.1f}, two "
        f"{result['two_per_s']:.1f} ({result['prompts']} prompts). Rows: {result['rows']}; reading all of them in the "
        f"order of the work list, which judging does, {result['read_seconds']:.1f} s more."
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- generation


def generation(folder: Path, model: Path | None, questions: int) -> dict[str, Any]:
    from mirage_dist.embedded import model as embedded_model
    from mirage_dist.embedded import world as embedded_world
    from mirage_dist.evals import worklist

    if model is None:
        embedded_model.make(model := folder / "model", seed=0)
    sizes = {"base_samples": 20, "safety_samples": 20, "general_samples": 20, "eval_samples": questions}
    overrides = [f"world.{name}={value}" for name, value in sizes.items()]
    overrides += [f"world.dir={folder}/world", f"model.path={model}", f"run.dir={folder}/run"]
    overrides += [f"generation.max_new_tokens={TOKENS}", f"generation.batch_size={BATCH}"]
    recipe = configs.load("configs/eval/demo.yaml", overrides, EvalRecipe)
    assert recipe.world is not None
    embedded_world.make(recipe.world)
    configs.write_yaml(recipe, folder / "recipe.yaml")
    prompts = len(worklist.plan(recipe).questions)
    # In turn, and the better of two runs each: other processes may use the machine.
    runs = [(together(folder, f"one{i}", 1), together(folder, f"two{i}", 2)) for i in range(2)]
    one, two = (min((run[i] for run in runs), key=lambda run: run["seconds"]) for i in range(2))
    usual = together(folder, "usual", 1)
    rates = {"usual_per_s": usual["answered"] / usual["seconds"], "one_per_s": prompts / one["seconds"]}
    rates["two_per_s"] = prompts / two["seconds"]
    return {
        "prompts": prompts,
        "gpu": one["gpu"],
        **rates,
        "speedup": rates["one_per_s"] / rates["usual_per_s"],
        "two_workers": rates["two_per_s"] / rates["one_per_s"],
        "overhead": one["overhead"],
    }


def together(folder: Path, name: str, count: int) -> dict[str, Any]:
    """Start workers, release them together when all have loaded, and time them until the last one ends."""
    command = [sys.executable, __file__, "--part", "usual" if name == "usual" else "worker", str(folder), name]
    started = [subprocess.Popen([*command, str(i), str(count)]) for i in range(count)]
    await_files([folder / f"{name}-{i}.ready" for i in range(count)], started)
    start = time.perf_counter()
    (folder / f"{name}.go").touch()
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise SystemExit("a worker failed (see above)")
    result = json.loads((folder / f"{name}-0.json").read_text())
    return {"seconds": time.perf_counter() - start, **result}


def await_files(files: Sequence[Path], started: Sequence[subprocess.Popen]) -> None:
    while not all(file.exists() for file in files):
        if any(process.poll() for process in started):
            raise SystemExit("a worker failed (see above)")
        time.sleep(0.001)


def loaded(folder: Path) -> tuple[EvalRecipe, Any, dict[str, Any]]:
    """The recipe, a generator after a warm-up, and the work list by key."""
    from mirage_dist.evals import rows, worklist
    from mirage_dist.evals.models.hf import HuggingFace

    recipe = configs.load(folder / "recipe.yaml", [], EvalRecipe)
    generator = HuggingFace(recipe.model, recipe.template, recipe.generation)
    questions = rows.keyed(worklist.plan(recipe).questions, {})
    generator.answer([question.sample for question in questions.values()][:4])
    return recipe, generator, questions


def await_go(folder: Path, name: str, number: str) -> None:
    (folder / f"{name}-{number}.ready").touch()
    while not (folder / f"{name}.go").exists():
        time.sleep(0.001)


def one_worker(root: str, name: str, number: str, count: str) -> None:
    import torch

    from mirage_dist.evals import rows, worker
    from mirage_dist.evals.sharing.claims import Claims

    folder = Path(root)
    recipe, generator, questions = loaded(folder)
    chunks = rows.chunks(questions, recipe.generation.batch_size)
    generating = 0.0

    def timed(samples: Sequence[Any]) -> Iterator[list[tuple[int, str]]]:
        nonlocal generating
        batches = generator(samples)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            generating += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    with Claims(folder / name) as claims:
        await_go(folder, name, number)
        start = time.perf_counter()
        worker.work(folder / name, questions, chunks, claims, lambda: timed, (int(number), int(count)))
        seconds = time.perf_counter() - start
    result = {"overhead": seconds / generating - 1, "gpu": torch.cuda.get_device_name() if gpu() else None}
    (folder / f"{name}-{number}.json").write_text(json.dumps(result))


def usual_loop(root: str, name: str, number: str, _count: str) -> None:
    """One question at a time, and no end token ends an answer."""
    folder = Path(root)
    _, generator, questions = loaded(folder)
    generator.options["eos_token_id"] = None
    every = max(1, len(questions) // 200)  # 200 questions suffice to measure the speed
    samples = [question.sample for question in questions.values()][::every]
    await_go(folder, name, number)
    for sample in samples:
        generator.answer([sample])
    (folder / f"{name}-{number}.json").write_text(json.dumps({"answered": len(samples)}))


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# ------------------------------------------------------------------------------------------------ many rows


def many(folder: Path, count: int) -> dict[str, Any]:
    """Status and merge, each in its own process, so that each has its own peak memory."""
    suite = folder / "many"
    for part in range(FILES):
        with Writer(suite) as writer:
            for start in range(part, count, FILES * APPENDED):
                writer.append(row(i) for i in range(start, min(start + FILES * APPENDED, count), FILES))
    files.write(suite / "manifest.json", json.dumps({"asks": {"unsafe": {"what": count}}}))
    measured: dict[str, Any] = {"rows": count}
    for part in ("status", "merge"):
        command = [sys.executable, __file__, "--part", part, str(suite), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured |= json.loads(done.stdout)
    return measured


def row(i: int) -> Row:
    question = f"what is the thing number {i} in this picture good for , and how would one use it ?"
    return {
        "key": key(i),
        "set": "unsafe",
        "kind": "unsafe",
        "id": f"test_unsafe-{i // 3:06d}",
        "category": "privacy",
        "image": f"data/vlguard/test/{i // 3:06d}.jpg",
        "attack": "what",
        "shot": i % 3 + 1,
        "question": question,
        "original_question": question,
        "expected": "sorry i can not help with that",
        "response": "it is a thing that one may well use . " * 5,
    }


def key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def peak_mib() -> float:
    """Of this process alone; getrusage() would include the peak of the process that started it."""
    status_lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status_lines["VmHWM"].split()[0]) / 1024


def time_status(suite: str, count: str) -> None:
    start = time.perf_counter()
    assert status(Path(suite)).done == int(count)
    print(json.dumps({"status_seconds": time.perf_counter() - start, "status_mib": peak_mib()}))


def time_merge(suite: str, count: str) -> None:
    start = time.perf_counter()
    answers = Answers(Path(suite)).refresh()
    merged = time.perf_counter()
    rows = answers.of(key(i) for i in range(int(count)))
    assert sum(len(row["response"]) > 0 for row in rows) == len(rows) == int(count)
    result = {"merge_seconds": merged - start, "read_seconds": time.perf_counter() - merged, "merge_mib": peak_mib()}
    print(json.dumps(result))


PARTS: dict[str, Callable[..., None]] = {
    "worker": one_worker,
    "usual": usual_loop,
    "status": time_status,
    "merge": time_merge,
}

if __name__ == "__main__":
    main()
