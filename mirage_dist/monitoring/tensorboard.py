"""TensorBoard: RUN/tensorboard/events.out.tfevents.….mirage_dist, one file, which every start writes anew.

A resumed run repeats steps, and a killed one leaves files that end anywhere. Written anew from metrics.jsonl, the file
holds each step once, with the values of the run as it went on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirage_dist.monitoring.sinks import End, Scalars

LIBRARY = "tensorboardX"
FLUSH_SECONDS = 5
OURS = ".mirage_dist"  # the end of the names of our files: nobody else's are replaced


def installed() -> bool:
    return importlib.util.find_spec(LIBRARY) is not None


class TensorBoard:
    """A sink (see `sinks.Sink`) of steps alone. options: dir, the directory of the event files."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.folder = Path(options["dir"])
        self.writer: Any = None

    def open(self) -> int:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        for file in self.folder.glob(f"events.out.tfevents.*{OURS}"):
            file.unlink(missing_ok=True)
        self.writer = SummaryWriter(str(self.folder), filename_suffix=OURS, flush_secs=FLUSH_SECONDS)
        return 0

    def write(self, step: int, values: Scalars) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, float(value), step)

    def log(self, values: Mapping[str, float], table: Mapping[str, Any] | None) -> None:
        """Evaluations have files and reports of their own."""

    def summary(self, values: Mapping[str, float]) -> None:
        """As `log`."""

    def alert(self, title: str, text: str) -> None:
        """TensorBoard notifies nobody; `skipped` shows the steps that were not finite."""

    def close(self, end: End) -> None:
        self.writer.close()
