"""Figures of the tests of erasure, from each model's erasure.json (see `erasure.run`); one colour a model.

Every function gives a `drawing.Draw`, a function of axes and palette; a model whose recipe left a test out has no line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mirage_dist.report.drawing import RC, Draw, interval, looks_of, name_lines, percent_axis
from mirage_dist.report.load import Leaf, condition_label
from mirage_dist.report.style import LIGHT, Palette

Tested = Mapping[str, Mapping[str, Any]]  # model -> its erasure.json
Part = Literal["all", "relearned", "other"]
# Measure -> what to show of it, in the order of the dumbbell's groups.
ASKED = {"asr": "ASR", "rr": "RR", "utility": "utility"}


def read(runs: Mapping[str, Path], suite: str) -> dict[str, dict[str, Any]]:
    """The results of those runs (name -> run directory) whose erasure was tested, in the order given."""
    files = {name: Path(folder) / "evals" / suite / "erasure.json" for name, folder in runs.items()}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def sizes(tested: Tested) -> list[str]:
    """The numbers of samples that any model relearned, ascending."""
    found = {n for result in tested.values() for n in (result.get("relearning") or {"runs": {}})["runs"]}
    return sorted(found, key=int)


def relearning(tested: Tested, samples: str, part: Part) -> Draw:
    """ASR against training steps on so many forget samples, a line a model, with its 95 % band.

    part: of all questions, of those whose content the samples told, or of the others: what comes back there was never
    told again.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.yaxis, palette, grid=False)
        ends, own, last = [], looks_of(list(tested), palette), 0
        for name, result in tested.items():
            steps = (result.get("relearning") or {"runs": {}})["runs"].get(samples, {"steps": {}})["steps"]
            points = [(int(step), rates[part]) for step, rates in steps.items() if rates[part]]
            if points:
                ends.append(_line(ax, palette, points, name, own[name]))
                last = max(last, points[-1][0])
        _finish(ax, palette, ends, last)
        ticks = sorted({int(x) for x in ax.get_xticks() if 0 <= x <= last})
        ax.set_xticks(ticks, [f"{x}" if x else "before" for x in ticks], color=palette.ink)
        ax.set_xlabel(f"steps on {samples} forget samples", color=palette.muted)

    return draw


