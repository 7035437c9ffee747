"""Our training step compared with a plain implementation of the paper's algorithm: time, tokens/s and peak memory.

    python benchmarks/bench_step.py                             # CPU, 60 M parameters, 1 and 2 ranks, 7 minutes
    python benchmarks/bench_step.py --device cuda               # LLaVA-1.5-7B's proportions, bfloat16, every parameter
    python benchmarks/bench_step.py --device cuda --lora        # the same with adapters

Ours is what `mirage train` runs (engine, feed, loop, reference cache). The opponents (published.py) get the same
random model and micro-batches, dtype, attention, checkpointing, AdamW and DeepSpeed JSON, but run one forward a batch
with full logits, and a second model as the reference. Losses must agree, the first one before anything is timed, or
the benchmark stops. All samples have the same length, so padding costs no version anything. Our reference cache is
filled before the first step, with one forward per sample and run, and is not timed.

Each version runs in separate processes, so that memory can be attributed. On the CPU the versions of a case run at the
same time and take turns, so that other load affects all of them. The time of a step is the median of the steps after
the first two. Peak memory is a rank's high-water mark in those two, with model and optimizer, beyond its memory before
it loaded the model; on a CPU malloc returns freed memory at once until then. On a GPU the versions run one after the
other, and one that does not fit is run again with optimizer and parameters offloaded.

Writes benchmarks/results/step_DEVICE[_lora].json and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import common
from common import SIZES, Job, Size
from step_rank import Version, cases

UNTIMED = 2  # steps before the timed ones: the first makes the optimizer's moments, the second shows the peak memory
PEAK_FLOPS = 989e12  # H100 and H200, dense bf16 with float32 sums
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of the first loss, relative
# The recipes' own ZeRO-3 files, tried in this order.
DEEPSPEED = {
    "cpu": ("configs/deepspeed/cpu.json",),
    "cuda": ("configs/deepspeed/zero3.json", "configs/deepspeed/zero3_offload.json"),
}


@dataclass
class Measured:
    """Measurements of one version on a number of ranks; lists have one value per step, untimed steps included."""

    case: str
    ranks: int
    version: Version
    deepspeed: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads of the busiest rank; other work adds none
    losses: list[float] = field(default_factory=list)
    tokens: int = 0  # of all ranks and streams in a step
    peak_mib: float = 0.0
    missing: str | None = None

    @property
    def step_seconds(self) -> float:
        return median(self.seconds[UNTIMED:])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    def add(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Add one step: the answer of each rank."""
        self.seconds.append(max(t["seconds"] for t in answers))
        self.cpu_seconds.append(max(t["cpu_seconds"] for t in answers))
        self.losses.append(sum(t["loss"] for t in answers) / len(answers))
        self.tokens = sum(t["tokens"] for t in answers)


# ------------------------------------------------------------------------------------------------ measure


class Disagreement(SystemExit):
    """Two versions that should compute the same loss do not."""


class Bench:
    """The runs of one command."""

    def __init__(
        self, size: Size, device: str, lora: bool, batch: int, repeats: int, place: Path, deepspeed: str | None = None
    ) -> None:
        self.size, self.device, self.lora, self.place = size, device, lora, place
        self.deepspeed = (deepspeed,) if deepspeed else DEEPSPEED[device]
        self.batch, self.repeats = batch, repeats
        self.begun, self.jobs_started = time.monotonic(), 0

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:4.0f} s] {text}", flush=True)

    def measure(self, case: str, versions: Sequence[Version], ranks: int, profile: bool) -> list[Measured]:
        """Measure all versions of a case, on the CPU in turns."""
        measured_case = [Measured(case, ranks, version) for version in versions]
        for group in [measured_case] if self.device == "cpu" else [[one] for one in measured_case]:
            self.say(f"{case}, {ranks} rank(s): loading {'; '.join(m.version.name for m in group)}")
            first, *others = self.deepspeed
            jobs = [self.start(measured, first) for measured in group]
            try:
                for number, measured in enumerate(group):
                    left = list(others)
                    while not (fits := ready(jobs[number], measured)) and left:
                        jobs[number].close()
                        jobs[number] = self.start(measured, left.pop(0))
                    measured.missing = None if fits else "does not fit, not even with offload"
                alive = [(job, m) for job, m in zip(jobs, group, strict=True) if m.missing is None]
                agree(measured_case, self.size.dtype)
                for job, measured in alive:
                    measured.add(job.request("step"))
                    measured.peak_mib = max(answer["peak_mib"] for answer in job.request("memory"))
                self.rounds(alive)
                agree(measured_case, self.size.dtype)
                if profile:
                    self.look_at([(job, m) for job, m in alive if m.version.plain is None])
            finally:
                for job in jobs:
                    job.close()
        return measured_case

    def look_at(self, alive: Sequence[tuple[Job, Measured]]) -> None:
        """Profile one more step of each on the first rank."""
        for job, m in alive:
            profile = job.request("profile")[0]["table"]
            print(f"\n{m.case}, {m.version.name}, {m.ranks} rank(s)\n{profile}", flush=True)

    def start(self, measured: Measured, deepspeed: str) -> Job:
        """Start the ranks of a version; they begin to load."""
        self.jobs_started += 1
        measured.deepspeed = deepspeed
        out = self.place / f"job-{self.jobs_started}"
        task = {"version": asdict(measured.version), "size": self.size.name, "lora": self.lora, "batch": self.batch}
        task |= {"place": str(self.place), "out": str(out), "deepspeed": deepspeed}
        command = [sys.executable, str(Path(__file__).with_name("step_rank.py")), json.dumps(task)]
        job = Job(command, measured.ranks, out.with_suffix(".log"))
        job.send("load")
        return job

    def rounds(self, alive: Sequence[tuple[Job, Measured]]) -> None:
        for number in range(self.repeats):
            for job, measured in alive:
                measured.add(job.request("step"))
            times = "; ".join(f"{m.version.name} {m.seconds[-1]:.2f} s" for _, m in alive)
            self.say(f"  round {number + 1} of {self.repeats}: {times}")


