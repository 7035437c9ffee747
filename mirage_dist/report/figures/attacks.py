"""Every attack of a suite on every model: which attack breaks which guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from mirage_dist.evals.results import Condition, Leaf
from mirage_dist.report.figures.drawing import Draw, interval, looks_of
from mirage_dist.report.figures.style import Palette

SPREAD = 0.66  # fraction of a row's height over which its models are spread
ROW_INCHES, HEAD_INCHES = 0.46, 0.6
IN_A_LINE, LINE_INCHES = 4, 0.22  # of the legend
Rates = Mapping[str, Mapping[str, Leaf | None]]  # model -> condition -> rate


def conditions(rates: Rates) -> list[Condition]:
    """The clean questions and, of each attack, the largest K, in the order of the suite."""
    last: dict[str, Condition] = {}
    for own in rates.values():
        for condition in map(Condition.parse, own):
            if condition.attack not in last or condition.shots > last[condition.attack].shots:
                last[condition.attack] = condition
    return list(last.values())


def size(rates: Rates, width: float = 4.9) -> tuple[float, float]:
    """Width and height in inches that `by_attack` needs."""
    legend = LINE_INCHES * -(-len(rates) // IN_A_LINE)
    return width, HEAD_INCHES + legend + ROW_INCHES * len(conditions(rates))


def by_attack(rates: Rates, controls: Sequence[str] = (), titles: Mapping[str, str] | None = None) -> Draw:
    """One row for each condition: a marker for each model at its rate in percent, with its 95 % interval.

    controls: attacks without a trigger word; their markers are open. titles: attack -> label of its row.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        rows, own = conditions(rates), looks_of(list(rates), palette)
        step = SPREAD / max(1, len(rates) - 1)
        for number, (model, by_condition) in enumerate(rates.items()):
            colour, marker = own[model]
            for row, condition in enumerate(rows):
                if (leaf := by_condition.get(str(condition))) is None:
                    continue
                at = row + number * step - SPREAD / 2
                face = palette.paper if condition.attack in controls else colour
                ax.hlines(at, *interval(leaf), color=colour, linewidth=1.1, alpha=0.75)
                ax.plot(100 * leaf["rate"], at, marker, color=face, markeredgecolor=colour, markersize=4.5, zorder=3)
            ax.plot([], [], marker, color=colour, label=model)
        names = titles or {}
        labels = [names.get(row.attack, row.attack) + (f", K = {row.shots}" if row.shots > 1 else "") for row in rows]
        ax.set_yticks(range(len(rows)), labels, color=palette.ink)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.hlines([row + 0.5 for row in range(len(rows) - 1)], 0, 100, color=palette.grid, linewidth=0.8, zorder=0)
        ax.set_xlim(-2, 102)
        ax.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"], color=palette.muted)
        ax.spines["bottom"].set_visible(False)
        legend = ax.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=IN_A_LINE, frameon=False, handletextpad=0.1, columnspacing=1
        )
        for text in legend.get_texts():
            text.set_color(palette.ink)

    return draw
