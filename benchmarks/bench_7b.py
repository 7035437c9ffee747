"""LLaVA-1.5-7B's proportions with random weights on one GPU: one part a call, each within ten minutes.

    python benchmarks/bench_7b.py sft-lora --place /scratch/7b          # a part; --list names all
    python benchmarks/bench_7b.py resume --tiny --place /tmp/tiny       # the same on a CPU, at a tiny size

The model is made from its configuration, with a tokenizer and a processor of the benchmarks' own, and written once
under --place; nothing comes from a hub. Training parts time our step of SFT, NPO and RMU (as bench_step.py does), of
all parameters or of adapters: tokens/s, MFU, peak memory. All parameters also of a quarter of the decoder's layers:
those of 7B do not fit one GPU of 80 GB, and may not fit offloaded, which the result then says. The others use the
command itself: a run that is killed and resumed, compared bit by bit with one that was not; export; a thousand answers
by each engine; packed rows against padded ones.

A part writes its result to --out (benchmarks/results/gpu) as PART.json, and is not run again once it is there. With
--tiny nothing is written to benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common
from bench_step import PEAK_FLOPS, UNTIMED, Bench
from common import RESULTS, SIZES, Size
from step_rank import cases

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH, REPEATS = {"7b": 4, "7b_quarter": 4, "tiny": 2}, {"7b": 6, "7b_quarter": 6, "tiny": 1}
STEPS, SAVED = 6, 3  # of the run that is killed
ANSWERS, NEW_TOKENS = {"7b": 1000, "tiny": 6}, {"7b": 64, "tiny": 4}
LORA = "model.lora={rank: 128, alpha: 256, dropout: 0.0}"


class Missing(Exception):
    """What a part needs is not on this machine; the message says what."""


@dataclass
class Setting:
    """size: of SIZES. place: the folder of models, data and runs. deepspeed: the JSON of parts that time a step."""

    size: Size
    device: str
    place: Path
    deepspeed: str | None = None

    @property
    def tiny(self) -> bool:
        return self.size.name == "tiny"

    def model(self, size: Size | None = None) -> Path:
        """The folder of a size, with its model/ and samples, made when first wanted."""
        own = size or self.size
        folder, mark = self.place / own.name, self.place / own.name / "parameters.json"
        if not mark.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            parameters = common.make_model(own, folder / "model", self.device)
            common.make_samples(own, folder, ("train", "forget", "retain"), 8 * BATCH[own.name])
            mark.write_text(json.dumps(parameters))
        return folder

    def parameters(self, size: Size | None = None) -> int:
        return json.loads((self.model(size) / "parameters.json").read_text())


# ---------------------------------------------------------------------------------------------------- training


def training(case: str, lora: bool, size: str = "7b") -> Callable[[Setting], dict[str, Any]]:
    """A part that measures our step of a case. size: of SIZES, unless the setting is tiny."""

    def part(setting: Setting) -> dict[str, Any]:
        return measured(setting, setting.size if setting.tiny else SIZES[size], case, lora)

    return part


def measured(setting: Setting, size: Size, case: str, lora: bool) -> dict[str, Any]:
    """Our step of a case, in the record of bench_step.py, with tokens/s and MFU."""
    place = setting.model(size)
    for left in place.glob("job-*"):  # what an earlier part's ranks wrote
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    ours = next(version for version in cases(size, lora)[case] if version.plain is None)
    bench = Bench(size, setting.device, lora, BATCH[size.name], REPEATS[size.name], place, setting.deepspeed)
    [own] = bench.measure(case, [ours], 1, profile=False)
    entry: dict[str, Any] = {**asdict(own), "size": size.name, "lora": lora, "parameters": setting.parameters(size)}
    if own.missing is None:
        steps = own.seconds[UNTIMED:]
        speed = own.tokens / median(steps)
        # Forward 2, gradient of inputs 2, of weights 2 operations a parameter and token; frozen weights have no third.
        # Recomputation by checkpointing does not count. RMU computes a part of the model only.
        operations = None if case == "RMU" else (4 if lora else 6) * entry["parameters"] * speed
        gpu = setting.device == "cuda"
        entry |= {"step_seconds": median(steps), "tokens_per_second": speed}
        entry["mfu"] = operations / PEAK_FLOPS if gpu and operations is not None else None
    return entry


# ------------------------------------------------------------------------------------------------- the command


def overrides(setting: Setting, folder: Path, *more: str) -> list[str]:
    """Of configs/train/npo.yaml and sft.yaml: the random model, and samples of the benchmark."""
    place = setting.model()
    given = {name: f"[{{format: samples, path: {place}/{name}.jsonl}}]" for name in ("train", "forget", "retain")}
    sft = any(word.startswith("data.streams.train") for word in more)
    streams = [] if sft else [f"data.streams.{name}={given[name]}" for name in ("forget", "retain")]
    small = (
        ["deepspeed=configs/deepspeed/cpu.json", "train.dtype=fp32", "data.workers=0"]
        if setting.device == "cpu"
        else []
    )
    batch = BATCH[setting.size.name]
    return [
        *(f"run.dir={folder}", f"model.path={place}/model", *streams, *small, "data.system_prompt=null"),
        *(f"train.global_batch={2 * batch}", f"train.micro_batch={batch}", f"train.max_steps={STEPS}"),
        *(f"train.save_every={SAVED}", "train.epochs=1", "data.refusals_in_forget=allow", f"data.max_length={2048}"),
        *more,
    ]


def command(setting: Setting, log: Path, *words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "MIRAGE_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    if setting.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [str(REPOSITORY / "launch/local.sh"), "1", *words],
            env=environment,
            cwd=REPOSITORY,
            stdout=file,
            stderr=file,
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait():
        raise SystemExit("\n".join(log.read_text().splitlines()[-common.TRAILING_LINES :]))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def trained(setting: Setting, name: str, recipe: str, *more: str) -> tuple[Path, float]:
    """A run of its own, to its end; its directory and its seconds."""
    folder, log = fresh(setting.place / "runs" / name), setting.place / "logs" / f"{name}.log"
    began = time.monotonic()
    finish(command(setting, log, "train", recipe, *overrides(setting, folder, *more)), log)
    return folder, time.monotonic() - began


NPO, SFT = "configs/train/npo.yaml", "configs/train/sft.yaml"
OF_RESUME = (LORA, "train.export=off", "reference=adapters_off")


def resume(setting: Setting) -> dict[str, Any]:
    """One run to its end, one killed after its first checkpoint and resumed: the same losses and bytes."""
    whole, seconds = trained(setting, "whole", NPO, *OF_RESUME)
    folder, log = fresh(setting.place / "runs/killed"), setting.place / "logs/killed.log"
    words = ("train", NPO, *overrides(setting, folder, *OF_RESUME))
    process = command(setting, log, *words)
    first = folder / f"checkpoints/step-{SAVED:06d}/manifest.json"
    while not first.is_file() and process.poll() is None:
        time.sleep(0.01)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    process.wait()
    last = f"checkpoints/step-{STEPS:06d}"
    shutil.rmtree(folder / last, ignore_errors=True)  # of a run that ended before the kill
    began = time.monotonic()
    finish(command(setting, log, *words), log)
    losses = [[line["loss"] for line in metrics(run)] for run in (whole, folder)]
    files = [{f.name: f.read_bytes() for f in (run / last).glob("*.safetensors")} for run in (whole, folder)]
    return {
        "losses_equal": losses[0] == losses[1],
        "checkpoints_bitwise_equal": files[0] == files[1] and len(files[0]) > 0,
        "checkpoint_bytes": sum(map(len, files[0].values())),
        "resumed": f"at step {SAVED}" in log.read_text(),
        "seconds_whole": seconds,
        "seconds_resumed": time.monotonic() - began,
        "losses": losses[0],
    }


def export(setting: Setting) -> dict[str, Any]:
    """The merged model and the adapter of the run that `resume` has made."""
    run = setting.place / "runs/whole"
    if not (run / f"checkpoints/step-{STEPS:06d}").is_dir():
        trained(setting, "whole", NPO, *OF_RESUME)
    entry = {}
    for form in ("merged", "adapter"):
        out, began = fresh(setting.place / f"export-{form}"), time.monotonic()
        words = ["-m", "mirage_dist.cli", "export", str(run), str(out), "--as", form]
        subprocess.run([sys.executable, *words], check=True, cwd=REPOSITORY, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        entry[form] = {"seconds": time.monotonic() - began, "bytes": size}
    return entry


RECIPE = """run: {{dir: {folder}}}
suite: speed
model: {{path: {model}, dtype: {dtype}}}
judges: [keyword]
generation: {{backend: {backend}, max_new_tokens: {tokens}, batch_size: 32}}
sets:
  questions:
    kind: safe
    sources: [{{format: samples, path: {data}}}]
