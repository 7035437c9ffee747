"""Memory and open descriptors over many steps, checkpoints and rows: flat, or growing with each of them."""

from __future__ import annotations

import hashlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirage_dist.config import REPOSITORY
from mirage_dist.evals import judges
from mirage_dist.evals.judges.rules import Keyword
from mirage_dist.evals.sharing.files import Answers, Row, Writer
from tests.faults import results
from tests.faults.processes import ranks_of
from tests.toy import Toy

PAGE = os.sysconf("SC_PAGE_SIZE")
BATCH = 8  # rows
ANSWER = 4000  # characters of an answer
WARM = 1 / 3  # of the samples: caches and allocators fill up first


@dataclass(frozen=True)
class Sample:
    """After `count` steps or rows: bytes and open descriptors of the process."""

    count: int
    bytes: int
    descriptors: int


def resident(process: int | None = None) -> int:
    """Resident bytes of a process, this one by default."""
    return int(Path(f"/proc/{process or 'self'}/statm").read_text().split()[1]) * PAGE


def descriptors(process: int | None = None) -> int:
    return len(os.listdir(f"/proc/{process or 'self'}/fd"))


def growth(samples: Sequence[Sample], of: Callable[[Sample], int]) -> float:
    """The median slope between two samples after the warm-up (Theil and Sen): steps of an allocator count little."""
    late = samples[int(len(samples) * WARM) :]
    return statistics.median((of(b) - of(a)) / (b.count - a.count) for a, b in itertools.combinations(late, 2))


def training(toy: Toy, run: Path, python: str, steps: int, every: int, seconds: float = 600.0) -> list[Sample]:
    """A run on one rank with a checkpoint each `every` steps, seen from outside at each of its steps.

    Raises RuntimeError when it does not end well within so many seconds.
    """
    options = ("train.global_batch=4", "train.micro_batch=4", "train.export=false", "train.keep_last=2")
    arguments = [*toy.overrides("npo", run), *options, f"train.max_steps={steps}", f"train.save_every={every}"]
    environment = {**os.environ, "MIRAGE_PYTHON": python, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [f"{REPOSITORY}/launch/local.sh", "1", "train", "configs/train/demo_npo.yaml", *arguments]
    samples, rank, begin = list[Sample](), None, time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and time.monotonic() - begin < seconds:
        rank = rank or ranks_of(process.pid).get(0)
        step = _lines(run / "metrics.jsonl")
        if rank is not None and step > (samples[-1].count if samples else 0):
            try:
                samples.append(Sample(step, resident(rank), descriptors(rank)))
            except (OSError, IndexError):  # it has just ended
                break
        time.sleep(0.005)
    if process.poll() is None and time.monotonic() - begin >= seconds:
        process.kill()
    errors = process.communicate()[1].decode(errors="replace")
    if process.returncode != 0:
        raise RuntimeError(f"the run ended with status {process.returncode}: {errors}")
    return samples


def rows(suite: Path, count: int, measure: Callable[[], int] = resident) -> list[Sample]:
    """Answers written, merged and judged as a worker does it, without a model; a sample each fiftieth of them.

    The last sample is after judging.
    """
    samples, keys, answers, judge = [], [], Answers(suite), Keyword(name="keyword")
    with Writer(suite) as writer:
        for start in range(0, count, BATCH):
            written = [_row(number) for number in range(start, min(start + BATCH, count))]
            keys += [row["key"] for row in written]
            writer.append(written)
            answers.refresh()
            if start // BATCH % max(1, count // BATCH // 50) == 0:
                samples.append(Sample(len(answers), measure(), descriptors()))
    judges.judged(suite, judge, answers.of(keys))
    samples.append(Sample(count, measure(), descriptors()))
    return samples


def _row(number: int) -> Row:
    text = f"answer {number} ".ljust(ANSWER, "abcdefg "[number % 8])
    return {
        "key": hashlib.sha256(str(number).encode()).hexdigest(),
        "set": "unsafe",
        "kind": "unsafe",
        "id": str(number),
        "category": "c",
        "image": None,
        "attack": "clean",
        "shot": 0,
        "question": "Q?",
        "original_question": "Q?",
        "expected": "e",
        "response": text,
    }


def main(out: Path) -> int:
    """500 steps with 50 checkpoints, and 20 000 rows; writes the figures and returns 0."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "suite").mkdir()
        answered = rows(Path(folder) / "suite", 20_000)
        toy = Toy(Path(folder) / "toy")
        trained = training(toy, Path(folder) / "run", os.environ.get("MIRAGE_PYTHON", sys.executable), 500, 10)
    content = {
        **results.about(),
        "training": {"steps": 500, "checkpoints": 50, **_figures(trained, 10, "checkpoint")},
        "evaluation": {"rows": 20_000, "characters_per_answer": ANSWER, **_figures(answered[:-1], 1, "row")},
    }
    content["evaluation"]["mib_after_judging"] = round(answered[-1].bytes / 2**20, 1)
    results.write(out, content)
    print(content["training"], content["evaluation"], out, sep="\n")
    return 0


def _figures(samples: Sequence[Sample], per: int, unit: str) -> dict[str, float]:
    late = samples[int(len(samples) * WARM) :]
    return {
        "mib_after_a_third": round(late[0].bytes / 2**20, 1),
        "mib_in_the_end": round(late[-1].bytes / 2**20, 1),
        f"bytes_per_{unit}": round(per * growth(samples, lambda sample: sample.bytes)),
        "descriptors_after_a_third": late[0].descriptors,
        "descriptors_at_most": max(sample.descriptors for sample in late),
        "descriptors_in_the_end": late[-1].descriptors,
    }


def _lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0
