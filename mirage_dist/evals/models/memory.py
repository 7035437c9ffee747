"""Rows that go through a model at once: halved whenever the device's memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.schema import RunError

T = TypeVar("T")


def out_of_memory(error: Exception) -> bool:
    return "out of memory" in str(error) or "not enough memory" in str(error)


class RowsAtOnce:
    """How many rows fit, as far as is known: `count`.

    counted: what this number is, for the log. remedy: what to do when not even one row fits.
    """

    def __init__(self, count: int, device: torch.device, counted: str, remedy: str) -> None:
        self.count, self.device, self.counted, self.remedy = count, device, counted, remedy

    def attempt(self, function: Callable[[], T], rows: int, what: str) -> T | None:
        """The result, or None when the memory does not suffice for so many rows; `count` is then half of them.

        Raises RunError naming `what` when a single row does not fit.
        """
        try:
            return function()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error):
                raise
        # Here and not in the except clause: until that ends, the traceback keeps the failed batch's tensors alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if rows <= 1:
            raise RunError(f"out of memory on one row alone: {what}; {self.remedy}")
        self.count = rows // 2
        log.info(f"out of memory with {rows} rows; from here on {self.counted} is {self.count}", extra=EVERY_RANK)
        return None
