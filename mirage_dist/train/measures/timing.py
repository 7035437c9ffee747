"""Where the time of a step goes, on each rank by its own clock: a host's on a CPU, events of the stream on a GPU.

Under ZeRO-3 all ranks move in step, so that a slow rank is not one whose forward takes longer: the others wait for it
inside theirs. A rank's *own* time is therefore taken where it waits for nobody: for its batch, in linear layers once
their weights are gathered, and in the forward outside the model (the objective). In the first micro-batch of a step the
linear layers are timed one by one, which stands for the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
Mark = Any  # a time of the host's clock, or an event of a GPU's stream


class Stopwatch:
    """Seconds of one step by part; `lap` ends the step.

    Parts: data, forward, backward, update, checkpoint (the wait for a copy of the state); within the forward model
    (inside the models), gather (linear layers that wait for their weights) and linear (their own computing).
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.began = device, time.perf_counter()
        self.spans: dict[str, list[tuple[Mark, Mark]]] = {}
        self.free: list[torch.cuda.Event] = []
        self.micro_batches, self.counting = 0, False
        self.open: dict[int, Mark] = {}  # module -> when it was entered

    def follow(self, model: nn.Module, within: nn.Module) -> None:
        """Time the calls of a model, and the linear layers of `within`, a part of it.

        Call it after DeepSpeed has hooked the model: a layer's weights are gathered between its first hook and its
        last one.
        """
        model.register_forward_pre_hook(self._enter, prepend=True)
        model.register_forward_hook(self._leave_model)
        for module in within.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._enter, prepend=True)
                module.register_forward_pre_hook(self._gathered)
                module.register_forward_hook(self._leave_linear)

    def _enter(self, module: nn.Module, _: Any) -> None:
        if self.counting:
            self.open[id(module)] = self._mark()

    def _leave_model(self, module: nn.Module, *_: Any) -> None:
        if self.counting:
            self._add("model", self.open.pop(id(module)))

    def _gathered(self, module: nn.Module, _: Any) -> None:
        if self.counting and self.micro_batches == 1:
            now = self._mark()
            self._add("gather", self.open[id(module)], now)
            self.open[id(module)] = now

    def _leave_linear(self, module: nn.Module, *_: Any) -> None:
        began = self.open.pop(id(module), None)
        if self.counting and self.micro_batches == 1 and began is not None:
            self._add("linear", began)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the step; a forward is one of a micro-batch."""
        if name == "forward":
            self.micro_batches, self.counting = self.micro_batches + 1, True
        began = self._mark()
        try:
            yield
        finally:
            self._add(name, began)
            self.counting = False

    def waiting(self, items: Iterable[T], name: str = "data") -> Iterator[T]:
        """The items; the host's wait for each is part of the step that takes it."""
        iterator = iter(items)
        while True:
            began = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.spans.setdefault(name, []).append((began, time.perf_counter()))
            yield item

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = self.free.pop() if self.free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, name: str, began: Mark, ended: Mark | None = None) -> None:
        self.spans.setdefault(name, []).append((began, self._mark() if ended is None else ended))

    def seconds(self, name: str) -> float:
        """Of one part in this step so far. On a GPU its last event must be over, or this waits for it."""
        total = 0.0
        for began, ended in self.spans.get(name, ()):
            if isinstance(ended, float):
                total += ended - began
            else:
                ended.synchronize()
                total += began.elapsed_time(ended) / 1000
        return total * (self.micro_batches if name in ("gather", "linear") else 1)

    def own(self) -> float:
        """Seconds of this step, up to its update, in which this rank waited for no other (a part of what it did)."""
        outside = self.seconds("forward") - self.seconds("model")
        return self.seconds("data") + max(0.0, outside) + self.seconds("linear")

    def skip(self) -> None:
        """Exclude the time since the last lap from the next one."""
        self.began = time.perf_counter()

    def lap(self) -> float:
        """Seconds of the step by the host's clock, which has read its result; the next step begins."""
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        marks = {id(mark): mark for pairs in self.spans.values() for pair in pairs for mark in pair}
        self.free += [mark for mark in marks.values() if not isinstance(mark, float)]
        self.spans, self.micro_batches = {}, 0
        self.open.clear()
        return seconds
