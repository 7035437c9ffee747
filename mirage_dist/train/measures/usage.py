"""The memory that a process and its GPU use.

PyTorch keeps one high-water mark a GPU, which every step's record begins anew. Whoever measures over longer than a step
takes `highest`, which knows what the steps have read; nothing else may reset the mark.
"""

from __future__ import annotations

import resource

import torch

MIB = 1 << 20
NAMES = ("allocated_mib", "reserved_mib", "host_mib")
_read = (0, 0)  # the largest marks that `peaks` has read since `restart`, in bytes


def peaks(device: torch.device) -> tuple[float, ...]:
    """MiB, as in NAMES: the most that tensors had on the GPU since the last call, the most that its allocator held, and
    the most memory that this process had since it began. No wait for the GPU.
    """
    global _read
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type != "cuda":
        return 0.0, 0.0, host
    marks, _read = _marks(device), highest(device)
    torch.cuda.reset_peak_memory_stats(device)
    return marks[0] / MIB, marks[1] / MIB, host


def highest(device: torch.device) -> tuple[int, int]:
    """Bytes: the most that tensors had on the GPU, and that its allocator held, since `restart` or the process's start,
    whatever calls of `peaks` came between.
    """
    allocated, reserved = _marks(device)
    return max(_read[0], allocated), max(_read[1], reserved)


def restart(device: torch.device) -> None:
    """`highest` begins anew, with what is there now."""
    global _read
    _read = (0, 0)
    torch.cuda.reset_peak_memory_stats(device)


def _marks(device: torch.device) -> tuple[int, int]:
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
