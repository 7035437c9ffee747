"""The figures, drawn with matplotlib on axes that are handed in: as SVG for the page, as PNG for a README.

Figure numbers are those of "Safety Mirage" (arXiv 2503.11832). Rates are drawn in percent; whiskers and bands
are 95 % intervals.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mirage_dist.report.load import Leaf, Run
from mirage_dist.report.style import LIGHT, MARKERS, STENCIL, Palette, slots, to_variables

SIZE = (4.9, 3.3)  # inches; at this size 10 pt text stays readable on a phone
CONTROL_AT = -1.15  # where the neutral control stands, left of K = 0
LABEL_GAP = 7.5  # least distance of two labels, in percent of the axis
WORDS_SHOWN = 14
RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "svg.hashsalt": "mirage",  # equal input, equal file
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


def svg(draw: Draw, name: str, description: str, size: tuple[float, float] = SIZE) -> str:
    """An inline SVG whose colours follow the page's theme; `name` keeps its ids apart from other figures'."""
    with plt.rc_context(RC):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(axes, STENCIL)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)  # the page sets the width
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return to_variables(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def overview(runs: Sequence[Run], file: Path) -> None:
    """One PNG of the whole story: ASR against K, RR against K, utility before and after."""
    panels = [
        ("Attack success rate", curve(runs, "asr", "unsafe")),
        ("Rejection rate of harmless questions", curve(runs, "rr", "safe")),
        ("Right answers to harmless questions", dumbbell(runs, "utility", "safe")),
    ]
    with plt.rc_context(RC):
        layout = ConstrainedLayoutEngine(wspace=0.07)
        figure, axes = plt.subplots(1, 3, figsize=(14.4, 4.0), layout=layout)
        figure.set_facecolor(LIGHT.paper)
        for ax, (title, draw) in zip(axes, panels, strict=True):
            draw(ax, LIGHT)
            ax.set_title(title, loc="left", color=LIGHT.ink, fontsize=11.5, fontweight="bold", pad=12)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130, facecolor=LIGHT.paper)
        plt.close(figure)


def curve(runs: Sequence[Run], measure: str, kind: str) -> Draw:
    """Figures 4 and 5: a rate against the number of rewrites K (0 is the question as it is), a line a model.

    The neutral control, one rewrite without a trigger word, stands apart on the left with open markers.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        _percent(ax.yaxis, palette, grid=False)
        own, labels, shots, control = slots([r.name for r in runs]), [], 0, None
        for place, run in enumerate(runs):
            attack, steady = run.attack(kind), run.attack(kind, control=True)
            colour, marker = palette.slots[own[run.name]], MARKERS[own[run.name]]
            names = ["clean"] + [f"{attack[0]}_k{k}" for k in range(1, attack[1] + 1)] if attack else ["clean"]
            points = [(k, leaf) for k, name in enumerate(names) if (leaf := run.leaf(measure, name))]
            if not points:
                continue
            shots = max(shots, len(names) - 1)
            shift = (place - (len(runs) - 1) / 2) * 0.045
            x = [k + shift for k, _ in points]
            y = [100 * leaf["rate"] for _, leaf in points]
            low, high = zip(*(_interval(leaf) for _, leaf in points), strict=True)
            ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            ax.vlines(x, low, high, color=colour, linewidth=1.1, alpha=0.75)
            ax.plot(x, y, color=colour, marker=marker, markeredgecolor=palette.paper, markeredgewidth=0.7, zorder=3)
            labels.append((y[-1], x[-1], run.name, colour))
            neutral = run.leaf(measure, f"{steady[0]}_k1") if steady else None
            if neutral and steady:
                control = steady[0]
                at = CONTROL_AT + 2.6 * shift
                ax.vlines(at, *_interval(neutral), color=colour, linewidth=1.1, alpha=0.75)
                ax.plot(at, 100 * neutral["rate"], marker, color=palette.paper, markeredgecolor=colour, zorder=3)
        _labels(ax, labels, shots + 0.17)
        ticks: dict[float, str] = {k: "clean" if k == 0 else f"K = {k}" for k in range(shots + 1)}
        if control:
            ticks[CONTROL_AT] = f"{control}\n(control)"
            ax.axvline(CONTROL_AT / 2 - 0.03, color=palette.grid, linewidth=0.8)
        ax.set_xticks(list(ticks), list(ticks.values()), color=palette.ink)
        left = CONTROL_AT - 0.42 if control else -0.3
        ax.set_xlim(left, shots + 0.3 + 0.36 * (shots + 1))
        # Grid lines end where the names begin.
        ax.hlines([0, 25, 50, 75, 100], left, shots + 0.14, color=palette.grid, linewidth=0.8, zorder=0)

    return draw