def ready(job: Job, measured: Measured) -> bool:
    """Wait for the load, then make the first step. False when it does not fit into the GPU's memory."""
    if any("out_of_memory" in answer for answer in job.receive()):
        return False
    first = job.request("step")
    if any("out_of_memory" in answer for answer in first):
        return False
    measured.add(first)
    return True


def agree(case: Sequence[Measured], dtype: str) -> None:
    """Raise Disagreement unless each version's losses equal its twin's; in 16 bits only the first, as they drift."""
    losses = {m.version.name: m.losses for m in case}
    for measured in case:
        own, twin = measured.losses, losses.get(measured.version.twin or "", [])
        pairs = list(zip(own, twin, strict=False))[: None if dtype == "fp32" else 1]
        for step, (a, b) in enumerate(pairs):
            if not abs(a - b) <= TOLERANCE[dtype] * abs(b):  # and neither is no number
                what = f"{measured.case}, {measured.ranks} rank(s): the loss of step {step}"
                raise Disagreement(f"{what} is {a} of {measured.version.name!r}, {b} of {measured.version.twin!r}")


# ------------------------------------------------------------------------------------------------- report


def table(measured: Sequence[Measured], parameters: int, device: str) -> str:
    head = ["step", "ranks", "version", "s a step (least – most)", "tokens/s", "× ours", "peak MiB", "× ours"]
    if device == "cuda":
        head += ["MFU", "DeepSpeed"]
    rows = []
    for m in measured:
        if m.missing is not None:
            rows.append([m.case, str(m.ranks), m.version.name, m.missing, *[""] * (len(head) - 4)])
            continue
        base = pick(measured, m.case, m.ranks, m.version.against)
        compared = base is not None and m.version.plain is not None
        row = [m.case, str(m.ranks), m.version.name]
        row += [f"{m.step_seconds:.2f} ({min(m.seconds[UNTIMED:]):.2f} – {max(m.seconds[UNTIMED:]):.2f})"]
        row += [f"{m.tokens_per_second:.0f}", f"{m.step_seconds / base.step_seconds:.2f} slower" if compared else ""]
        row += [f"{m.peak_mib:.0f}", f"{m.peak_mib / base.peak_mib:.2f}" if compared else ""]
        if device == "cuda":
            whole = not m.case.startswith("RMU")  # whose forward and backward are not those of all parameters
            flops = 6 * parameters * m.tokens_per_second / m.ranks
            row += [f"{flops / PEAK_FLOPS:.1%}" if whole else "", Path(m.deepspeed).stem]
        rows.append(row)
    return common.markdown(head, rows)


def pick(measured: Sequence[Measured], case: str, ranks: int, version: str) -> Measured | None:
    """The measurement of this name, None where there is none or it failed."""
    same = (m for m in measured if (m.case, m.ranks, m.version.name) == (case, ranks, version) and m.missing is None)
    return next(same, None)


