"""Every attack of a suite on every model: which attack breaks which guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from mirage_dist.evals.results import Condition, Leaf
from mirage_dist.report.curves.budgets import Budget, budget_of
from mirage_dist.report.figures.drawing import Draw, interval, looks_of, name_lines, percent_axis
from mirage_dist.report.figures.style import Palette

SPREAD = 0.66  # fraction of a row's height over which its models are spread
ROW_INCHES, HEAD_INCHES = 0.46, 0.6
IN_A_LINE, LINE_INCHES = 4, 0.22  # of the legend
Rates = Mapping[str, Mapping[str, Leaf | None]]  # model -> condition -> rate


def budget(curves: Sequence[Budget], models: Sequence[str]) -> Draw:
    """Success against the number of answers to a question, or of the steps of a search: one line for each curve.

    curves: of one measure and one attack. models: all of the report, which decide the colours.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.yaxis, palette)
        own, labels = looks_of(models, palette), []
        spent = sorted({budget_of(point) for curve in curves for point in curve["points"]})
        of_search = any("steps" in point for curve in curves for point in curve["points"])
        for curve in curves:
            colour, marker = own[curve["model"]]
            x = [spent.index(budget_of(point)) for point in curve["points"]]
            y = [100 * point["rate"] for point in curve["points"]]
            low, high = ([100 * point["ci95"][end] for point in curve["points"]] for end in (0, 1))
            ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            ax.plot(x, y, color=colour, marker=marker, markeredgecolor=palette.paper, markeredgewidth=0.7, zorder=3)
            labels.append((y[-1], x[-1], curve["model"], colour))
        name_lines(ax, labels, len(spent) - 0.83)
        ax.set_xticks(range(len(spent)), [str(n) for n in spent], color=palette.ink)
        ax.set_xlim(-0.3, len(spent) - 0.7 + 0.36 * len(spent))
        label = "steps of the search for each question" if of_search else "answers drawn to each question"
        ax.set_xlabel(label, color=palette.muted)

    return draw


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