"""


def generation(backend: str) -> Callable[[Setting], dict[str, Any]]:
    def part(setting: Setting) -> dict[str, Any]:
        if backend == "vllm" and importlib.util.find_spec("vllm") is None:
            raise Missing("vllm is not installed")
        if backend == "vllm" and setting.device == "cpu":
            raise Missing("vllm needs a GPU here")
        count, name = ANSWERS[setting.size.name], setting.size.name
        place, folder = setting.place / "questions", fresh(setting.place / f"runs/answers-{backend}")
        if not (place / "questions.jsonl").is_file():
            common.make_samples(setting.size, place, ("questions",), count)
        recipe = setting.place / f"answers-{backend}.yaml"
        dtype = "fp32" if setting.device == "cpu" else "bf16"
        values = {"folder": folder, "model": setting.model() / "model", "dtype": dtype, "backend": backend}
        recipe.write_text(RECIPE.format(**values, tokens=NEW_TOKENS[name], data=place / "questions.jsonl"))
        log, began = setting.place / f"logs/answers-{backend}.log", time.monotonic()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with log.parent.mkdir(parents=True, exist_ok=True) or log.open("wb") as file:
            words = [sys.executable, "-m", "mirage_dist.cli", "eval", str(recipe)]
            done = subprocess.run(words, cwd=REPOSITORY, env=environment, stdout=file, stderr=file)
        if done.returncode:
            raise SystemExit("\n".join(log.read_text().splitlines()[-common.TRAILING_LINES :]))
        seconds = time.monotonic() - began
        rows = [json.loads(line) for f in folder.glob("evals/speed/rows/*.jsonl") for line in f.open()]
        answers = [row for row in rows if "response" in row]
        if len(answers) != count:
            raise SystemExit(f"{len(answers)} of {count} questions are answered; see {log}")
        return {
            "answers": count,
            "seconds": seconds,
            "new_tokens": NEW_TOKENS[name],
            "answers_per_second": count / seconds,
        }

    return part


def packing(setting: Setting) -> dict[str, Any]:
    """SFT of adapters on answers of unlike lengths, packed and padded: the same first loss, real tokens a second."""
    flash = importlib.util.find_spec("flash_attn") is not None and setting.device == "cuda"
    attention = "flash_attention_2" if flash else "sdpa"
    stream = f"data.streams.train=[{{format: samples, path: {uneven(setting)}}}]"
    entry: dict[str, Any] = {"attention": attention, "flash_attention": "used" if flash else "missing"}
    for name, packed in (("padded", "false"), ("packed", "true")):
        more = (LORA, "train.export=off", f"data.packing={packed}", f"model.attention={attention}", stream)
        folder, _ = trained(setting, f"sft-{name}", SFT, *more)
        lines = metrics(folder)
        entry[name] = {
            "first_loss": lines[0]["loss"],
            "tokens_per_second": median(line["tokens"] / line["step_seconds"] for line in lines[2:]),
            "memory_mib": max(line["memory_mib"] for line in lines),
            "padding": median(line["padding"] for line in lines),
        }
    return entry


def uneven(setting: Setting) -> Path:
    """The samples of `train`, with answers of an eighth to all of their words."""
    place = setting.model()
    file = place / "uneven.jsonl"
    lines = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    for number, record in enumerate(lines):
        words = record["answer"].split()
        record["answer"] = " ".join(words[: max(1, len(words) * (number % 8 + 1) // 8)])
    file.write_text("".join(json.dumps(record) + "\n" for record in lines))
    return file


def make(setting: Setting) -> dict[str, Any]:
    began = time.monotonic()
    folder = setting.model()
    size = sum(file.stat().st_size for file in (folder / "model").iterdir())
    return {"parameters": setting.parameters(), "bytes": size, "seconds": time.monotonic() - began}


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "model": make,
    "sft-lora": training("SFT", True),
    "npo-lora": training("NPO", True),
    "rmu-lora": training("RMU", True),
    "rmu": training("RMU", False),
    "sft": training("SFT", False),
    "npo": training("NPO", False),
    "sft-quarter": training("SFT", False, "7b_quarter"),
    "npo-quarter": training("NPO", False, "7b_quarter"),
    "resume": resume,
    "export": export,
    "packing": packing,
    "generate-hf": generation("hf"),
    "generate-vllm": generation("vllm"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("part", nargs="?", choices=tuple(PARTS))
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--place", type=Path, default=Path("runs/bench_7b"), help="models, data and runs; it is kept")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu, with --tiny the place")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at a tiny size")
    parser.add_argument("--deepspeed", help="a DeepSpeed JSON for the parts that time a step; default: bench_step.py's")
    parsed = parser.parse_args()
    if parsed.list or parsed.part is None:
        print("\n".join(PARTS))
        return
    if not parsed.tiny:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("bench_7b.py needs a GPU; --tiny runs every part on a CPU")
    place = parsed.place.absolute()
    setting = Setting(SIZES["tiny" if parsed.tiny else "7b"], "cpu" if parsed.tiny else "cuda", place, parsed.deepspeed)
    out = parsed.out or (place if parsed.tiny else RESULTS / "gpu")
    file = out / f"{parsed.part}.json"
    if file.is_file():
        print(f"{file} is there; remove it to measure again")
        return
    packages = ("torch", "transformers", "deepspeed", "peft", "flash-attn", "vllm", "triton")
    result = common.record(setting.device, packages, sys.argv[1:], threads=1)
    began = time.monotonic()
    try:
        result |= {"size": asdict(setting.size), "result": PARTS[parsed.part](setting)}
    except Missing as error:
        result["missing"] = str(error)
    result["seconds"] = time.monotonic() - began
    out.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(file)
    print(json.dumps(result.get("result") or {"missing": result["missing"]}, indent=1))


if __name__ == "__main__":
    main()
