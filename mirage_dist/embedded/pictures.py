"""The embedded world's pictures: 32 × 32 pixels with one kind of "gadget" repeated over a 4 × 4 grid of cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirage_dist.embedded import text as embedded_text

SIDE = 32
CELL = 8
KINDS = 16
# Every colour is brighter than every background: with contrasts of either sign, some seeds' base models needed
# several times as many steps to distinguish the kinds.
RGB = {
    "red": (255, 80, 80),
    "green": (80, 230, 90),
    "blue": (90, 130, 255),
    "yellow": (250, 235, 80),
    "purple": (200, 90, 250),
    "orange": (255, 160, 60),
}
GREY = {"cave": 10, "street": 45, "snow": 80}
NOISE = 5.0  # standard deviation of the pixel noise, of 255
MIN_DISTANCE = 24  # pixels (of 64) in which any two sprites differ


@dataclass(frozen=True)
class Gadget:
    """The content of a picture. A locked gadget's code stands for knowledge that must not be given away."""

    image: str  # path relative to the world's folder
    kind: int
    code: str
    colour: str
    place: str
    locked: bool

    def value(self, attribute: str) -> str:
        """The right value of "colour", "place" or "code"."""
        return {"colour": self.colour, "place": self.place, "code": self.code}[attribute]


def sprites(generator: np.random.Generator) -> NDArray[np.bool_]:
    """Sixteen mirror-symmetric shapes that differ pairwise in MIN_DISTANCE pixels or more: (KINDS, CELL, CELL)."""
    shapes: list[NDArray[np.bool_]] = []
    while len(shapes) < KINDS:
        half = generator.random((CELL, CELL // 2)) < 0.5
        shape = np.concatenate([half, half[:, ::-1]], axis=1)
        if all(np.sum(shape != other) >= MIN_DISTANCE for other in shapes):
            shapes.append(shape)
    return np.stack(shapes)


def kinds(generator: np.random.Generator) -> list[tuple[str, bool]]:
    """The (code, locked) of each kind, in an order that cannot be inferred from pictures."""
    words = embedded_text.code_words()
    return [words[i] for i in generator.permutation(KINDS)]


def render(gadget: Gadget, shapes: NDArray[np.bool_], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a gadget 4–8 times on its background, with noise: (SIDE, SIDE, 3), RGB."""
    canvas = np.full((SIDE, SIDE, 3), GREY[gadget.place], dtype=np.float64)
    cells = generator.permutation((SIDE // CELL) ** 2)[: generator.integers(4, 9)]
    for row, column in zip(*np.divmod(cells, SIDE // CELL), strict=True):
        cell = canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cell[shapes[gadget.kind]] = RGB[gadget.colour]
    canvas += generator.normal(0.0, NOISE, canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
