"""Random noise on pictures, as large as an attack on pixels may be: its control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mirage_dist import disk
from mirage_dist.data import pictures
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.base import Attack
from mirage_dist.evals.attacks.pixels import files
from mirage_dist.schema import ConfigError
from mirage_dist.schema.limits import CEILING
from mirage_dist.schema.numbers import Repeats, Seed, Shades

if TYPE_CHECKING:
    from mirage_dist.evals.attacks.rewrites import Rewriter


@dataclass(frozen=True)
class Noise(Attack):
    """Every value of the picture changed by `epsilon`, up or down at random, within 0 … 255.

    The corners of the cube in which `pgd` searches: no picture in it is farther from the original. shots: K pictures of
    each question. A question without a picture has none.
    """

    epsilon: Shades = 8  # of 255
    shots: Repeats = 1
    seed: Seed = 0  # of the noise
    control: bool = True

    def __call__(self, sample: Sample) -> list[Sample]:
        raise ConfigError(f"sample {sample.id!r}: its picture has not been drawn")

    def prepared(self, samples: Sequence[Sample], name: str, rewriter: Rewriter) -> Attack:
        files.check_pictured(samples, name, rewriter.encoder)
        return Noisy(self, rewriter.suite, control=self.control)


@dataclass(frozen=True)
class Noisy(Attack):
    """`noise` with a folder for its pictures."""

    noise: Noise
    home: Path

    @property
    def shots(self) -> int:
        return self.noise.shots

    @cached_property
    def names(self) -> dict[tuple[str, str], list[str]]:
        """(id, picture) -> the names of its files."""
        return {}

    def __call__(self, sample: Sample) -> list[Sample]:
        if sample.image is None:
            return []
        place = sample.id, sample.image
        if place not in self.names:
            original_HWC = np.asarray(pictures.open_picture(sample.image, CEILING.value))
            digest = pictures.sha256(sample.image)
            drawn = (self._pixels(original_HWC, f"{sample.id} {digest} {shot}") for shot in range(self.shots))
            self.names[place] = [files.saved(pixels_HWC, self.home) for pixels_HWC in drawn]
        return [files.attacked(sample, name, self.home) for name in self.names[place]]

    def _pixels(self, original_HWC: np.ndarray, part: str) -> np.ndarray:
        seed = int(disk.sha256_text(f"{self.noise.seed} {part}"), 16)
        up_HWC = np.random.default_rng(seed).integers(0, 2, original_HWC.shape, dtype=np.int16)
        return (original_HWC + (2 * up_HWC - 1) * self.noise.epsilon).clip(0, 255).astype(np.uint8)
