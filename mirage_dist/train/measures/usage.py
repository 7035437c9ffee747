"""The memory that a process and its GPU use."""

from __future__ import annotations

import resource

import torch

MIB = 1 << 20
NAMES = ("allocated_mib", "reserved_mib", "host_mib")


def peaks(device: torch.device) -> tuple[float, ...]:
    """MiB, as in NAMES: the most that tensors had on the GPU since the last call, the most that its allocator held, and
    the most memory that this process had since it began. No wait for the GPU.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type != "cuda":
        return 0.0, 0.0, host
    gpu = torch.cuda.max_memory_allocated(device) / MIB, torch.cuda.max_memory_reserved(device) / MIB
    torch.cuda.reset_peak_memory_stats(device)
    return *gpu, host
