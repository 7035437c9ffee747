"""The forget–retain frontier: every setting of every method at its two measures, with intervals and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator

from mirage_dist.report.figures.drawing import Draw, looks_of, percent_axis
from mirage_dist.report.figures.style import Palette

if TYPE_CHECKING:
    from mirage_dist.report.curves.frontier import Estimate, Frontier, Setting

SIZE = (4.9, 4.4)  # inches; at this width 10 pt text stays readable on a phone
LEAST = 10.0  # percent of an axis that are shown
Point = tuple[float, float]


def frontier(own: Frontier, titles: tuple[str, str]) -> Draw:
    """Forget measure (up) against retain measure (right), in percent, one colour and marker for each method.

    titles: of the two measures.
    """
    names = list(dict.fromkeys(["base", *(row["method"] for row in own["at_level"])]))
    rings = {(row["method"], row["of_all"]) for row in own["at_level"] if row["of_all"]}

    def draw(ax: Axes, palette: Palette) -> None:
        looks = looks_of(names, palette)
        percent_axis(ax.xaxis, palette)
        percent_axis(ax.yaxis, palette)
        ax.axvline(100 * own["level"], color=palette.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        above = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
        ax.annotate("level", (100 * own["level"], 1), **above, color=palette.muted, ha="center", fontsize=9)
        for name in names[1:]:
            settings = [one for one in own["settings"] if one["method"] == name]
            colour, marker = looks[name]
            steps = sorted(_place(one) for one in settings if one["pareto"])
            ax.plot([x for x, _ in steps], [y for _, y in steps], color=colour, linewidth=1.4, alpha=0.6, zorder=2)
            for one in settings:
                _setting(ax, palette, one, (colour, marker), (name, one["setting"]) in rings)
            ax.plot([], [], marker, color=colour, label=name)
        if own["base"]:
            colour, marker = looks["base"]
            both = own["base"]["forget"], own["base"]["retain"]
            x, y = 100 * both[1]["rate"], 100 * both[0]["rate"]
            _whiskers(ax, colour, (x, y), both)
            ax.plot(x, y, marker, color=colour, markersize=7, zorder=4, linestyle="none", label="base")
        shown = [*own["settings"], *([own["base"]] if own["base"] else [])]
        _zoom(ax.yaxis, [bound for one in shown for bound in one["forget"]["ci95"]])
        _zoom(ax.xaxis, [own["level"], *(bound for one in shown for bound in one["retain"]["ci95"])])
        ax.set_ylabel(f"forget: {titles[0]}", color=palette.muted)
        ax.set_xlabel(f"retain: {titles[1]}", color=palette.muted)
        legend = ax.legend(
            loc="lower left", bbox_to_anchor=(0, 1.03), ncols=4, frameon=False, handletextpad=0.1, columnspacing=1
        )
        for text in legend.get_texts():
            text.set_color(palette.ink)

    return draw


def _zoom(axis: Axis, shares: Sequence[float]) -> None:
    """Show the part of an axis in percent in which there is something, at least a tenth of it."""
    low, high = (100 * bound for bound in (min(shares), max(shares)))
    if high - low < LEAST:
        low, high = max(0.0, high - LEAST), max(high, LEAST)
    margin = 0.04 * (high - low)
    ticks = [tick for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if tick - low + margin >= -0.1]
    ticks = [tick for tick in ticks if tick <= min(100.1, high + margin)]
    axis.set_ticks(ticks, [*(f"{tick:g}" for tick in ticks[:-1]), f"{ticks[-1]:g} %"])
    (axis.axes.set_ylim if axis is axis.axes.yaxis else axis.axes.set_xlim)(low - margin, high + margin)


def _place(one: Setting) -> Point:
    return 100 * one["retain"]["rate"], 100 * one["forget"]["rate"]


def _whiskers(ax: Axes, colour: str, at: Point, both: tuple[Estimate, Estimate]) -> None:
    low, high = (100 * bound for bound in both[0]["ci95"])
    left, right = (100 * bound for bound in both[1]["ci95"])
    ax.vlines(at[0], low, high, color=colour, linewidth=0.9, alpha=0.45)
    ax.hlines(at[1], left, right, color=colour, linewidth=0.9, alpha=0.45)


def _setting(ax: Axes, palette: Palette, one: Setting, look: tuple[str, str], ring: bool) -> None:
    colour, marker = look
    x, y = _place(one)
    _whiskers(ax, colour, (x, y), (one["forget"], one["retain"]))
    if len(one["seeds"]) > 1:
        seeds = zip(one["retain"]["by_seed"], one["forget"]["by_seed"], strict=True)
        for across, up in seeds:
            ax.plot(100 * across, 100 * up, marker, color=colour, markersize=2.5, alpha=0.5, zorder=3)
    face = colour if one["pareto"] else palette.paper
    ax.plot(x, y, marker, color=face, markeredgecolor=colour, markersize=6, zorder=5)
    if ring:
        ax.plot(x, y, "o", color="none", markeredgecolor=palette.ink, markersize=12, markeredgewidth=1.1, zorder=6)
