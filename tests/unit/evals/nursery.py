"""Real workers that answer trivially, killed at random: `python nursery.py SUITE WORKERS KILLS SEED [BYTES]`.

The disk is slow and takes a few bytes at a time, so that kills land within lines. With BYTES no file may grow beyond
that. Prints the number of kills, and exits with 1 when a worker that was not killed failed.
"""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from mirage_dist.data.sample import Sample
from mirage_dist.evals import rows, worker
from mirage_dist.evals.sharing import files
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.worklist import Question
from mirage_dist.schema import RunError

QUESTIONS, CHUNK, BATCH = 900, 8, 3
PIECE, SECONDS = 61, 0.002  # bytes that the disk takes at once, and how long it needs for them


def questions() -> dict[str, Question]:
    samples = [Sample(str(i), None, f"question {i}", "", False, "", "nursery") for i in range(QUESTIONS)]
    every = [Question("unsafe", "unsafe", "clean", 0, sample, sample.question) for sample in samples]
    return rows.keyed(every, {"model_hash": "none"})


def answer(sample: Sample) -> str:
    return f"answer to {sample.question}"


def generate(samples):
    for start in range(0, len(samples), BATCH):
        batch = range(start, min(start + BATCH, len(samples)))
        yield [(i, answer(samples[i])) for i in batch]


def work(suite: Path, place: tuple[int, int]) -> None:
    write = os.write

    def slowly(descriptor: int, data: memoryview) -> int:
        time.sleep(SECONDS)
        return write(descriptor, data[:PIECE])

    files.os.write = slowly
    every = questions()
    with Claims(suite) as claims:
        worker.work(suite, every, rows.chunks(every, CHUNK), claims, lambda: generate, place)


def fork(suite: Path, place: tuple[int, int], limit: int | None) -> int:
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        work(suite, place)
    except RunError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    suite, count, kills, seed = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    limit = int(sys.argv[5]) if len(sys.argv) > 5 else None
    chance = random.Random(seed)
    workers = [fork(suite, (i, count), limit) for i in range(count)]
    done = 0
    while done < kills:
        time.sleep(chance.uniform(0.005, 0.05))
        i = chance.randrange(count)
        os.kill(workers[i], signal.SIGKILL)
        done += os.waitstatus_to_exitcode(os.waitpid(workers[i], 0)[1]) == -signal.SIGKILL
        workers[i] = fork(suite, (i, count), limit)
    failed = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    print(done)
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
