"""Projected gradient descent on pixels, many questions at once.

Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks" (arXiv 1706.06083, section 2.1): from
a random start within ε of the picture in the maximum norm, a step moves every value by `step_size` against the sign of
the loss's gradient, and back into that cube and into 0 … 255. Two things differ. The loss is computed on whole pixel
values, which a PNG file holds, not on the point that the steps move; rounding counts as the identity in the gradient.
And of all pictures so computed the best one is the result, not the last.

A question leaves the batch as soon as its target is reached, and the next one takes its place. The rows of a batch do
not depend on one another, so that the batch changes a result by rounding at most.

Shapes: C = 3 × H × W, the picture of one row.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mirage_dist.data.encoding.conversation import called
from mirage_dist.evals.attacks.pixels.victim import Shown, Victim
from mirage_dist.schema import RunError

WHITE = 255.0


@dataclass(frozen=True)
class Budget:
    """What a search may do. epsilon: the most by which a value changes, of 255. stages: gradient steps, ascending and
    fewer than `total`, after which the best picture so far is a result too.
    """

    epsilon: int
    step_size: float
    steps: int
    restarts: int
    stages: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Gradient steps when no restart reaches the target."""
        return self.steps * self.restarts


@dataclass(frozen=True)
class Result:
    """The outcome of a search for one question.

    pictures: the best one at each stage and at the end, (C, H, W), uint8 on the CPU. steps: gradient steps that were
    taken. clean, loss: of the unchanged picture and of the last one here. reached: whether greedy decoding begins the
    answer with the target.
    """

    pictures: list[Tensor]
    steps: int
    clean: float
    loss: float
    reached: bool

    def record(self) -> dict[str, Any]:
        """What a journal keeps beside the pictures."""
        return {"steps": self.steps, "clean": self.clean, "loss": self.loss, "reached": self.reached}


class Search:
    """The search for one question. seed: of its random starts, together with the number of the restart."""

    def __init__(self, shown: Shown, budget: Budget, seed: str) -> None:
        self.shown, self.budget, self.seed = shown, budget, seed
        self.restart, self.step, self.total = -1, 0, 0  # before the first restart the unchanged picture is scored
        self.moved_CHW = shown.picture_CHW  # a point within the cube, of any values
        self.clean = self.loss = math.inf
        self.best_CHW = shown.picture_CHW
        self.stages: list[Tensor] = []
        self.reached = False

    @property
    def picture_CHW(self) -> Tensor:
        """What is scored next: whole values."""
        return self.moved_CHW.round()

    def advance(self, loss: float, reached: bool, gradient_CHW: Tensor) -> bool:
        """Go on with the score of `picture_CHW`; False when the search is over. Raises RunError for a loss of NaN."""
        if not math.isfinite(loss):
            raise RunError(f"{called(self.shown.sample)}: the target's loss is {loss}; try model.dtype=fp32")
        if loss < self.loss or reached:
            self.loss, self.best_CHW = loss, self.picture_CHW
        self.reached = reached
        if self.restart < 0:
            self.clean = loss
        while len(self.stages) < len(self.budget.stages) and self.budget.stages[len(self.stages)] <= self.total:
            self.stages.append(self.best_CHW)
        if reached:
            return False
        if self.restart >= 0 and self.step < self.budget.steps:
            self.moved_CHW = self._within(self.moved_CHW - self.budget.step_size * gradient_CHW.sign())
            self.step, self.total = self.step + 1, self.total + 1
            return True
        if self.restart + 1 < self.budget.restarts:
            self.restart, self.step = self.restart + 1, 0
            self.moved_CHW = self._within(self.shown.picture_CHW + self._start())
            return True
        return False

    def result(self) -> Result:
        stages = [*self.stages, *[self.best_CHW] * (len(self.budget.stages) + 1 - len(self.stages))]
        return Result([own.to(torch.uint8).cpu() for own in stages], self.total, self.clean, self.loss, self.reached)

    def _within(self, point_CHW: Tensor) -> Tensor:
        clean, epsilon = self.shown.picture_CHW, self.budget.epsilon
        return torch.minimum(torch.maximum(point_CHW, clean - epsilon), clean + epsilon).clamp(0, WHITE)

    def _start(self) -> Tensor:
        """Uniform within the cube; from the CPU's generator, the same on every device and in every batch."""
        draw = generator(f"{self.seed} {self.restart}")
        noise = torch.rand(self.shown.picture_CHW.shape, generator=draw) * 2 - 1
        return noise.to(self.shown.picture_CHW.device) * self.budget.epsilon


def generator(seed: str) -> torch.Generator:
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def searched(
    victim: Victim, searches: Iterable[Search], check: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, Result]]:
    """Each search's result with its index, as soon as it is over. `victim.rows` of them go through the model at once;
    where the memory does not suffice it is halved, and the rows left out go on later from where they are.

    check: called before each pass through the model, when every result of the one before has been yielded; raises to
    stop, which loses the searches that go on.
    """
    source, left_out, active = enumerate(searches), deque[tuple[int, Search]](), list[tuple[int, Search]]()
    while True:
        while len(active) < victim.rows.count and (entry := left_out.popleft() if left_out else next(source, None)):
            active.append(entry)
        if not active:
            return
        while len(active) > victim.rows.count:
            left_out.append(active.pop())
        batch = victim.encoded([search.shown for _, search in active])
        going = active
        while len(going) == len(active):
            check()
            attacked = [search.picture_CHW for _, search in active]
            what = called(active[0][1].shown.sample)
            score = victim.rows.attempt(partial(victim.score, batch, attacked), len(active), what)
            if score is None:
                break
            going = []
            for row, (number, search) in enumerate(active):
                if search.advance(float(score.loss_B[row]), bool(score.reached_B[row]), score.gradients[row]):
                    going.append((number, search))
                else:
                    yield number, search.result()
        active = going