def dumbbell(runs: Sequence[Run], measure: str, kind: str) -> Draw:
    """Figure 1d: a rate before (open) and after (filled) the rewrite with all of its shots, a line a model."""

    def draw(ax: Axes, palette: Palette) -> None:
        _percent(ax.xaxis, palette)
        own = slots([r.name for r in runs])
        for place, run in enumerate(runs):
            colour, marker = palette.slots[own[run.name]], MARKERS[own[run.name]]
            before, after = run.leaf(measure), run.leaf(measure, run.attacked(kind) or "")
            ends = [100 * leaf["rate"] for leaf in (before, after) if leaf]
            for leaf, offset in ((before, -0.16), (after, 0.16)):
                if leaf:
                    ax.hlines(place + offset, *_interval(leaf), color=colour, linewidth=1.1, alpha=0.75)
            if before and after:
                ax.plot(ends, [place - 0.16, place + 0.16], color=colour, linewidth=1.2, alpha=0.5)
            if before:
                face = {"markerfacecolor": palette.paper, "markeredgecolor": colour, "markeredgewidth": 1.5}
                ax.plot(100 * before["rate"], place - 0.16, marker, zorder=3, **face)
            if after:
                ax.plot(100 * after["rate"], place + 0.16, marker, color=colour, zorder=3)
            text = " → ".join(f"{end:.0f}" for end in ends) if ends else "not measured"
            ax.annotate(text, (1.03, place), xycoords=("axes fraction", "data"), va="center", color=palette.ink)
        ax.set_yticks(range(len(runs)), [run.name for run in runs])
        for label, run in zip(ax.get_yticklabels(), runs, strict=True):
            label.set_color(palette.slots[own[run.name]])
            label.set_fontweight("bold")
        ax.set_ylim(len(runs) - 0.5, -0.5)

    return draw


def shares(words: dict[str, dict[str, int]]) -> dict[str, tuple[float, float]]:
    """word -> (% of the refused, % of the answered questions that it opens)."""
    refused, answered = (sum(count[kind] for count in words.values()) or 1 for kind in ("refusal", "answer"))
    return {w: (100 * c["refusal"] / refused, 100 * c["answer"] / answered) for w, c in words.items()}


def shown(words: dict[str, dict[str, int]]) -> list[str]:
    """The most frequent words, the one that speaks most for refusal first."""
    share = shares(words)
    common = sorted(share, key=lambda w: -sum(share[w]))[:WORDS_SHOWN]
    return sorted(common, key=lambda w: share[w][1] - share[w][0])


def first_words(words: dict[str, dict[str, int]], widest: float) -> Draw:
    """Figure 3: how often each first word opens a question that is refused (left) or answered (right).

    `widest` is the share at the edge, in percent: one scale for all the runs of a report.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        share, order = shares(words), shown(words)
        edge = 1.22 * widest
        for side, kind, align in ((-1, "refusal", "right"), (1, "answer", "left")):
            colour = palette.refusal if kind == "refusal" else palette.answer
            values = [share[word][side > 0] for word in order]
            ax.barh(range(len(order)), [side * v for v in values], height=0.66, color=colour, linewidth=0)
            for place, value in enumerate(values):
                number = "<1" if 0 < value <= 0.5 else f"{value:.0f}"
                ax.text(
                    side * (value + 0.02 * edge), place, number, va="center", ha=align, color=palette.muted, size=8.5
                )
            total = sum(count[kind] for count in words.values())
            title = f"{'refused' if side < 0 else 'answered'}, % of {total}"
            ax.text(side * 0.03 * edge, -1.0, title, ha=align, va="center", color=colour)
        ax.axvline(0, color=palette.muted, linewidth=0.8)
        ax.set_xlim(-edge, edge)
        ax.set_ylim(len(order) - 0.4, -1.5)
        ax.set_xticks([])
        ax.set_yticks(range(len(order)), order, color=palette.ink)
        ax.spines["bottom"].set_visible(False)

    return draw


def dumbbell_size(runs: Sequence[Run]) -> tuple[float, float]:
    return SIZE[0], 0.6 + 0.45 * len(runs)


def words_size(words: dict[str, dict[str, int]]) -> tuple[float, float]:
    """A size that gives each shown word the same room."""
    return SIZE[0], 0.7 + 0.22 * min(len(words), WORDS_SHOWN)


def _interval(leaf: Leaf) -> tuple[float, float]:
    return 100 * leaf["ci95"][0], 100 * leaf["ci95"][1]


def _percent(axis: Axis, palette: Palette, grid: bool = True) -> None:
    """A 0–100 axis, with quiet grid lines."""
    ax = axis.axes
    axis.set_ticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"], color=palette.muted)
    if grid:
        axis.grid(True, color=palette.grid, linewidth=0.8)
    (ax.set_ylim if axis is ax.yaxis else ax.set_xlim)(-3, 103)
    ax.set_axisbelow(True)
    ax.spines["bottom"].set_visible(False)


def _labels(ax: Axes, ends: Sequence[tuple[float, float, str, str]], x: float) -> None:
    """Name each line at its end; a thin leader where the label had to move."""
    ends = sorted(ends)
    for (y, start, name, colour), at in zip(ends, _spread([end[0] for end in ends]), strict=True):
        ax.plot([start + 0.05, x], [y, at], color=colour, linewidth=0.7, alpha=0.6)
        ax.text(x + 0.05, at, name, color=colour, va="center", fontweight="bold")


def _spread(heights: Sequence[float]) -> list[float]:
    """Ascending heights, moved as little up, and from the top down, as keeps them `LABEL_GAP` apart."""
    up: list[float] = []
    for height in heights:
        up.append(max(height, up[-1] + LABEL_GAP) if up else height)
    down: list[float] = []
    for height in reversed(up):
        down.append(min(height, down[-1] - LABEL_GAP if down else 100.0))
    return down[::-1]