def probed(tested: Tested, place: Literal["last", "image"], transfer: bool = False) -> Draw:
    """A linear probe's accuracy layer by layer, a line a model; dashed, what naming the most frequent class gives.

    Dotted and thin, each model's probe fitted on shuffled labels.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.yaxis, palette, grid=False)
        ends, own, last, chance = [], looks_of(list(tested), palette), 0, 0.0
        for name, probe in _probes(tested, transfer):
            layers = probe["places"][place] or []
            points = [(i, layer["accuracy"]) for i, layer in enumerate(layers)]
            if not points:
                continue
            ends.append(_line(ax, palette, points, name, own[name]))
            shuffled = [100 * layer["shuffled"]["rate"] for layer in layers]
            ax.plot(range(len(layers)), shuffled, ":", color=own[name][0], linewidth=0.9, alpha=0.8)
            last, chance = max(last, len(points) - 1), max(chance, 100 * probe["majority"]["rate"])
        _finish(ax, palette, [*ends, (chance, last, "chance", palette.muted)] if ends else [], last)
        ax.hlines(chance, 0, last, color=palette.muted, linestyle="--", linewidth=1.2, zorder=1)
        step = max(1, last // 6)
        ticks = list(range(0, last + 1, step))
        ax.set_xticks(ticks, [f"{x}" if x else "input" for x in ticks], color=palette.ink)
        ax.set_xlabel("decoder layers passed", color=palette.muted)

    return draw


def quantised(tested: Tested, condition: Mapping[str, str] | None = None) -> Draw:
    """Each measure before rounding (open), at 8 bits (small) and at the fewest bits (filled), a line a model.

    condition: measure -> the condition to show; by default the last attack (no control) with all of its shots.
    """
    shown = {name: result["quantisation"] for name, result in tested.items() if result.get("quantisation")}

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.xaxis, palette)
        own, y, ticks = looks_of(list(tested), palette), 0.0, []
        for measure, title in ASKED.items():
            chosen = (condition or {}).get(measure) or _hardest([q["before"] for q in shown.values()], measure)
            if chosen is None:
                continue
            ax.text(-3, y - 0.95, f"{title}, {condition_label(chosen)}", color=palette.muted, size=9.5)
            for name, result in shown.items():
                entries = [result["before"], *(after["entry"] for after in result["after"].values())]
                leaves = [(entry[measure] or {}).get(chosen) for entry in entries]
                _rounded(ax, palette, y, own[name], leaves)
                ticks.append((y, name))
                y += 1
            y += 1.3
        ax.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
        for tick, (_, name) in zip(ax.get_yticklabels(), ticks, strict=True):
            tick.set_color(own[name][0])
            tick.set_fontweight("bold")
        ax.set_ylim(y - 1.6, -1.6)

    return draw


def completed(tested: Tested) -> Draw:
    """ASR by the number of words of the forgotten answer that are given: a bar a model, with its interval."""
    shown = {name: result["completion"]["words"] for name, result in tested.items() if result.get("completion")}

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.yaxis, palette)
        own = looks_of(list(tested), palette)
        given = sorted({words for rates in shown.values() for words in rates}, key=int)
        width = 0.82 / max(1, len(shown))
        for place, (name, rates) in enumerate(shown.items()):
            colour = own[name][0]
            for group, words in enumerate(given):
                leaf = rates.get(words)
                if leaf is None:
                    continue
                x, rate = group + (place - (len(shown) - 1) / 2) * width, 100 * leaf["rate"]
                ax.bar(x, rate, 0.9 * width, color=colour, linewidth=0)
                ax.vlines(x, *interval(leaf), color=palette.ink, linewidth=0.9)
                above = max(rate, interval(leaf)[1]) + 2
                ax.text(x, above, f"{rate:.0f}", ha="center", color=palette.muted, size=8)
            first = -0.41 + (place + 0.5) * width
            ax.text(first, -4, name, rotation=90, ha="center", va="top", color=colour, size=8.5, fontweight="bold")
        titles = ["as asked" if words == "0" else f"{words} word{'s' * (words != '1')}" for words in given]
        ax.set_xticks(range(len(given)), titles, color=palette.ink)
        ax.tick_params(axis="x", pad=34)
        ax.set_ylim(-3, 112)

    return draw


def overview(tested: Tested, file: Path) -> None:
    """One PNG: ASR while relearning, by number of samples, of what they never tell and of what they tell; below it the
    weights rounded, the probe, and the answer begun.
    """
    columns = sizes(tested)
    rows: list[tuple[str, Part]] = [("Never told again", "other"), ("Told", "relearned")]
    panels = [(f"{title}: {n} samples", relearning(tested, n, part)) for title, part in rows for n in columns]
    transfer = any(True for _ in _probes(tested, transfer=True))
    probe = "A probe fitted on what was kept" if transfer else "A probe of what was to be forgotten"
    panels += [
        ("Rounded weights: before, 8 bits, 4 bits", quantised(tested)),
        (probe, probed(tested, "last", transfer)),
        ("The answer begun, the rest told", completed(tested)),
    ]
    across = max(3, len(columns))
    down = -(-len(panels) // across)
    with plt.rc_context(RC):
        layout = ConstrainedLayoutEngine(wspace=0.09, hspace=0.06)
        figure, grid = plt.subplots(down, across, figsize=(4.9 * across, 3.9 * down), layout=layout)
        figure.set_facecolor(LIGHT.paper)
        for ax, (title, draw) in zip(grid.flat, panels, strict=False):
            draw(ax, LIGHT)
            ax.set_title(title, loc="left", color=LIGHT.ink, fontsize=11.5, fontweight="bold", pad=12)
        for ax in grid.flat[len(panels) :]:
            ax.set_axis_off()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110, facecolor=LIGHT.paper)
        plt.close(figure)


def _probes(tested: Tested, transfer: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, result in tested.items():
        probe = result.get("probe")
        if probe and (chosen := probe["transfer"] if transfer else probe):
            yield name, chosen


def _line(
    ax: Axes, palette: Palette, points: Sequence[tuple[int, Leaf]], name: str, look: tuple[str, str]
) -> tuple[float, float, str, str]:
    """One model's rates with their band; what `name_lines` wants of its end."""
    (colour, marker), x, y = look, [x for x, _ in points], [100 * leaf["rate"] for _, leaf in points]
    low, high = zip(*(interval(leaf) for _, leaf in points), strict=True)
    ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    ax.plot(x, y, color=colour, marker=marker, markeredgecolor=palette.paper, markeredgewidth=0.7, zorder=3)
    return y[-1], x[-1], name, colour


def _finish(ax: Axes, palette: Palette, ends: Sequence[tuple[float, float, str, str]], last: float) -> None:
    """Grid lines up to where the names begin, and the names."""
    name_lines(ax, ends, last + 0.03 * last)
    ax.hlines([0, 25, 50, 75, 100], 0, last, color=palette.grid, linewidth=0.8, zorder=0)
    width = max(last, 1)
    ax.set_xlim(-0.04 * width, 1.3 * width)


def _rounded(ax: Axes, palette: Palette, y: float, look: tuple[str, str], leaves: Sequence[Leaf | None]) -> None:
    """One model's measure, before and after; whiskers for the two ends."""
    colour, marker = look
    found = [leaf for leaf in leaves if leaf]
    if not found:
        return
    ax.plot([100 * leaf["rate"] for leaf in found], [y] * len(found), color=colour, linewidth=1.2, alpha=0.5)
    for leaf, at in ((found[0], y - 0.13), (found[-1], y + 0.13)):
        ax.hlines(at, *interval(leaf), color=colour, linewidth=1.1, alpha=0.75)
    for leaf in found[1:-1]:
        ax.plot(100 * leaf["rate"], y, marker, color=colour, markersize=3)
    ax.plot(100 * found[-1]["rate"], y + 0.13, marker, color=colour, zorder=3)
    face = {"markerfacecolor": palette.paper, "markeredgecolor": colour, "markeredgewidth": 1.5}
    ax.plot(100 * found[0]["rate"], y - 0.13, marker, zorder=4, **face)
    text = " → ".join(f"{100 * leaf['rate']:.0f}" for leaf in found)
    ax.annotate(text, (1.03, y), xycoords=("axes fraction", "data"), va="center", color=palette.ink, size=9)


def _hardest(entries: Sequence[Mapping[str, Any]], measure: str) -> str | None:
    """The last condition that utility knows of too, where controls are not asked; for ASR the last IR one."""
    known = {"asr": "ir", "rr": "utility"}.get(measure, measure)
    names = [name for entry in entries[:1] for name in entry.get(known) or {}]
    return names[-1] if names else None
