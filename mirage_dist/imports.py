"""Importing large libraries without the garbage collector, which finds no garbage in them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """A block that imports PyTorch, transformers and DeepSpeed, and little else: its objects are modules, which stay.

    Python's collector would look at all of them again each time that their number has grown by a quarter, a sixth of a
    start's processor time. It is off within the block, and as it was behind it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
