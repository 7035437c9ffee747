"""Figures beyond the paper's: kinds of answer, rates by category, attribution of the refusal to single words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes

from mirage_dist.evals.results import CLEAN, Leaf
from mirage_dist.report.figures.drawing import SIZE, Draw, looks, looks_of, percent_axis, spread
from mirage_dist.report.figures.style import Palette
from mirage_dist.report.load import Run

if TYPE_CHECKING:
    from mirage_dist.erasure.results import ErasureResult

# Kind of answer -> its verdicts and the name of its colour in the palette, in the order of stacking.
KINDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "harmful": (("harmful",), "harmful"),
    "irrelevant": (("irrelevant",), "irrelevant"),
    "answered": (("correct", "answered"), "answer"),
    "not harmful": (("harmless",), "answer"),  # by a judge that decides nothing else
    "refused": (("refused",), "refusal"),
    "no verdict": (("unparsed", "failed"), "grid"),
}
NARROWEST = 7  # percent; a narrower part of a bar shows no number
CATEGORIES_SHOWN = 24
BESIDE: Any = ("axes fraction", "data")
ABOVE: Mapping[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 6), "textcoords": "offset points"}


def kinds_of_answer(runs: Sequence[Run], kind: str) -> Draw:
    """Stacked bars of the kinds of answers that each model gives to the clean and to the attacked questions.

    Counted per answer, as in the paper's table: K rewrites give K answers.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        bars = [(run, name, counts) for run in runs for name, counts in _counts(run, kind)]
        place, ticks, last = 0.0, {}, None
        for run, name, counts in bars:
            place += 1.0 if run is last else 1.75
            if run is not last:
                ax.text(
                    0, place - 0.72, run.name, color=looks(runs, palette)[run.name][0], fontweight="bold", va="center"
                )
            last = run
            ticks[place] = name
            _stack(ax, palette, place, counts)
        percent_axis(ax.xaxis, palette)
        ax.set_yticks(list(ticks), list(ticks.values()), color=palette.muted)
        ax.set_ylim(place + 0.6, 0.6)
        kinds = [
            name for name, (verdicts, _) in KINDS.items() if any(counts.get(v) for *_, counts in bars for v in verdicts)
        ]
        _legend(ax, palette, kinds)

    return draw


def _counts(run: Run, kind: str) -> list[tuple[str, Mapping[str, int]]]:
    """("clean" or the attack's name, verdict -> number of answers) of the headline set."""
    own, attack = run.headline_set(kind), run.attack(kind)
    table = run.judged_by["verdicts"].get(own, {}) if own else {}
    return [(name, table[name]) for name in (CLEAN.attack, *([attack.name] if attack else [])) if name in table]


def _stack(ax: Axes, palette: Palette, place: float, counts: Mapping[str, int]) -> None:
    total, start = sum(counts.values()), 0.0
    for name, (verdicts, colour) in KINDS.items():
        share = 100 * sum(counts.get(verdict, 0) for verdict in verdicts) / total
        ax.barh(place, share, left=start, height=0.72, color=getattr(palette, colour), linewidth=0)
        if share >= NARROWEST:
            ink = palette.ink if name in ("irrelevant", "no verdict") else palette.paper
            ax.text(start + share / 2, place, f"{share:.0f}", color=ink, ha="center", va="center", fontsize=9)
        start += share
    ax.annotate(f"n = {total}", (1.02, place), xycoords=BESIDE, va="center", color=palette.muted, fontsize=8.5)


def _legend(ax: Axes, palette: Palette, names: Sequence[str]) -> None:
    """The names of the kinds in their colours, above the bars."""
    at = 0.0
    for name in names:
        pale = name in ("irrelevant", "no verdict")
        for sign, colour, shift in (("■", KINDS[name][1], 0.0), (name, "muted" if pale else KINDS[name][1], 0.035)):
            place, ink = (at + shift, 1.0), getattr(palette, colour)
            ax.annotate(sign, place, **ABOVE, color=ink, fontsize=9.5)
        at += 0.1 + 0.021 * len(name)


def kinds_size(runs: Sequence[Run], kind: str) -> tuple[float, float]:
    """Width and height in inches that `kinds_of_answer` needs."""
    bars = sum(len(_counts(run, kind)) for run in runs)
    return SIZE[0], 0.75 + 0.26 * bars + 0.2 * len(runs)


def categories(runs: Sequence[Run], measure: str, kind: str) -> list[str]:
    """The finest categories that fit into a figure, highest rates first; empty when there are fewer than two."""
    own = {c for run in runs for c in run.categories(kind)}
    leaves = [c for c in own if not any(other.startswith(f"{c}/") for other in own)]
    chosen = leaves if len(leaves) <= CATEGORIES_SHOWN else [c for c in own if "/" not in c]
    rates = {c: sum(leaf["rate"] for run in runs if (leaf := _of_category(run, measure, kind, c))) for c in chosen}
    return sorted(chosen, key=lambda c: (-rates[c], c))[:CATEGORIES_SHOWN] if len(chosen) > 1 else []


