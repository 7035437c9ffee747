"""A window of steps under PyTorch's profiler: a trace of each chosen rank in RUN/profile, and a table in the log.

The trace opens in chrome://tracing or ui.perfetto.dev. It names operators and kernels, and holds no data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from mirage_dist import disk
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.ranks import Group
from mirage_dist.schema import ConfigError
from mirage_dist.schema.training import ProfileConfig

ROWS = 8  # operators in the table


class Profile:
    """Records the steps that `options` names, on this rank if it is one of those chosen; a context manager."""

    def __init__(self, options: ProfileConfig | None, root: Path, workspace: Path, group: Group) -> None:
        self.options, self.root, self.workspace, self.group = options, root, workspace, group
        self.profiler: Any = None
        self.began = self.ended = 0

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A window that a stop cut short is written with the steps that it has; after an error nothing is."""
        if kind is None:
            self._write()
        elif self.profiler is not None:
            self.profiler.stop()

    def before(self, step: int) -> None:
        """Call it before step `step` (from 1)."""
        if self.options is None or self.group.rank not in self.options.ranks or step != self.options.first:
            return
        on_gpu = self.group.device.type == "cuda"
        self.profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        self.profiler.start()
        self.began = step

    def after(self, step: int) -> None:
        """Call it after the step."""
        self.ended = step
        if self.options is not None and step == self.options.first + self.options.steps - 1:
            self._write()

    def _write(self) -> None:
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        name = f"rank-{self.group.rank:05d}-steps-{self.began:06d}-{self.ended:06d}.json.gz"
        partial, folder = self.workspace / name, self.root / "profile"
        profiler.export_chrome_trace(str(partial))
        folder.mkdir(exist_ok=True)
        disk.publish(partial, folder / name)
        head = f"{self.root.name}: rank {self.group.rank}, steps {self.began} to {self.ended}: {folder / name}"
        log.info("\n".join([head, *table(profiler.key_averages(), self.group.device.type)]), extra=EVERY_RANK)


def table(averages: Any, device: str) -> list[str]:
    """The operators that took most time themselves, a line each: time, share, calls, name."""
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = sorted(((getattr(a, kind), a.count, a.key) for a in averages), reverse=True)
    whole = sum(time for time, _, _ in times) or 1
    return [f"  {t / 1000:10.1f} ms  {t / whole:5.1%}  {count:6d} ×  {key[:80]}" for t, count, key in times[:ROWS]]


def check(options: ProfileConfig | None, size: int) -> None:
    """Raise ConfigError for ranks that a run of `size` ranks does not have."""
    if options is not None and (absent := [rank for rank in options.ranks if rank >= size]):
        raise ConfigError(f"monitor.profile.ranks: {absent}; expected ranks from 0 to {size - 1} in a run of {size}")
