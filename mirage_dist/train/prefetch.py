"""Batches made ahead of the steps that use them, in worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
AHEAD = 2  # batches a worker keeps ready


class _Made(Dataset):
    def __init__(self, make: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.make, self.items = make, items

    def __getitem__(self, number: int) -> Any:
        return self.make(self.items[number])

    def __len__(self) -> int:
        return len(self.items)


def _deaf(_worker: int) -> None:
    """A stop that Slurm tells every process of a job is the ranks' affair: they need batches until they have agreed.

    A worker ends when its rank closes the batches, and a few seconds after a rank that is gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


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
    loader = DataLoader(
        _Made(make, items),
        batch_size=None,
        num_workers=min(workers, len(items)),
        prefetch_factor=AHEAD,
        multiprocessing_context="fork",  # the samples are there already; a fresh process would read them again
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_deaf,
    )
    batches: Any = iter(loader)
    try:
        yield from batches
    finally:
        # Left to the garbage collector, an error's traceback would keep deaf workers that the process's exit waits for.
        batches._shutdown_workers()