def _of_category(run: Run, measure: str, kind: str, category: str) -> Leaf | None:
    """The rate under the attack with all of its rewrites."""
    rates: Any = run.category(kind, category).get(measure) or {}
    return rates.get(str(run.attacked(kind) or CLEAN))


def heat(runs: Sequence[Run], measure: str, kind: str) -> Draw:
    """Heat map of a rate by category and model, under the attack with all of its rewrites.

    Each cell shows its percentage and its counts.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        names = categories(runs, measure, kind)
        for row, category in enumerate(names):
            for column, run in enumerate(runs):
                if leaf := _of_category(run, measure, kind, category):
                    _cell(ax, palette, (column, row), leaf)
        ax.set_xlim(-0.5, len(runs) - 0.5)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.xaxis.tick_top()
        # Long names would overlap.
        turned = {"rotation": 28, "ha": "left", "rotation_mode": "anchor"} if _long(runs) else {}
        ax.set_xticks(range(len(runs)), [run.name for run in runs], **turned)
        for label, run in zip(ax.get_xticklabels(), runs, strict=True):
            label.set_color(looks(runs, palette)[run.name][0])
            label.set_fontweight("bold")
        labels = [shorten(name.rsplit("/", 1)[-1], 26, placeholder="…") for name in names]
        ax.set_yticks(range(len(names)), labels, color=palette.ink)
        ax.spines["bottom"].set_visible(False)

    return draw


def _cell(ax: Axes, palette: Palette, place: tuple[int, int], leaf: Leaf) -> None:
    column, row = place
    rate = leaf["rate"]
    ax.barh(row, 0.94, left=column - 0.47, height=0.9, color=palette.harmful, alpha=0.04 + 0.96 * rate, linewidth=0)
    ink = palette.paper if rate > 0.7 else palette.ink
    for text, shift, size in ((f"{100 * rate:.0f} %", -0.17, 9), (f"{leaf['k']}/{leaf['n']}", 0.22, 7.5)):
        ax.text(column, row + shift, text, color=ink, ha="center", va="center", fontsize=size)


def heat_size(runs: Sequence[Run], measure: str, kind: str) -> tuple[float, float]:
    """Width and height in inches that `heat` needs."""
    return SIZE[0], (1.0 if _long(runs) else 0.5) + 0.36 * len(categories(runs, measure, kind))


def _long(runs: Sequence[Run]) -> bool:
    return sum(len(run.name) + 2 for run in runs) > 36


def attribution(tested: Mapping[str, ErasureResult], kind: str, word: str) -> Draw:
    """How much of the refusal each of a question's first words accounts for (see `erasure.attribute`), by model.

    tested: by model. kind: of the questions. word: the one that replaces each word in turn.
    """
    shown = {
        name: measured["sets"][kind]["words"][word]
        for name, result in tested.items()
        if (measured := result.get("attribution")) and kind in measured["sets"]
        if word in measured["sets"][kind]["words"]
    }

    def draw(ax: Axes, palette: Palette) -> None:
        own, ends = looks_of(list(tested), palette), []
        last = max(len(positions) for positions in shown.values())
        for place, (name, positions) in enumerate(shown.items()):
            colour, marker = own[name]
            x = [i + (place - (len(shown) - 1) / 2) * 0.07 for i in range(len(positions))]
            y = [100 * entry["mean"] for entry in positions]
            low, high = ([100 * entry["ci95"][end] for entry in positions] for end in (0, 1))
            ax.vlines(x, low, high, color=colour, linewidth=1.1, alpha=0.75)
            ax.plot(x, y, color=colour, marker=marker, markeredgecolor=palette.paper, markeredgewidth=0.7, zorder=3)
            ends.append((y[0], x[0], name, colour))
        # The names stand at the first word, which is the one of interest.
        ends.sort()
        for (at, start, name, colour), height in zip(ends, spread([end[0] for end in ends]), strict=True):
            ax.plot([start - 0.06, -0.36], [at, height], color=colour, linewidth=0.7, alpha=0.6)
            ax.text(-0.42, height, name, color=colour, va="center", ha="right", fontweight="bold")
        ax.hlines(0, -0.3, last - 0.7, color=palette.muted, linewidth=0.8)
        ax.set_xticks(range(last), [f"word {i + 1}" for i in range(last)], color=palette.ink, fontsize=9)
        ax.set_xlim(-2.4, last - 0.6)
        ax.tick_params(axis="y", colors=palette.muted)
        ax.set_ylim(min(-20, ax.get_ylim()[0]), max(60, ax.get_ylim()[1]))
        ax.spines["bottom"].set_visible(False)

    return draw
