r"""Our steps and evaluation compared with TRL, transformers' Trainer, open-unlearning's NPO and `generate`.

    python benchmarks/bench_peers.py --trl DIR                  # CPU, SmolLM2-135M-Instruct, LoRA and full fine-tuning
    python benchmarks/bench_peers.py --trl DIR --device cuda    # the same in bfloat16
    python benchmarks/bench_peers.py --model MODEL              # another language model with a chat template

TRL is no dependency of this package. DIR is a folder that has it:

    pip install --target DIR --no-deps trl==1.16.0 datasets multiprocess dill xxhash pandas python-dateutil six pytz \
        tzdata aiohttp aiosignal aiohappyeyeballs frozenlist multidict propcache yarl attrs psutil

All contestants of a case train the same parameters of the same model on the same rows with the same labels, in the
same dtype and attention, with fused AdamW, without checkpointing and without logging, and with as many threads as the
machine has cores. The first losses must be equal and the later ones stay close, or the benchmark stops. Ours is the
engine of `mirage train` with `data.packing: auto`, and one worker of `mirage eval`. NPO takes half of a step's samples
from each stream. Our cache of the reference's log-probabilities is filled before the first step; the table gives its
share of a step in the first epoch. `generate` answers in the order of the file; its best batch is the fastest of SIZES,
which ours takes too. Answers must be equal, or the benchmark stops.

Each contestant is a process of its own, and those of a case take turns, so that other load affects all of them. The
time of a turn is the median of the turns after the first two. Peak memory is the process's resident set at its highest
until then, libraries included; on a GPU it is the allocated device memory.

Writes benchmarks/results/peers[_cuda].json and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import common
import peers_data
from common import Job

UNTIMED = 2  # turns before the timed ones: the first makes the optimizer's moments, the second shows the peak memory
# Relative tolerances of the losses. open-unlearning's cross entropy over (B, V, S) sums a vocabulary with a stride,
# which on a CPU leaves relative errors of 5e-5 in the gradient's elements (ours: 9e-7), and Adam's first updates are
# their signs: by the fifth step of full fine-tuning its loss is 2.4e-3 away, where our packed and padded losses differ
# by 6e-6.
FIRST, LATER = {"fp32": 1e-4, "bf16": 2e-2}, {"fp32": 5e-3, "bf16": 1e-1}
SIZES = (8, 16, 32, 64)  # batches that `generate` tries
SFT = ("ours", "TRL's SFTTrainer, padding-free", "TRL's SFTTrainer, padded", "transformers' Trainer")
NPO = ("ours", "open-unlearning's NPO")
ANSWERS = ("ours", "generate, best batch", "generate, one at a time")
MISSING = "trl or datasets is not installed (see --trl)"


@dataclass
class Measured:
    """Measurements of one contestant; lists have one value per turn, untimed turns included.

    trained: parameters that train. reference_seconds: what the reference's log-probabilities of one step's samples took
    before the first step, ours only. before_mib: memory before the model was loaded.
    """

    case: str
    version: str
    batch: int
    lora: bool = False
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads; other work adds none
    losses: list[float] = field(default_factory=list)
    trained: int | None = None
    reference_seconds: float = 0.0
    peak_mib: float = 0.0
    before_mib: float = 0.0
    answers: dict[str, str] = field(default_factory=dict)
    missing: str | None = None

    @property
    def turn_seconds(self) -> float:
        return median(self.seconds[UNTIMED:])

    def add(self, answer: Mapping[str, Any]) -> None:
        """Add one turn."""
        self.seconds.append(answer["seconds"])
        self.cpu_seconds.append(answer["cpu_seconds"])
        if "loss" in answer:
            self.losses.append(answer["loss"])
        self.answers = answer.get("answers", self.answers)


class Disagreement(SystemExit):
    """Two contestants that should compute the same do not."""


# ------------------------------------------------------------------------------------------------ measure


class Bench:
    """The runs of one command."""

    def __init__(self, parsed: argparse.Namespace, model: Path, place: Path) -> None:
        self.parsed, self.model, self.place = parsed, model, place
        self.dtype = "fp32" if parsed.device == "cpu" else "bf16"
        self.begun, self.jobs_started = time.monotonic(), 0
        self.profiles: dict[str, str] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:4.0f} s] {text}", flush=True)

    @property
    def turns(self) -> int:
        return UNTIMED + self.parsed.turns

    @property
    def steps_made(self) -> int:
        return self.turns + self.parsed.profile

    def steps(self, case: str, versions: Sequence[str], lora: bool) -> list[Measured]:
        """Measure a training step."""
        batch = self.parsed.batch
        task = self.task(case, "ours", batch, lora)
        recipe = peers_data.train_recipe(task)
        count, adapted = peers_data.trained(recipe)
        rows = self.place / f"{case}.json"
        peers_data.write_rows({**task, "out": str(self.place / f"rows-{case}-{lora}")}, rows)
        measured = [Measured(case, version, batch, lora) for version in versions]
        for one in measured:
            if one.version.startswith("TRL") and not has_trl():
                one.missing = MISSING
        present = [one for one in measured if one.missing is None]
        trl = str(self.parsed.trl.resolve()) if self.parsed.trl else None
        more = {"rows": str(rows), "adapted": adapted, "packing": self.parsed.packing, "trl": trl}
        self.measure(present, more)
        for one in present:
            if one.trained not in (None, count):
                raise Disagreement(f"{case}: {one.version} trains {one.trained} parameters, ours {count}")
            one.trained = count
        return measured

    def evaluation(self) -> list[Measured]:
        """Measure the evaluation, and before that which fixed batch is the best."""
        size = self.best_batch()
        sizes = {"generate, one at a time": 1}
        measured = [Measured("evaluation", version, sizes.get(version, size)) for version in ANSWERS]
        self.measure(measured, {})
        return measured

    def best_batch(self) -> int:
        """The fastest of SIZES, in one turn after a warm-up."""
        seconds = {}
        for size in (size for size in SIZES if size <= self.parsed.questions):
            tried = Measured("evaluation", "generate, best batch", size)
            job = self.start(tried, {})
            try:
                job.receive()
                seconds[size] = job.request("turn")[0]["seconds"]
            finally:
                job.close()
        best = min(seconds, key=lambda size: seconds[size])
        self.say(f"generate's best batch is {best}: " + ", ".join(f"{k}: {v:.1f} s" for k, v in seconds.items()))
        return best

    def measure(self, group: Sequence[Measured], more: Mapping[str, Any]) -> None:
        """Take turns until each contestant has had all of its own."""
        name = f"{group[0].case}{', LoRA' if group[0].lora else ''}"
        self.say(f"{name}: loading {'; '.join(m.version for m in group)}")
        jobs = [self.start(measured, more) for measured in group]
        try:
            for job, measured in zip(jobs, group, strict=True):
                loaded = job.receive()[0]
                measured.trained = loaded.get("trained")
                measured.reference_seconds = loaded.get("reference_seconds", 0.0) / self.steps_made
            for number in range(self.turns):
                for job, measured in zip(jobs, group, strict=True):
                    measured.add(job.request("turn")[0])
                    if number == UNTIMED - 1:
                        memory = job.request("memory")[0]
                        measured.peak_mib, measured.before_mib = memory["peak_mib"], memory.get("before_mib", 0.0)
                agree(group, self.dtype)
                times = "; ".join(f"{m.version} {m.seconds[-1]:.2f} s" for m in group)
                self.say(f"  turn {number + 1} of {self.turns}: {times}")
            if self.parsed.profile:
                self.profiles[name] = jobs[0].request("profile")[0]["table"]
        finally:
            for job in jobs:
                job.close()

    def start(self, measured: Measured, more: Mapping[str, Any]) -> Job:
        """Start a contestant; it begins to load."""
        self.jobs_started += 1
        task = {**self.task(measured.case, measured.version, measured.batch, measured.lora), **more}
        command = [sys.executable, str(Path(__file__).with_name("peers_rank.py")), json.dumps(task)]
        job = Job(command, 1, Path(task["out"]).with_suffix(".log"))
        job.send("load")
        return job

    def task(self, case: str, version: str, batch: int, lora: bool) -> dict[str, Any]:
        return {
            "case": case,
            "version": version,
            "batch": batch,
            "lora": lora,
            "steps": self.steps_made,
            "out": str(self.place / f"job-{self.jobs_started}"),
            "device": self.parsed.device,
            "dtype": self.dtype,
            "model": str(self.model),
            "place": str(self.place),
        }


def has_trl() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("trl", "datasets"))


def agree(group: Sequence[Measured], dtype: str) -> None:
    """Raise Disagreement unless all losses are close to the first contestant's, the first one closest, and all answers
    are the same.
    """
    ours, *others = group
    for other in others:
        for number, (a, b) in enumerate(zip(other.losses, ours.losses, strict=True)):
            if not abs(a - b) <= (LATER if number else FIRST)[dtype] * abs(b):  # and neither is no number
                raise Disagreement(f"{ours.case}: the loss of step {number + 1} is {a} of {other.version}, {b} of ours")
        differing = [name for name, text in ours.answers.items() if other.answers.get(name) != text]
        if differing and dtype == "fp32":  # in 16 bits the size of a batch decides between words that are as likely
            name = differing[0]
            raise Disagreement(
                f"{len(differing)} answers differ, such as {name}: {other.answers.get(name)!r} of {other.version}, "
                f"{ours.answers[name]!r} of ours"
            )


# ------------------------------------------------------------------------------------------------- report


def table(measured: Sequence[Measured]) -> str:
    head = ["", "contestant", "batch", "s a turn (least – most)", "× ours", "CPU s", "× ours", "peak MiB", "× ours"]
    rows = []
    for m in measured:
        row = [title(m), m.version, str(m.batch)]
        if m.missing is not None:
            rows.append([*row, m.missing, *[""] * (len(head) - 4)])
            continue
        base = next(one for one in measured if title(one) == title(m) and one.version == "ours")
        timed, worked = m.seconds[UNTIMED:], median(m.cpu_seconds[UNTIMED:])
        opponent = m is not base
        row += [f"{m.turn_seconds:.2f} ({min(timed):.2f} – {max(timed):.2f})"]
        row += [f"{m.turn_seconds / base.turn_seconds:.2f}" if opponent else ""]
        row += [f"{worked:.2f}", f"{worked / median(base.cpu_seconds[UNTIMED:]):.2f}" if opponent else ""]
        row += [f"{m.peak_mib:.0f}", f"{m.peak_mib / base.peak_mib:.2f}" if opponent else ""]
        rows.append(row)
        if m.case == "NPO" and m.reference_seconds:
            whole = m.turn_seconds + m.reference_seconds
            rows.append([row[0], "ours, with the share of the cache", row[2], f"{whole:.2f}", *[""] * (len(head) - 4)])
    return common.markdown(head, rows)


def title(m: Measured) -> str:
    return m.case if m.case == "evaluation" else f"{m.case}, {'LoRA' if m.lora else 'full'}"


def targets(measured: Sequence[Measured]) -> list[tuple[str, bool]]:
    """Each target that was measured, and whether it is met."""
    judged = []

    def judge(name: str, opponents: Sequence[str], least: float, memory: bool) -> None:
        same = [m for m in measured if title(m) == name]
        others = [m for m in same if m.version in opponents and m.missing is None]
        if not others:
            return
        ours, whose = next(m for m in same if m.version == "ours"), " or ".join(m.version for m in others)
        ratio = min(m.turn_seconds for m in others) / ours.turn_seconds
        judged.append((f"{name}: >= {least:g} x as fast as {whose} (is {ratio:.2f})", ratio >= least))
        if memory:
            share = ours.peak_mib / min(m.peak_mib for m in others)
            judged.append((f"{name}: at most the peak memory of {whose} (is {share:.2f} of it)", share <= 1))

    for tuning in ("LoRA", "full"):
        judge(f"SFT, {tuning}", SFT[1:3], 2, memory=True)
        judge(f"SFT, {tuning}", SFT[3:], 1.5, memory=True)
        judge(f"NPO, {tuning}", NPO[1:], 2, memory=True)
    judge("evaluation", ANSWERS[1:2], 1, memory=False)
    judge("evaluation", ANSWERS[2:], 3, memory=False)
    return judged


def base_model(folder: Path) -> Path:
    """The language model of `mirage demo --real`, made in this folder."""
    from mirage_dist.countries import language_model

    language_model.make(folder / "language_model", None)
    return folder / "language_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="directory of a language model; default: SmolLM2 from its package")
    parser.add_argument("--trl", type=Path, help="a folder with trl and what it needs besides this package's libraries")
    parser.add_argument("--case", nargs="+", choices=("SFT", "NPO", "evaluation"), default=["SFT", "NPO", "evaluation"])
    parser.add_argument("--tuning", nargs="+", choices=("LoRA", "full"), default=["LoRA", "full"])
    parser.add_argument("--batch", type=int, default=16, help="samples a step, of all streams")
    parser.add_argument("--packing", choices=("auto", "true", "false"), default="auto", help="ours: data.packing")
    parser.add_argument("--questions", type=int, default=64, help="to answer in a turn")
    parser.add_argument("--turns", type=int, default=3, help="timed ones")
    parser.add_argument("--profile", action="store_true", help="print where the time of ours goes")
    parser.add_argument("--place", type=Path, help="a folder for model and data; default: the temporary one")
    parsed = parser.parse_args()
    parsed.packing = {"true": True, "false": False}.get(parsed.packing, "auto")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    if parsed.trl is not None:
        sys.path.append(str(parsed.trl.resolve()))  # for its versions
    packages = ("torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "datasets")
    result = common.record(parsed.device, packages, sys.argv[1:], int(os.environ["OMP_NUM_THREADS"]))
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(dir=parsed.place) as folder:
        place = Path(folder)
        model = parsed.model.resolve() if parsed.model else base_model(place)
        bench = Bench(parsed, model, place)
        peers_data.write_samples(place, parsed.batch * bench.steps_made, parsed.questions)
        for tuning in parsed.tuning:
            for case, versions in (("SFT", SFT), ("NPO", NPO)):
                if case in parsed.case:
                    measured += bench.steps(case, versions, tuning == "LoRA")
        if "evaluation" in parsed.case:
            measured += bench.evaluation()
    result |= {"model": parsed.model.name if parsed.model else "SmolLM2-135M-Instruct", "dtype": bench.dtype}
    result |= {"packing": parsed.packing, "batch": parsed.batch, "questions": parsed.questions, "turns": parsed.turns}
    result["measured"] = [{**asdict(m), "answers": len(m.answers)} for m in measured]
    result["load_after"] = common.load("minute")
    for name, profile in bench.profiles.items():
        print(f"\n{name}\n{profile}")
    print(f"\n{table(measured)}\n")
    result["targets"] = common.say_targets(targets(measured))
    common.write(f"peers{'' if parsed.device == 'cpu' else '_cuda'}", result)


if __name__ == "__main__":
    main()
