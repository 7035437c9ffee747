"""Batches made ahead of the steps that use them, in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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


def made(make: Callable[[Any], T], items: Sequence[Any], workers: int) -> Iterator[T]:
    """`make` of each item, in order; by `workers` processes ahead of time, or with 0 in this one when it is asked for.

    `make` works on the CPU. What it raises is raised here, in the item's turn. Tensors come in pinned memory where
    there is a GPU, so that copies to it wait for nothing; whatever `make` returns must then have `pin_memory()`.
    """
    if not workers or not items:
        return map(make, items)
    # Tokenizers have threads of their own, which do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        _Made(make, items),
        batch_size=None,
        num_workers=min(workers, len(items)),
        prefetch_factor=AHEAD,
        multiprocessing_context="fork",  # the samples are there already; a fresh process would read them again
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
