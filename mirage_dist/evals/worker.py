"""One worker: claim a chunk, answer what is missing of it, append the rows, until every question is answered."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from mirage_dist import disk, signals, state
from mirage_dist.data.sample import Sample
from mirage_dist.evals import rows, worklist
from mirage_dist.evals.models.base import Outcome
from mirage_dist.evals.models.replies import Failed
from mirage_dist.evals.rows import Chunk
from mirage_dist.evals.sharing.claims import Claim, Claims
from mirage_dist.evals.sharing.files import KEPT, Answers, Writer, append, title, whole_objects
from mirage_dist.evals.worklist import Question
from mirage_dist.progress import EVERY_RANK, Progress, log
from mirage_dist.schema import RunError
from mirage_dist.signals import StopRequested

MAX_RESTARTS = 3
ENDED = {"stopped", "answered"}  # what is recorded at the end of a start that does not count
FIRST_WAIT, LONGEST_WAIT = 0.02, 2.0  # seconds between two looks at the claims of other workers; doubles each time

# Yields batches of (index into the samples, outcome); see `evals.models.base.Respondent`.
Generate = Callable[[Sequence[Sample]], Iterator[Sequence[tuple[int, Outcome]]]]


def work(
    suite: Path,
    questions: Mapping[str, Question],
    chunks: Sequence[Chunk],
    claims: Claims,
    load: Callable[[], Generate],
    place: tuple[int, int],
) -> Answers:
    """Answer the missing questions together with all other workers; returns when every question is answered.

    questions: by key. load: loads the model; called once, when there is something to answer. place: (i, n): worker i
    of n begins at that fraction of the work list, so that workers rarely compete for a chunk.

    Raises StopRequested after the batch in which a signal came, and RunError when the disk is full, the same Slurm
    job has started MAX_RESTARTS times in a row without one new answer and without a request to stop, or an endpoint
    gave no answer to some questions: these are not asked a second time by this worker, and stay missing.
    """
    name = f"eval {title(suite)}" if place[1] == 1 else f"eval {title(suite)}, worker {place[0]} of {place[1]}"
    answers = Answers(suite).refresh()
    done = sum(key in answers for key in questions)
    others = len(answers) - done  # of earlier turns of conversations
    if answers.cut:
        log.info(f"{name}: {answers.cut} half-written lines ignored", extra=EVERY_RANK)
    if answers.damage:
        log.info(
            f"{name}: {len(answers.damage)} lines are damaged or edited, and what they answered is asked again: "
            f"{answers.damage}",
            extra=EVERY_RANK,
        )
    log.info(f"{name}: {done} of {len(questions)} questions are answered", extra=EVERY_RANK)
    generate: Generate | None = None
    failed: dict[str, Failed] = {}  # by key
    turn, wait = _Turn(chunks, place), FIRST_WAIT
    with (
        _bounded_starts(suite, len(questions) - done),
        Writer(suite) as writer,
        Progress(len(questions), name, "answer", initial=done) as progress,
    ):
        while chunk := turn.next(answers, failed):
            _check_signal(name)
            missing = (questions[key] for key in chunk.keys if key not in answers and key not in failed)
            claim = claims.take(chunk.name, worklist.by_attack(missing))
            if claim is None:
                if turn.put_back(chunk):
                    if wait < LONGEST_WAIT <= 2 * wait:
                        log.info(f"{name}: other workers have claimed all missing questions; waiting", extra=EVERY_RANK)
                    time.sleep(wait)
                    wait = min(2 * wait, LONGEST_WAIT)
                    answers.refresh()
                continue
            wait = FIRST_WAIT
            try:
                # Its last owner may have answered some or all of it since the last look.
                answers.refresh()
                left = [key for key in chunk.keys if key not in answers and key not in failed]
                if missing := {key: questions[key] for key in left}:
                    generate = generate or load()
                    failed |= _answer(missing, generate, claims, claim, writer)
            finally:
                claims.release(claim)
            turn.put_back(chunk)
            progress.show(min(len(answers.refresh()) - others, len(questions)))
            if any(failure.untried for failure in failed.values()):
                break
        _check_signal(name)
        _require_answers(name, questions, answers.refresh(), failed)
    return answers


def _answer(
    missing: Mapping[str, Question], generate: Generate, claims: Claims, claim: Claim, writer: Writer
) -> dict[str, Failed]:
    """Answer batch by batch, until everything is answered, a signal comes, or another worker has taken the claim over
    and answers instead. Returns why there is no answer, by key, where an endpoint gave none.
    """
    keys, failed = list(missing), dict[str, Failed]()
    for batch in generate([question.sent or question.sample for question in missing.values()]):
        if not claims.held(claim):
            break
        given = [(keys[i], outcome) for i, outcome in batch if not isinstance(outcome, Failed)]
        failed |= {keys[i]: outcome for i, outcome in batch if isinstance(outcome, Failed)}
        if given:
            writer.append(rows.row(key, missing[key], answer) for key, answer in given)
            claims.done += len(given)
        if signals.received() and not getattr(generate, "ends_on_signal", False):
            break
    return failed


def _require_answers(
    name: str, questions: Mapping[str, Question], answers: Answers, failed: Mapping[str, Failed]
) -> None:
    """Raise RunError when requests of this worker failed, and no other worker has got their answers."""
    lost = [failure for key, failure in failed.items() if key not in answers]
    if not lost:
        return
    reasons = ", ".join(f"{why} × {n}" for why, n in sorted(Counter(failure.reason for failure in lost).items()))
    words = next((f"; the server's words: {failure.words}" for failure in lost if failure.words), "")
    missing = sum(key not in answers for key in questions)
    raise RunError(
        f"{name}: {missing} of {len(questions)} questions have no answer; {len(lost)} requests failed or were not sent "
        f"({reasons}){words}. Every answer so far is on disk, and the next start sends the missing requests"
    )


def _check_signal(name: str) -> None:
    if signal := signals.received():
        raise StopRequested(f"{name}: stopped by {signal}; every answer so far is on disk")


class _Turn:
    """Which chunk is next: round and round, until each chunk is answered."""

    def __init__(self, chunks: Sequence[Chunk], place: tuple[int, int]) -> None:
        start = place[0] * len(chunks) // place[1]
        self.left = deque([*chunks[start:], *chunks[:start]])
        self.back = 0  # chunks put back since the last one that turned out to be answered

    def next(self, answers: Answers, failed: Container[str]) -> Chunk | None:
        """The next chunk with a question that is neither answered nor among the failed ones."""
        while self.left:
            chunk = self.left.popleft()
            if not all(key in answers or key in failed for key in chunk.keys):
                return chunk
            self.back = 0
        return None

    def put_back(self, chunk: Chunk) -> bool:
        """True when a whole round has passed without a chunk that could be claimed."""
        self.left.append(chunk)
        self.back += 1
        if self.back < len(self.left):
            return False
        self.back = 0
        return True


@contextmanager
def _bounded_starts(suite: Path, missing: int) -> Iterator[None]:
    """Raise RunError when the same task of a Slurm job keeps starting without any new answer in between.

    A start that is stopped on request does not count: the next one may get further. Nor does one that got all of its
    answers.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        yield
        return
    file = suite / "starts" / f"{job}-{os.environ.get('SLURM_PROCID', '0')}.jsonl"
    records = list(whole_objects("attempt", file))  # others were cut by a kill; they count as no start
    starts = [
        start["missing"] for start, after in pairwise([*records, {}]) if "missing" in start and not after.keys() & ENDED
    ]
    if missing and starts[-MAX_RESTARTS:] == [missing] * MAX_RESTARTS:
        raise RunError(
            f"{suite}: Slurm job {job} has started {MAX_RESTARTS} times with {missing} answers missing; see its log "
            "for the cause, then submit it again"
        )
    _record(file, {"missing": missing})
    try:
        yield
    except StopRequested:
        _record(file, {"stopped": True})
        raise
    _record(file, {"answered": True})


def _record(file: Path, line: Mapping[str, int]) -> None:
    with disk.refusals(file.parent, KEPT):
        append(file, state.sealed("attempt", line))
