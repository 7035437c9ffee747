"""Every attack of a suite beside every model: which of them opens whose guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from mirage_dist.report.drawing import Draw, interval, looks_of
from mirage_dist.report.load import Leaf, parted
from mirage_dist.report.style import Palette

SPREAD = 0.66  # of a row's height, over which its models stand one below the other
ROW_INCHES, HEAD_INCHES = 0.46, 0.6
IN_A_LINE, LINE_INCHES = 4, 0.22  # of the key
Rates = Mapping[str, Mapping[str, Leaf | None]]  # model -> condition (clean, ATTACK_kK) -> rate


def conditions(rates: Rates) -> list[str]:
    """The clean questions, and of each attack the largest K, in the order of the suite."""
    last: dict[str, str] = {}
    for told in rates.values():
        for name in told:
            attack, shots = parted(name)
            if attack not in last or shots > parted(last[attack])[1]:
                last[attack] = name
    return list(last.values())


def size(rates: Rates, width: float = 4.9) -> tuple[float, float]:
    """Inches that `beside` needs."""
    key = LINE_INCHES * -(-len(rates) // IN_A_LINE)
    return width, HEAD_INCHES + key + ROW_INCHES * len(conditions(rates))


def beside(rates: Rates, controls: Sequence[str] = (), titles: Mapping[str, str] | None = None) -> Draw:
    """A row a condition, a marker a model at its rate in percent, whiskers the 95 % interval.

    controls: attacks without a trigger word; their markers are open. titles: an attack -> what the row is called.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        rows, own = conditions(rates), looks_of(list(rates), palette)
        step = SPREAD / max(1, len(rates) - 1)
        for number, (model, told) in enumerate(rates.items()):
            colour, marker = own[model]
            for row, condition in enumerate(rows):
                if (leaf := told.get(condition)) is None:
                    continue
                at = row + number * step - SPREAD / 2
                face = palette.paper if parted(condition)[0] in controls else colour
                ax.hlines(at, *interval(leaf), color=colour, linewidth=1.1, alpha=0.75)
                ax.plot(100 * leaf["rate"], at, marker, color=face, markeredgecolor=colour, markersize=4.5, zorder=3)
            ax.plot([], [], marker, color=colour, label=model)
        names = {"clean": "as asked", **(titles or {})}
        parts = [parted(condition) for condition in rows]
        told_k = [names.get(attack, attack) + (f", K = {shots}" if shots > 1 else "") for attack, shots in parts]
        ax.set_yticks(range(len(rows)), told_k, color=palette.ink)
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
