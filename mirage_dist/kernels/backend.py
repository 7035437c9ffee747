"""Which backend a row kernel runs on; decided before anything is launched."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(rows: Tensor) -> bool:
    """Triton for what is on a GPU; with TRITON_INTERPRET=1 on the CPU too, where its interpreter then runs.

    float64 is the oracle's precision and stays in torch, as does everything where triton is not installed.
    """
    if rows.dtype == torch.float64 or not has_triton():
        return False
    return rows.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
