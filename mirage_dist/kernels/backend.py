"""The choice between Triton and eager PyTorch for a row kernel."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Whether the triton package is installed."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(rows: Tensor) -> bool:
    """Whether a kernel on `rows` runs in Triton: on a GPU always, on a CPU with TRITON_INTERPRET=1 (its interpreter).

    float64, the precision of the tests' reference, runs in PyTorch, as does everything where triton is not installed.
    """
    if rows.dtype == torch.float64 or not has_triton():
        return False
    return rows.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