def targets(measured: Sequence[Measured], parameters: int, device: str) -> list[tuple[str, bool]]:
    judged: list[tuple[str, bool]] = []

    def ratio(
        what: str, value: Callable[[Measured], float], over: Any, under: Any, met: Callable[[float], bool]
    ) -> None:
        a, b = pick(measured, *over), pick(measured, *under)
        if a is not None and b is not None:
            share = value(a) / value(b)
            judged.append((f"{what} (is {share:.2f})", met(share)))

    def time_of(m: Measured) -> float:
        return m.step_seconds

    def tokens(m: Measured) -> float:
        return m.tokens_per_second / m.ranks

    npo, rmu = ("NPO", 1, "ours"), ("RMU", 1, "ours")
    five, three = ("NPO", 1, "plain, 5 forwards"), ("NPO", 1, "plain, 3 forwards")
    hooked = ("RMU", 1, "plain, 3 hooked forwards")
    if device == "cpu":
        ratio("NPO >= 3 x faster than the paper's five forwards", time_of, five, npo, lambda x: x >= 3)
        ratio("NPO >= 1.8 x faster than its formula in three forwards", time_of, three, npo, lambda x: x >= 1.8)
        ratio("RMU >= 5 x faster than three hooked forwards", time_of, hooked, rmu, lambda x: x >= 5)
        ratio("NPO's peak memory <= 0.6 of the five forwards'", lambda m: m.peak_mib, npo, five, lambda x: x <= 0.6)
        for case in ("SFT", "NPO", "RMU"):
            what = f"{case}: 2 ranks >= 0.85 of one rank's tokens/s a core"
            ratio(what, tokens, (case, 2, "ours"), (case, 1, "ours"), lambda x: x >= 0.85)
        return judged
    ratio("NPO >= 3 x the tokens/s of the five forwards", tokens, npo, five, lambda x: x >= 3)
    ratio("RMU >= 8 x faster than three hooked forwards", time_of, hooked, rmu, lambda x: x >= 8)
    for case, ours_ in (("SFT", pick(measured, "SFT", 1, "ours")), ("NPO", pick(measured, *npo))):
        if ours_ is None:
            continue
        if case == "SFT":
            mfu = 6 * parameters * tokens(ours_) / PEAK_FLOPS
            judged.append((f"SFT: MFU >= 0.45 (is {mfu:.2f})", mfu >= 0.45))
        else:
            judged.append((f"NPO fits without offload (is {ours_.deepspeed})", "offload" not in ours_.deepspeed))
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: 58m on a CPU, 7b on a GPU")
    parser.add_argument("--lora", action="store_true", help="adapters instead of every parameter")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 2 on a CPU, 1 on a GPU")
    parser.add_argument("--case", nargs="+", help="only these: SFT NPO RMU 'RMU, projector too'")
    parser.add_argument("--batch", type=int, help="samples of each stream on a rank; default: 4")
    parser.add_argument("--repeats", type=int, help="steps timed: 3 on a CPU, 10 on a GPU")
    parser.add_argument("--deepspeed", help="a DeepSpeed JSON; default: ZeRO-3, on a GPU with offload where it must be")
    parser.add_argument("--profile", action="store_true", help="print where the time of our steps goes")
    parser.add_argument("--place", type=Path, help="a folder for model and data; default: the temporary one")
    parsed = parser.parse_args()
    device = parsed.device
    size = SIZES[parsed.size or ("58m" if device == "cpu" else "7b")]
    repeats = parsed.repeats or (3 if device == "cpu" else 10)
    result = common.record(device, ("torch", "transformers", "deepspeed", "peft", "trl"), sys.argv[1:], threads=1)
    name, measured = f"step_{device}{'_lora' if parsed.lora else ''}", list[Measured]()
    with tempfile.TemporaryDirectory(dir=parsed.place) as folder:
        bench = Bench(size, device, parsed.lora, parsed.batch or 4, repeats, Path(folder), parsed.deepspeed)
        batch = f"{bench.batch} samples of {size.tokens} tokens ({size.response} of the response) a stream"
        result |= {"size": asdict(size), "lora": parsed.lora, "batch": batch, "repeats": repeats}
        bench.say("making a model and data")
        result["parameters"] = parameters = common.make_model(size, Path(folder) / "model", device)
        common.make_samples(size, Path(folder), ("train", "forget", "retain", "retain_ce"), 2 * bench.batch)
        for ranks in parsed.ranks or ((1, 2) if device == "cpu" else (1,)):
            for case, versions in cases(size, parsed.lora).items():
                chosen = [v for v in versions if ranks == 1 or not v.single]
                if chosen and (parsed.case is None or case in parsed.case):
                    measured += bench.measure(case, chosen, ranks, parsed.profile)
                    result["measured"] = [
                        {**asdict(m), "step_seconds": None if m.missing else m.step_seconds} for m in measured
                    ]
                    common.write(name, result)  # what is measured is kept if the rest is cut off
    print(f"\n{parameters / 1e6:.0f} M parameters, {size.dtype}, {batch} and rank\n")
    print(table(measured, parameters, device))
    print("TRL's SFT trainer: " + ("not installed" if result["versions"]["trl"] is None else "not measured"), "\n")
    result["targets"] = common.say_targets(targets(measured, parameters, device))
    common.write(name, result)


if __name__ == "__main__":
    main()
