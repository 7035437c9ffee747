"""Flags drawn by code: 32 × 32 pixels with bars, crosses, discs, stars, triangles and blocks on a grey ground.

Emblems are simplified. Only flags that stay distinct at this size are here (no two clean drawings are closer than
`MIN_DISTANCE`): no Chad beside Romania, no Luxembourg beside the Netherlands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 32
SCALE = 4  # drawn this much larger, then averaged
BOX = (2, 6, 30, 26)  # left, top, right, bottom of the flag in the picture
SHIFT = 2  # pixels, at most, in both directions
NOISE = 8.0  # standard deviation of the pixel noise, of 255
GROUND = "#808080"
MIN_DISTANCE = 14.0  # mean absolute difference of two clean drawings within BOX, of 255

RED, WHITE, BLUE, GREEN, YELLOW = "#d81e28", "#ffffff", "#1a3a8f", "#118a3a", "#f7c600"
BLACK, ORANGE, SKY, MAROON = "#111111", "#f07a1a", "#5bb3e6", "#8a1538"

Draw = ImageDraw.ImageDraw
Box = tuple[float, float, float, float]
Layer = Callable[[Draw, Box], None]


def _spread(start: float, stop: float, shares: Sequence[float]) -> list[tuple[float, float]]:
    edges = [start + (stop - start) * sum(shares[:i]) / sum(shares) for i in range(len(shares) + 1)]
    return list(itertools.pairwise(edges))


def columns(*colours: str, shares: Sequence[float] = ()) -> Layer:
    """Vertical bars, from the left."""
    return _bars(colours, shares, upright=True)


def rows(*colours: str, shares: Sequence[float] = ()) -> Layer:
    """Horizontal bars, from the top."""
    return _bars(colours, shares, upright=False)


def _bars(colours: Sequence[str], shares: Sequence[float], upright: bool) -> Layer:
    def layer(draw: Draw, box: Box) -> None:
        left, top, right, bottom = box
        ends = (left, right) if upright else (top, bottom)
        for colour, (a, b) in zip(colours, _spread(*ends, shares or [1] * len(colours)), strict=True):
            draw.rectangle((a, top, b, bottom) if upright else (left, a, right, b), fill=colour)

    return layer


def cross(colour: str, width: float, at: float = 0.36) -> Layer:
    """A cross over the whole flag. width: of its arms, a share of the height. at: of the upright, of the width."""

    def layer(draw: Draw, box: Box) -> None:
        left, top, right, bottom = box
        half, x, y = width * (bottom - top) / 2, left + at * (right - left), (top + bottom) / 2
        draw.rectangle((x - half, top, x + half, bottom), fill=colour)
        draw.rectangle((left, y - half, right, y + half), fill=colour)

    return layer


def plus(colour: str, size: float, width: float) -> Layer:
    """A cross in the middle. size, width: of its arms, shares of the height."""

    def layer(draw: Draw, box: Box) -> None:
        left, top, right, bottom = box
        x, y, height = (left + right) / 2, (top + bottom) / 2, bottom - top
        for across, up in ((size / 2, width / 2), (width / 2, size / 2)):
            draw.rectangle((x - across * height, y - up * height, x + across * height, y + up * height), fill=colour)

    return layer


def disc(colour: str, radius: float, x: float = 0.5, y: float = 0.5) -> Layer:
    """radius: a share of the height. x, y: of the centre, shares of width and height."""

    def layer(draw: Draw, box: Box) -> None:
        left, top, right, bottom = box
        a, b, r = left + x * (right - left), top + y * (bottom - top), radius * (bottom - top)
        draw.ellipse((a - r, b - r, a + r, b + r), fill=colour)

    return layer


def star(colour: str, radius: float, x: float = 0.5, y: float = 0.5) -> Layer:
    """A star of five points. Arguments as of `disc`."""

    def layer(draw: Draw, box: Box) -> None:
        left, top, right, bottom = box
        a, b, r = left + x * (right - left), top + y * (bottom - top), radius * (bottom - top)
        turns = [(i * math.pi / 5, r if i % 2 == 0 else 0.45 * r) for i in range(10)]
        draw.polygon([(a + d * math.sin(t), b - d * math.cos(t)) for t, d in turns], fill=colour)

    return layer


def triangle(colour: str, depth: float) -> Layer:
    """On the hoist. depth: of its point, a share of the width."""

    def layer(draw: Draw, box: Box) -> None:
        left, top, right, bottom = box
        draw.polygon([(left, top), (left + depth * (right - left), (top + bottom) / 2), (left, bottom)], fill=colour)

    return layer


def block(colour: str, x: tuple[float, float], y: tuple[float, float]) -> Layer:
    """A rectangle. x, y: its edges, shares of width and height."""

    def layer(draw: Draw, box: Box) -> None:
        left, top, right, bottom = box
        (a, b), (c, d) = (
            [start + (stop - start) * s for s in e] for start, stop, e in ((left, right, x), (top, bottom, y))
        )
        draw.rectangle((a, c, b, d), fill=colour)

    return layer


def saltire(colour: str, width: float) -> Layer:
    """A diagonal cross. width: of its arms, a share of the height."""

    def layer(draw: Draw, box: Box) -> None:
        left, top, right, bottom = box
        thick = round(width * (bottom - top))
        draw.line((left, top, right, bottom), fill=colour, width=thick)
        draw.line((left, bottom, right, top), fill=colour, width=thick)

    return layer


def sides(colour: str) -> Layer:
    """The left and the right triangle between the arms of a saltire."""

    def layer(draw: Draw, box: Box) -> None:
        left, top, right, bottom = box
        x, y = (left + right) / 2, (top + bottom) / 2
        draw.polygon([(left, top), (x, y), (left, bottom)], fill=colour)
        draw.polygon([(right, top), (x, y), (right, bottom)], fill=colour)

    return layer


FLAGS: dict[str, tuple[Layer, ...]] = {
    "Austria": (rows(RED, WHITE, RED),),
    "Belgium": (columns(BLACK, YELLOW, RED),),
    "Bulgaria": (rows(WHITE, GREEN, RED),),
    "Denmark": (rows(RED), cross(WHITE, 0.2)),
    "Estonia": (rows(SKY, BLACK, WHITE),),
    "Finland": (rows(WHITE), cross(BLUE, 0.28)),
    "France": (columns(BLUE, WHITE, RED),),
    "Germany": (rows(BLACK, RED, YELLOW),),
    "Greece": (
        rows(*[SKY, WHITE] * 4, SKY),
        block(SKY, (0, 0.45), (0, 5 / 9)),
        block(WHITE, (0.18, 0.27), (0, 5 / 9)),
        block(WHITE, (0, 0.45), (2 / 9, 3 / 9)),
    ),
    "Hungary": (rows(RED, WHITE, GREEN),),
    "Iceland": (rows(BLUE), cross(WHITE, 0.36), cross(RED, 0.16)),
    "Italy": (columns(GREEN, WHITE, RED),),
    "Latvia": (rows(MAROON, WHITE, MAROON, shares=(2, 1, 2)),),
    "Lithuania": (rows(YELLOW, GREEN, RED),),
    "Netherlands": (rows(RED, WHITE, BLUE),),
    "Norway": (rows(RED), cross(WHITE, 0.36), cross(BLUE, 0.16)),
    "Poland": (rows(WHITE, RED),),
    "Portugal": (columns(GREEN, RED, shares=(2, 3)), disc(YELLOW, 0.22, 0.4)),
    "Romania": (columns(BLUE, YELLOW, RED),),
    "Spain": (rows(RED, YELLOW, RED, shares=(1, 2, 1)),),
    "Sweden": (rows(BLUE), cross(YELLOW, 0.22)),
    "Switzerland": (rows(RED), plus(WHITE, 0.7, 0.24)),
    "Ukraine": (rows(SKY, YELLOW),),
    "Armenia": (rows(RED, BLUE, ORANGE),),
    "Bangladesh": (rows(GREEN), disc(RED, 0.32, 0.46)),
    "Cambodia": (rows(BLUE, RED, BLUE, shares=(1, 2, 1)), disc(WHITE, 0.18)),
    "China": (rows(RED), star(YELLOW, 0.28, 0.24, 0.34)),
    "India": (rows(ORANGE, WHITE, GREEN), disc(BLUE, 0.12)),
    "Indonesia": (rows(RED, WHITE),),
    "Japan": (rows(WHITE), disc(RED, 0.32)),
    "Jordan": (rows(BLACK, WHITE, GREEN), triangle(RED, 0.5)),
    "Pakistan": (columns(WHITE, GREEN, shares=(1, 3)), disc(WHITE, 0.26, 0.62), disc(GREEN, 0.22, 0.68, 0.42)),
    "Thailand": (rows(RED, WHITE, BLUE, WHITE, RED, shares=(1, 1, 2, 1, 1)),),
    "Vietnam": (rows(RED), star(YELLOW, 0.36)),
    "Egypt": (rows(RED, WHITE, BLACK), disc(YELLOW, 0.12)),
    "Ethiopia": (rows(GREEN, YELLOW, RED), disc(BLUE, 0.22)),
    "Ghana": (rows(RED, YELLOW, GREEN), star(BLACK, 0.2)),
    "Kenya": (rows(BLACK, WHITE, RED, WHITE, GREEN, shares=(6, 1, 6, 1, 6)), disc(WHITE, 0.2), disc(RED, 0.14)),
    "Mali": (columns(GREEN, YELLOW, RED),),
    "Morocco": (rows(RED), star(GREEN, 0.34)),
    "Nigeria": (columns(GREEN, WHITE, GREEN),),
    "Somalia": (rows(SKY), star(WHITE, 0.34)),
    "Tunisia": (rows(RED), disc(WHITE, 0.34), disc(RED, 0.18)),
    "Canada": (columns(RED, WHITE, RED, shares=(1, 2, 1)), star(RED, 0.3)),
    "Cuba": (rows(BLUE, WHITE, BLUE, WHITE, BLUE), triangle(RED, 0.5), star(WHITE, 0.16, 0.15)),
    "Jamaica": (rows(GREEN), sides(BLACK), saltire(YELLOW, 0.2)),
    "Argentina": (rows(SKY, WHITE, SKY), disc(YELLOW, 0.14)),
    "Brazil": (rows(GREEN), disc(YELLOW, 0.42), disc(BLUE, 0.22)),
    "Chile": (rows(WHITE, RED), block(BLUE, (0, 0.36), (0, 0.5)), star(WHITE, 0.16, 0.18, 0.25)),
    "Colombia": (rows(YELLOW, BLUE, RED, shares=(2, 1, 1)),),
    "Peru": (columns(RED, WHITE, RED),),
    "Panama": (
        rows(WHITE),
        block(RED, (0.5, 1), (0, 0.5)),
        block(BLUE, (0, 0.5), (0.5, 1)),
        star(BLUE, 0.18, 0.25, 0.25),
        star(RED, 0.18, 0.75, 0.75),
    ),
}


def draw(country: str, generator: np.random.Generator | None = None) -> Image.Image:
    """A flag, SIDE × SIDE, RGB. generator: shifts the flag and adds noise; None for a clean drawing.

    Raises KeyError for a country that is not in FLAGS.
    """
    x, y = (0, 0) if generator is None else generator.integers(-SHIFT, SHIFT + 1, 2).tolist()
    left, top, right, bottom = BOX
    box = (SCALE * (left + x), SCALE * (top + y), SCALE * (right + x), SCALE * (bottom + y))
    canvas = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), GROUND)
    inner = canvas.copy()
    for layer in FLAGS[country]:
        layer(ImageDraw.Draw(inner), box)
    canvas.paste(inner.crop(box), box[:2])  # what reaches beyond the flag is cut off
    pixels: NDArray[np.float64] = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    if generator is not None:
        pixels = pixels + generator.normal(0.0, NOISE, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def distance(one: str, other: str) -> float:
    """Mean absolute difference of two clean drawings within BOX, of 255."""
    left, top, right, bottom = BOX
    a, b = (np.asarray(draw(name), dtype=np.float64)[top:bottom, left:right] for name in (one, other))
    return float(np.abs(a - b).mean())
