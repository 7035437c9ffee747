"""A place for a run's records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

End = Literal["finished", "stopped", "failed"]  # stopped: on request, to be continued
Scalars = dict[str, float | bool]
TITLES = {"wandb": "W&B", "tensorboard": "TensorBoard"}


class Sink(Protocol):
    """Each method may block or raise: it runs in a process that is nobody else's."""

    def open(self) -> int:
        """Start, or continue what an earlier start began. Returns the last step that the sink holds, 0 for none."""
        ...

    def write(self, step: int, values: Scalars) -> None:
        """The next step's values; steps rise."""
        ...

    def log(self, values: Mapping[str, float], table: Mapping[str, Any] | None) -> None:
        """Results of an evaluation, and answers with their verdicts: {"columns": …, "data": …}."""
        ...

    def summary(self, values: Mapping[str, float]) -> None:
        """Results that describe the run as a whole."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Notify the run's owner, where the sink can."""
        ...

    def close(self, end: End) -> None:
        """Returns when everything is stored. Raises when something is not."""
        ...


def scalars(record: Mapping[str, Any]) -> Scalars:
    """The numbers of a record of metrics.jsonl by name, a group's as GROUP/NAME. What is not finite is left out, and so
    is what is no number: hosts and samples stay on this machine.
    """
    flat = {}
    for name, value in record.items():
        own = {f"{name}/{part}": one for part, one in value.items()} if isinstance(value, Mapping) else {name: value}
        flat.update({key: one for key, one in own.items() if isinstance(one, int | float)})
    flat.pop("step", None)
    return flat


def complete(record: Mapping[str, Any]) -> bool:
    """Whether a record of metrics.jsonl has all its values.

    One that a stop left without its held-out loss (null) gets it at the next start: a sink takes each step once.
    """
    return record.get("validation", {}) is not None


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
