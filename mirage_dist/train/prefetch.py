"""Batches made ahead of the steps that use them, in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.schema import ConfigError, RunError

T = TypeVar("T")
AHEAD = 2  # batches that a worker keeps ready
START_SECONDS = 30.0  # within which a forked worker must report that it has started
STARTS = 3
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class _Fault:
    """An error of bad input, whose message a loader would wrap in the worker's traceback."""

    message: str


class _Made(Dataset):
    def __init__(self, make: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.make, self.items = make, items

    def __getitem__(self, number: int) -> Any:
        try:
            return self.make(self.items[number])
        except ConfigError as error:
            return _Fault(str(error))

    def __len__(self) -> int:
        return len(self.items)


def _begin(started: Any, _worker: int) -> None:
    """Report that this worker has started, and ignore stop signals from now on.

    Slurm signals every process of a job, but the ranks decide when to stop, and need batches until they have agreed.
    A worker ends when its rank closes the batches, and within seconds after its rank has died.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    started.release()


def made(make: Callable[[Any], T], items: Sequence[Any], workers: int) -> Generator[T]:
    """`make` of each item, in order: ahead of time in `workers` processes, or with 0 in this process, on demand.

    `make` works on the CPU. Its errors are raised here, at the item's turn, a ConfigError of any kind as a plain one.
    On a machine with a GPU, tensors are in pinned memory, so that the host does not wait for copies to the GPU; the
    results of `make` must then have `pin_memory()`. Close the generator: nothing else ends the workers. Raises RunError
    when no worker starts.
    """
    if not workers or not items:
        yield from map(make, items)
        return
    # Threads of the tokenizers do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    batches = _started(make, items, min(workers, len(items)))
    try:
        for batch in batches:
            if isinstance(batch, _Fault):
                raise ConfigError(batch.message)
            yield batch
    finally:
        # An error's traceback keeps the loader alive, and the exit of this process would wait for its workers forever.
        batches._shutdown_workers()


def _started(make: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Any:
    """The iterator of a loader whose workers have all started. Raises RunError after STARTS failed attempts.

    CPython before 3.12 can hang in a fork, before the worker's first line: if a thread of torch enters Python at that
    moment, it holds the lock on the list of threads, which the child takes before the lock is created again. Such a
    worker never makes a batch, and its rank and then all others would wait for it.
    """
    for _ in range(STARTS):
        started = FORK.Semaphore(0)
        loader = DataLoader(
            _Made(make, items),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=AHEAD,
            multiprocessing_context=FORK,  # a forked process has the samples in memory; a new one would read them again
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=partial(_begin, started),
        )
        batches: Any = iter(loader)
        end = time.monotonic() + START_SECONDS
        if all(started.acquire(timeout=max(0.0, end - time.monotonic())) for _ in range(workers)):
            return batches
        log.warning(f"a batch worker did not start in {START_SECONDS:g} s; all are started again", extra=EVERY_RANK)
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.kill()  # it ignores the other signals, or hangs before it could receive them
            worker.join()
    raise RunError(
        f"data.workers={workers}: batch workers did not start, {STARTS} times in a row; data.workers=0 uses none"
    )
