"""Batches made ahead of the steps that use them, in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mirage_dist.schema import RunError

T = TypeVar("T")
AHEAD = 2  # batches a worker keeps ready
START_SECONDS = 30.0  # in which a worker that was forked says that it is there
STARTS = 3
FORK = multiprocessing.get_context("fork")


class _Made(Dataset):
    def __init__(self, make: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.make, self.items = make, items

    def __getitem__(self, number: int) -> Any:
        return self.make(self.items[number])

    def __len__(self) -> int:
        return len(self.items)


def _begin(there: Any, _worker: int) -> None:
    """Say that this worker is there, and be deaf from now on.

    A stop that Slurm tells every process of a job is the ranks' affair: they need batches until they have agreed.
    A worker ends when its rank closes the batches, and a few seconds after a rank that is gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    there.release()


def made(make: Callable[[Any], T], items: Sequence[Any], workers: int) -> Generator[T]:
    """`make` of each item, in order; by `workers` processes ahead of time, or with 0 in this one when it is asked for.

    `make` works on the CPU. What it raises is raised here, in the item's turn. Tensors come in pinned memory where
    there is a GPU, so that copies to it wait for nothing; whatever `make` returns must then have `pin_memory()`. Close
    what this returns: only that ends the workers.
    """
    if not workers or not items:
        yield from map(make, items)
        return
    # Tokenizers have threads of their own, which do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    batches = _started(make, items, min(workers, len(items)))
    try:
        yield from batches
    finally:
        # Left to the garbage collector, an error's traceback would keep deaf workers that the process's exit waits for.
        batches._shutdown_workers()


def _started(make: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Any:
    """A loader's iterator, all of whose workers are there; raises RunError when they cannot be had.

    CPython before 3.12 can hang in a fork, before the worker's first line: a thread of torch's that enters Python just
    then holds the lock on the list of threads, which the child takes before it is made anew. Such a worker never
    makes a batch, and its rank and then all others would wait for it.
    """
    for _ in range(STARTS):
        there = FORK.Semaphore(0)
        loader = DataLoader(
            _Made(make, items),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=AHEAD,
            multiprocessing_context=FORK,  # the samples are there already; a fresh process would read them again
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=partial(_begin, there),
        )
        batches: Any = iter(loader)
        end = time.monotonic() + START_SECONDS
        if all(there.acquire(timeout=max(0.0, end - time.monotonic())) for _ in range(workers)):
            return batches
        print(f"a batch worker did not start in {START_SECONDS:g} s; all are started again", flush=True)
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.kill()  # it hears nothing gentler
            worker.join()
    raise RunError(
        f"data.workers={workers}: batch workers did not start, {STARTS} times in a row; data.workers=0 needs none"
    )
