"""One perturbation for several pictures, optimised step by step and kept on disk.

A step adds the perturbation, scaled to each picture and rounded to whole values, to all of them, computes the gradient
of the mean loss, and moves every value of the perturbation by `step_size` against its sign, within ± ε. The best
perturbation so far is the result. The file holds the state after each step, so that a search that was killed goes on.

Shapes: C = 3 × L × L, the perturbation; C × H × W, a picture.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_dist.data.encoding.conversation import called
from mirage_dist.evals.attacks.pixels.search import WHITE
from mirage_dist.evals.attacks.pixels.victim import Shown, Victim
from mirage_dist.evals.sharing import files
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.schema import RunError


@dataclass(frozen=True)
class State:
    """After `step` steps. moved_CLL: the perturbation that the next step starts from. best_CLL: that of the lowest mean
    loss, which is `best`. loss: of the last one that was scored. clean: of the unchanged pictures.
    """

    step: int
    moved_CLL: Tensor
    best_CLL: Tensor
    loss: float
    best: float
    clean: float


class Search:
    """A search whose state is in `file`. ids: of the samples, for the file."""

    def __init__(
        self,
        victim: Victim,
        rows: Sequence[Shown],
        epsilon: int,
        step_size: float,
        side: int,
        file: Path,
        ids: Sequence[str],
    ) -> None:
        self.victim, self.rows, self.epsilon, self.step_size = victim, list(rows), epsilon, step_size
        self.file, self.ids = file, list(ids)
        none_CLL = torch.zeros(3, side, side, device=victim.device)
        self.state = self._saved(side) or State(0, none_CLL, none_CLL, math.inf, math.inf, math.nan)

    def run(self, steps: int) -> Iterator[State]:
        """Each state after it is on disk, up to `steps` steps and the score of the last one's perturbation.

        Raises RunError for a loss that is not a number.
        """
        while self.state.step <= steps:
            state = self.state
            loss, gradient_CLL = self._score(state.moved_CLL)
            if not math.isfinite(loss):
                raise RunError(f"{called(self.rows[0].sample)}: the loss is {loss}; try model.dtype=fp32")
            better = loss < state.best
            moved_CLL = (state.moved_CLL - self.step_size * gradient_CLL.sign()).clamp(-self.epsilon, self.epsilon)
            self.state = State(
                state.step + 1,
                moved_CLL,
                state.moved_CLL if better else state.best_CLL,
                loss,
                min(loss, state.best),
                loss if state.step == 0 else state.clean,
            )
            self._save()
            yield self.state

    def on(self, shown: Shown) -> Tensor:
        """A picture with the best perturbation, whole values (C, H, W), float32."""
        return self._placed(shown, self.state.best_CLL).detach()

    def _placed(self, shown: Shown, own_CLL: Tensor) -> Tensor:
        # Each value is a mean of the perturbation's with positive weights, so that it stays within ± ε.
        scaled_CHW = F.interpolate(own_CLL[None], size=shown.size, mode="bilinear", align_corners=False)[0]
        return (shown.picture_CHW + scaled_CHW.clamp(-self.epsilon, self.epsilon)).clamp(0, WHITE).round()

    def _score(self, own_CLL: Tensor) -> tuple[float, Tensor]:
        """The mean loss, and its gradient: rounding and the ends of the range count as the identity."""
        total, gradient_CLL, start = 0.0, torch.zeros_like(own_CLL), 0
        while start < len(self.rows):
            part = self.rows[start : start + self.victim.rows.count]
            batch = self.victim.encoded(part)
            pictures = [self._placed(row, own_CLL) for row in part]
            what = called(part[0].sample)
            score = self.victim.rows.attempt(partial(self.victim.score, batch, pictures), len(part), what)
            if score is None:
                continue
            total += float(score.loss_B.double().sum())
            for row, own_CHW in zip(part, score.gradients, strict=True):
                gradient_CLL += self._spread(own_CHW, row, own_CLL)
            start += len(part)
        return total / len(self.rows), gradient_CLL

    def _spread(self, gradient_CHW: Tensor, row: Shown, own_CLL: Tensor) -> Tensor:
        """The gradient with respect to a picture as one with respect to the perturbation that was scaled to it."""
        leaf = own_CLL[None].detach().requires_grad_()
        scaled = F.interpolate(leaf, size=row.size, mode="bilinear", align_corners=False)
        return torch.autograd.grad(scaled, leaf, gradient_CHW[None])[0][0]

    # ---------------------------------------------------------------------------------------------- the file

    def _save(self) -> None:
        state, content = self.state, io.BytesIO()
        np.savez(
            content,
            moved=state.moved_CLL.cpu().numpy(),
            best=state.best_CLL.cpu().numpy(),
            numbers=np.array([state.step, state.loss, state.best, state.clean]),
            ids=np.array(self.ids),
        )
        files.write(self.file, content.getvalue())

    def _saved(self, side: int) -> State | None:
        """The state in the file; None where there is none, or none that is whole, which the log then names."""
        if not self.file.exists():
            return None
        damaged = f"{self.file}: damaged or edited, so the perturbation is optimised again"
        try:
            with np.load(self.file, allow_pickle=False) as held:
                step, loss, best, clean = (float(number) for number in held["numbers"])
                moved_CLL, best_CLL = (
                    torch.from_numpy(held[name]).to(self.victim.device) for name in ("moved", "best")
                )
                ids = held["ids"].tolist()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            log.info(damaged, extra=EVERY_RANK)
            return None
        if moved_CLL.shape != (3, side, side) or best_CLL.shape != moved_CLL.shape or ids != self.ids:
            log.info(damaged, extra=EVERY_RANK)
            return None
        return State(int(step), moved_CLL, best_CLL, loss, best, clean)
