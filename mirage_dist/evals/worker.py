"""One worker: claim a chunk, answer what is missing of it, append, until every question of the suite is answered."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from mirage_dist import signals
from mirage_dist.data.sample import Sample
from mirage_dist.evals import rows
from mirage_dist.evals.rows import Ask, Chunk
from mirage_dist.evals.sharing.claims import Claim, Claims
from mirage_dist.evals.sharing.files import Answers, Writer
from mirage_dist.schema import RunError
from mirage_dist.signals import StopRequested

MAX_RESTARTS = 3
FIRST_WAIT, LONGEST_WAIT = 0.02, 2.0  # seconds between two looks at what others have claimed; it doubles
PLAIN_LINES = 10  # progress lines where there is no terminal

# Yields batches of (index into the samples, answer).
Generate = Callable[[Sequence[Sample]], Iterator[list[tuple[int, str]]]]


def work(
    suite: Path,
    asks: Mapping[str, Ask],
    chunks: Sequence[Chunk],
    claims: Claims,
    generate: Callable[[], Generate],
    place: tuple[int, int],
) -> Answers:
    """Answer what is missing, together with all other workers of the suite; returns when nothing is missing.

    generate: loads the model, which is done when there is something to answer. place: (i, n), where in the work list
    to begin: worker i of n does not stand in the others' way.

    Raises StopRequested behind the batch in which a signal came, and RunError when the disk is full or the same Slurm
    job has started MAX_RESTARTS times in a row without one new answer.
    """
    name = f"eval {suite.name}"
    answers = Answers(suite).refresh()
    there = sum(key in answers for key in asks)
    if answers.broken:
        print(f"{name}: {answers.broken} half-written lines ignored", flush=True)
    _bound_restarts(suite, len(asks) - there)
    print(f"{name}: {there} of {len(asks)} answers are there", flush=True)
    ready: Generate | None = None
    turn, wait = _Turn(chunks, place), FIRST_WAIT
    with Writer(suite) as writer, Progress(len(asks), there, name) as progress:
        while chunk := turn.next(answers):
            _stop_if_asked(name)
            claim = claims.take(chunk.name, rows.by_condition(asks[key] for key in chunk.keys if key not in answers))
            if claim is None:
                if turn.put_back(chunk):
                    if wait < LONGEST_WAIT <= 2 * wait:
                        print(f"{name}: others have claimed all that is missing; waiting for them", flush=True)
                    time.sleep(wait)
                    wait = min(2 * wait, LONGEST_WAIT)
                    answers.refresh()
                continue
            wait = FIRST_WAIT
            try:
                # Its last owner may have answered it, or some of it, since we looked.
                answers.refresh()
                if missing := {key: asks[key] for key in chunk.keys if key not in answers}:
                    ready = ready or generate()
                    _answer(missing, ready, claims, claim, writer)
            finally:
                claims.release(claim)
            turn.put_back(chunk)
            progress.show(len(answers.refresh()))
    _stop_if_asked(name)
    return answers


def _answer(missing: Mapping[str, Ask], generate: Generate, claims: Claims, claim: Claim, writer: Writer) -> None:
    """Batch by batch, until all is answered, a signal comes, or another took the claim over: its answers then count."""
    keys = list(missing)
    for batch in generate([ask.sample for ask in missing.values()]):
        if not claims.held(claim):
            return
        writer.append(rows.row(keys[i], missing[keys[i]], text) for i, text in batch)
        claims.done += len(batch)
        if signals.received():
            return


def _stop_if_asked(name: str) -> None:
    if signal := signals.received():
        raise StopRequested(f"{name}: stopped by {signal}; every answer so far is on disk")


class _Turn:
    """Which chunk is looked at next: round and round, until each was found answered."""

    def __init__(self, chunks: Sequence[Chunk], place: tuple[int, int]) -> None:
        start = place[0] * len(chunks) // place[1]
        self.left = deque([*chunks[start:], *chunks[:start]])
        self.back = 0  # chunks put back since the last one that was found answered

    def next(self, answers: Answers) -> Chunk | None:
        while self.left:
            chunk = self.left.popleft()
            if not all(key in answers for key in chunk.keys):
                return chunk
            self.back = 0
        return None

    def put_back(self, chunk: Chunk) -> bool:
        """True when all that are left have been looked at and none could be had."""
        self.left.append(chunk)
        self.back += 1
        if self.back < len(self.left):
            return False
        self.back = 0
        return True


def _bound_restarts(suite: Path, missing: int) -> None:
    """Raise RunError when the same task of a Slurm job has started so often with nothing answered in between."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    file = suite / "starts" / f"{job}-{os.environ.get('SLURM_PROCID', '0')}.jsonl"
    file.parent.mkdir(exist_ok=True)
    before = [json.loads(line)["missing"] for line in file.read_text().splitlines()] if file.exists() else []
    if missing and before[-MAX_RESTARTS:] == [missing] * MAX_RESTARTS:
        raise RunError(
            f"{suite}: Slurm job {job} has started {MAX_RESTARTS} times with {missing} answers missing; see its log "
            "for what ended it, then submit it again"
        )
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps({"missing": missing}) + "\n")


class Progress:
    """All workers' answers: a bar on a terminal; elsewhere a plain line now and then, as logs want it."""

    def __init__(self, total: int, there: int, what: str) -> None:
        self.total, self.what, self.shown = total, what, there * PLAIN_LINES // total
        self.bar = tqdm(total=total, initial=there, desc=what, unit="answer") if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif done * PLAIN_LINES // self.total > self.shown:
            self.shown = done * PLAIN_LINES // self.total
            print(f"{self.what}: {done} of {self.total}", flush=True)
