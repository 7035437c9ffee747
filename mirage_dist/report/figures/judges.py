"""The same answers by every judge: one marker for each judge of each model."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from mirage_dist.report.figures.drawing import SIZE, Draw, interval, looks, percent_axis
from mirage_dist.report.figures.style import Palette
from mirage_dist.report.judges import Row
from mirage_dist.report.load import Run

ROW_INCHES, HEAD_INCHES = 0.3, 0.55
GAP = 0.75  # of a row, before each model
BELOW = 0.24  # of a row, from a rate to the corrected one


def by_judge(runs: Sequence[Run], row: Row) -> Draw:
    """A filled marker at each judge's rate, and an open one at the rate corrected for the judge's errors."""

    def draw(ax: Axes, palette: Palette) -> None:
        place, ticks = 0.0, {}
        for run in runs:
            colour, marker = looks(runs, palette)[run.name]
            judged = row.by_run.get(run.name, [])
            if not judged:
                continue
            place += GAP
            ax.text(0, place, run.name, color=colour, fontweight="bold", va="center")
            for own in judged:
                place += 1
                ticks[place] = own.judge
                ax.hlines(place, *interval(own.leaf), color=colour, linewidth=1.4, alpha=0.8)
                ax.plot(100 * own.leaf["rate"], place, marker, color=colour, markersize=5.5, zorder=3)
                if own.corrected and own.corrected["rate"] is not None and own.corrected["ci95"] is not None:
                    at, (low, high) = place + BELOW, own.corrected["ci95"]
                    ax.hlines(at, 100 * low, 100 * high, color=colour, linewidth=1, linestyle=":", alpha=0.9)
                    ax.plot(
                        100 * own.corrected["rate"], at, marker, color=palette.paper, markeredgecolor=colour,
                        markersize=5, zorder=3,
                    )  # fmt: skip
            place += 0.25
        percent_axis(ax.xaxis, palette)
        ax.set_yticks(list(ticks), list(ticks.values()), color=palette.ink)
        ax.set_ylim(place + 0.5, 0.2)

    return draw


def size(runs: Sequence[Run], row: Row) -> tuple[float, float]:
    """Width and height in inches that `by_judge` needs."""
    lines = sum(len(row.by_run.get(run.name, [])) + GAP + 0.25 for run in runs if row.by_run.get(run.name))
    return SIZE[0], HEAD_INCHES + ROW_INCHES * lines
