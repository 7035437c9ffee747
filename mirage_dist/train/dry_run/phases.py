"""Peak memory and time of each part of a dry run, and what to change where the memory does not suffice."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mirage_dist.schema import RunError, TrainRecipe
from mirage_dist.train.measures import usage

GIB = 1 << 30
# In the messages of PyTorch's allocators, of CUDA and of NCCL.
EXHAUSTED = ("out of memory", "can't allocate memory", "cannot allocate memory")
OFFLOAD = "configs/deepspeed/zero3_offload.json"


class Phases:
    """Peaks and seconds by phase, in order; a phase lasts until the next one begins.

    On a GPU the peak is of PyTorch's tensors, on a CPU of the process's resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.reserved = 0  # bytes that PyTorch's allocator held at most
        self.name, self._began, self._open = "libraries and data", time.monotonic(), True

    def begin(self, name: str) -> None:
        self.end()
        self.name = name
        if self.device.type == "cuda":
            usage.restart(self.device)
        else:
            _reset_peak()
        self._began, self._open = time.monotonic(), True

    def end(self) -> None:
        """Close the phase that goes on; of one that comes again, the larger peak and the last time count."""
        if not self._open:
            return
        self._open = False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[self.name] = time.monotonic() - self._began
        self.peaks[self.name] = max(self.peaks.get(self.name, 0), self._peak())

    def _peak(self) -> int:
        if self.device.type == "cuda":
            allocated, reserved = usage.highest(self.device)
            self.reserved = max(self.reserved, reserved)
            return allocated
        return resident_peak()

    @property
    def total(self) -> int:
        """Bytes that the device has; on a CPU, the machine."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @contextmanager
    def within_memory(self, recipe: TrainRecipe, ranks: int) -> Iterator[None]:
        """Raise RunError, naming the phase and what to change, where the block needs more memory than there is."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RunError) or not exhausted(error):
                raise
            self.end()
            most = max(self.peaks.values())
            raise RunError(
                f"dry run: out of memory in {self.name!r} (at most {most / GIB:.1f} of {self.total / GIB:.1f} GiB were "
                f"in use): {str(error).splitlines()[0] if str(error) else type(error).__name__}. Change, in this "
                f"order: {'; '.join(remedies(recipe, ranks))}. `mirage plan` computes what each would take"
            ) from error


def exhausted(error: BaseException) -> bool:
    """Whether an exception means that there is no more memory, on the device or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in EXHAUSTED)


def remedies(recipe: TrainRecipe, ranks: int) -> list[str]:
    """What makes a run need less memory and is not in the recipe yet, what costs least first."""
    ways = []
    if not recipe.model.gradient_checkpointing:
        ways.append("model.gradient_checkpointing=true")
    micro = recipe.train.micro_batch
    if isinstance(micro, int) and micro > 1:
        ways.append(f"train.micro_batch={micro // 2}")
    if recipe.reference == "engine":
        ways.append("reference=adapters_off" if recipe.model.lora is not None else "reference=cache")
    if "zero3" not in recipe.deepspeed:
        ways.append("deepspeed=configs/deepspeed/zero3.json")
    if recipe.train.dtype == "fp32":
        ways.append("train.dtype=bf16")
    if recipe.model.lora is None:
        ways.append("model.lora={rank: 128}")
    ways.append(f"more GPUs than {ranks}")
    if "offload" not in recipe.deepspeed and "nvme" not in recipe.deepspeed:
        ways.append(f"deepspeed={OFFLOAD} (slower)")
    if recipe.data.max_length > 1024:
        ways.append("a smaller data.max_length with data.on_long=truncate")
    return ways


def resident_peak() -> int:
    """Bytes of this process's high-water mark, since `_reset_peak` where the kernel allows that."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peaks of later phases then contain those of earlier ones
