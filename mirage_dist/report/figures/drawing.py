"""What all figures share: inline SVG that follows the page's theme, axes in percent, labels that do not overlap."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from mirage_dist.evals.results import Leaf
from mirage_dist.report.figures.style import LIGHT, MARKERS, STENCIL, Palette, slots, to_variables
from mirage_dist.report.load import Run

SIZE = (4.9, 3.3)  # inches; at this size 10 pt text stays readable on a phone
LABEL_GAP = 7.5  # smallest distance between two labels, in percent of the axis
RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,  # names and words of data may hold dollar signs
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "mirage",  # ids depend on the input only
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}
Draw = Callable[[Axes, Palette], None]
Drawn = dict[str, tuple[Draw, tuple[float, float]]]  # name of a figure -> how it is drawn, and its size in inches
_kept: ContextVar[Drawn | None] = ContextVar("kept", default=None)


@contextmanager
def kept() -> Iterator[Drawn]:
    """What `svg` draws within the block, to be drawn once more in another format."""
    drawn: Drawn = {}
    token = _kept.set(drawn)
    try:
        yield drawn
    finally:
        _kept.reset(token)


def pdf(draw: Draw, size: tuple[float, float] = SIZE) -> bytes:
    """A figure on white paper as a PDF with its fonts in it; of the same input the same bytes."""
    with rc_context({**RC, "pdf.fonttype": 42}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), LIGHT)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return buffer.getvalue()


def svg(draw: Draw, name: str, description: str, size: tuple[float, float] = SIZE) -> str:
    """An inline SVG whose colours follow the page's theme.

    name: prefix of its ids, unique on the page. description: text for screen readers. size: in inches.
    """
    if (drawn := _kept.get()) is not None:
        drawn[name] = draw, size
    with rc_context(RC):
        # A figure without pyplot, whose backend belongs to the process that draws, such as a notebook's.
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), STENCIL)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)  # the page sets the width
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return to_variables(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def looks(runs: Sequence[Run], palette: Palette) -> dict[str, tuple[str, str]]:
    """Each model's (colour, marker), the same in every figure."""
    return looks_of([run.name for run in runs], palette)


def looks_of(names: Sequence[str], palette: Palette) -> dict[str, tuple[str, str]]:
    """`looks` by the models' names. Of more models than colours, those that share one differ in their markers."""
    made, uses = {}, Counter[int]()
    for name, slot in slots(names).items():
        made[name] = palette.slots[slot], MARKERS[(slot + uses[slot]) % len(MARKERS)]
        uses[slot] += 1
    return made


def interval(leaf: Leaf) -> tuple[float, float]:
    """The bounds of the 95 % interval in percent."""
    return 100 * leaf["ci95"][0], 100 * leaf["ci95"][1]


def percent_axis(axis: Axis, palette: Palette, grid: bool = True) -> None:
    """Scale an axis to 0–100 %, with faint grid lines."""
    ax = axis.axes
    axis.set_ticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"], color=palette.muted)
    if grid:
        axis.grid(True, color=palette.grid, linewidth=0.8)
    (ax.set_ylim if axis is ax.yaxis else ax.set_xlim)(-3, 103)
    ax.set_axisbelow(True)
    ax.spines["bottom"].set_visible(False)


def spread(heights: Sequence[float]) -> list[float]:
    """Ascending heights, moved up and then down by as little as makes them `LABEL_GAP` apart."""
    up: list[float] = []
    for height in heights:
        up.append(max(height, up[-1] + LABEL_GAP) if up else height)
    down: list[float] = []
    for height in reversed(up):
        down.append(min(height, down[-1] - LABEL_GAP if down else 100.0))
    return down[::-1]


def name_lines(ax: Axes, ends: Sequence[tuple[float, float, str, str]], x: float) -> None:
    """Write each line's name at its end, joined to it by a thin line. ends: (y, x, name, colour) of each line."""
    ends = sorted(ends)
    for (y, start, name, colour), at in zip(ends, spread([end[0] for end in ends]), strict=True):
        ax.plot([start + 0.05, x], [y, at], color=colour, linewidth=0.7, alpha=0.6)
        ax.text(x + 0.05, at, name, color=colour, va="center", fontweight="bold")
