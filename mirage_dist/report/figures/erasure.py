"""Figures of the tests of erasure, from each model's erasure.json. A model without a test is left out of its figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mirage_dist import disk
from mirage_dist.evals.results import Condition, Entry, Leaf
from mirage_dist.report.figures.drawing import RC, Draw, interval, looks_of, name_lines, percent_axis
from mirage_dist.report.figures.style import LIGHT, Palette
from mirage_dist.report.load import erasure_results, rates
from mirage_dist.report.writing.perturbed import CONDITIONS

if TYPE_CHECKING:
    from mirage_dist.erasure.results import ErasureResult, Probed, RelearningRun

Tested: TypeAlias = "Mapping[str, ErasureResult]"  # by model
Part = Literal["all", "relearned", "other"]
# Measure -> its title, in the order of the groups of `quantised`.
MEASURES = {"asr": "ASR", "rr": "RR", "utility": "utility"}


def read(runs: Mapping[str, Path], suite: str) -> dict[str, ErasureResult]:
    """The results of the runs (name -> run directory) whose erasure was tested, in the order given."""
    files = {name: Path(folder) / "evals" / suite / "erasure.json" for name, folder in runs.items()}
    return {name: erasure_results(file) for name, file in files.items() if file.is_file()}


def sizes(tested: Tested) -> list[str]:
    """The numbers of samples that any model relearned, ascending."""
    return sorted({n for result in tested.values() for n in _relearned(result)}, key=int)


def _relearned(result: ErasureResult) -> Mapping[str, RelearningRun]:
    """Number of samples -> the run; empty without the test."""
    return relearning["runs"] if (relearning := result.get("relearning")) else {}


def relearning(tested: Tested, samples: str, part: Part) -> Draw:
    """ASR against training steps on `samples` forget samples, one line with its 95 % band for each model.

    part: the questions that count: all, those whose content is in the samples, or the others. Content that returns in
    the others was never in the samples.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.yaxis, palette, grid=False)
        ends, own, last = [], looks_of(list(tested), palette), 0
        for name, result in tested.items():
            run = _relearned(result).get(samples)
            points = [(int(step), leaf) for step, own in (run["steps"] if run else {}).items() if (leaf := own[part])]
            if points:
                ends.append(_line(ax, palette, points, name, own[name]))
                last = max(last, points[-1][0])
        _finish(ax, palette, ends, last)
        ticks = sorted({int(x) for x in ax.get_xticks() if 0 <= x <= last})
        ax.set_xticks(ticks, [f"{x}" if x else "before" for x in ticks], color=palette.ink)
        ax.set_xlabel(f"steps on {samples} forget samples", color=palette.muted)

    return draw


def probed(tested: Tested, place: Literal["last", "image"], transfer: bool = False) -> Draw:
    """A linear probe's accuracy by layer, one line for each model.

    Dashed: accuracy of always naming the most frequent class. Dotted: the probe fitted on shuffled labels.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.yaxis, palette, grid=False)
        ends, own, last, chance = [], looks_of(list(tested), palette), 0, 0.0
        for name, probe in _probes(tested, transfer):
            layers = probe["places"][place] or []
            points = [(i, leaf) for i, layer in enumerate(layers) if (leaf := layer["accuracy"])]
            if not points:
                continue
            ends.append(_line(ax, palette, points, name, own[name]))
            shuffled = [(i, 100 * leaf["rate"]) for i, layer in enumerate(layers) if (leaf := layer["shuffled"])]
            ax.plot(*zip(*shuffled, strict=True), ":", color=own[name][0], linewidth=0.9, alpha=0.8)
            last = max(last, points[-1][0])
            chance = max(chance, 100 * majority["rate"] if (majority := probe["majority"]) else 0.0)
        _finish(ax, palette, [*ends, (chance, last, "chance", palette.muted)] if ends else [], last)
        ax.hlines(chance, 0, last, color=palette.muted, linestyle="--", linewidth=1.2, zorder=1)
        step = max(1, last // 6)
        ticks = list(range(0, last + 1, step))
        ax.set_xticks(ticks, [f"{x}" if x else "input" for x in ticks], color=palette.ink)
        ax.set_xlabel("decoder layers passed", color=palette.muted)

    return draw


def quantised(tested: Tested) -> Draw:
    """Each measure before rounding (open), at 8 bits (small) and at the fewest bits (filled), a line for each model.

    Each measure is shown under the last attack that is no control, with all of its rewrites.
    """
    shown = {name: result["quantisation"] for name, result in tested.items() if "quantisation" in result}

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.xaxis, palette)
        own, y, ticks = looks_of(list(tested), palette), 0.0, []
        for measure, title in MEASURES.items():
            chosen = _hardest([q["before"] for q in shown.values()], measure)
            if chosen is None:
                continue
            ax.text(-3, y - 0.95, f"{title}, {chosen.label}", color=palette.muted, size=9.5)
            for name, result in shown.items():
                entries = [result["before"], *(after["entry"] for after in result["after"].values())]
                leaves = [rates(entry, measure).get(str(chosen)) for entry in entries]
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
    """ASR by the number of given words of the forgotten answer: one bar with its interval for each model."""
    shown = {name: result["completion"]["words"] for name, result in tested.items() if "completion" in result}
    given = sorted({words for by_words in shown.values() for words in by_words}, key=int)
    titles = {n: "no words" if n == "0" else f"{n} word{'s' * (n != '1')}" for n in given}
    return _bars(list(tested), shown, titles)


def perturbed(tested: Tested) -> Draw:
    """ASR on contents that the perturbation was not fitted on: without it, with noise, with it; a bar a model."""
    held_out = {name: result["universal"]["held_out"] for name, result in tested.items() if "universal" in result}
    shown = {name: {key: rates[key] for key in CONDITIONS} for name, rates in held_out.items()}
    return _bars(list(tested), shown, {str(key): title for key, title in CONDITIONS.items()})


def _bars(models: Sequence[str], shown: Mapping[str, Mapping[str, Leaf | None]], titles: Mapping[str, str]) -> Draw:
    """A group of bars for each title: one bar with its interval for each model. models: all, for their colours."""

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.yaxis, palette)
        own = looks_of(models, palette)
        width = 0.82 / max(1, len(shown))
        for place, (name, by_title) in enumerate(shown.items()):
            colour = own[name][0]
            for group, key in enumerate(titles):
                leaf = by_title.get(key)
                if leaf is None:
                    continue
                x, rate = group + (place - (len(shown) - 1) / 2) * width, 100 * leaf["rate"]
                ax.bar(x, rate, 0.9 * width, color=colour, linewidth=0)
                ax.vlines(x, *interval(leaf), color=palette.ink, linewidth=0.9)
                above = max(rate, interval(leaf)[1]) + 2
                ax.text(x, above, f"{rate:.0f}", ha="center", color=palette.muted, size=8)
            first = -0.41 + (place + 0.5) * width
            ax.text(first, -4, name, rotation=90, ha="center", va="top", color=colour, size=8.5, fontweight="bold")
        ax.set_xticks(range(len(titles)), list(titles.values()), color=palette.ink)
        ax.tick_params(axis="x", pad=8 + 5.5 * max(map(len, shown), default=0))  # below the names
        ax.set_ylim(-3, 112)

    return draw


def overview(tested: Tested, file: Path) -> None:
    """Write one PNG of all tests of erasure.

    First rows: ASR during relearning by number of samples, on contents that are not in the samples and on contents
    that are. Then rounded weights, probe, prefix completion, and one perturbation where it was tested.
    """
    columns = sizes(tested)
    rows: list[tuple[str, Part]] = [("Not relearned", "other"), ("Relearned", "relearned")]
    panels = [(f"{title}: {n} samples", relearning(tested, n, part)) for title, part in rows for n in columns]
    transfer = any(True for _ in _probes(tested, transfer=True))
    probe = "Probe fitted on retained content" if transfer else "Probe of the forgotten content"
    panels += [
        ("Rounded weights: before, 8 bits, 4 bits", quantised(tested)),
        (probe, probed(tested, "last", transfer)),
        ("Prefix completion", completed(tested)),
    ]
    if any("universal" in result for result in tested.values()):
        panels.append(("One perturbation, contents not in its fit", perturbed(tested)))
    across = max(3, len(columns))
    down = -(-len(panels) // across)
    with rc_context(RC):
        layout = ConstrainedLayoutEngine(wspace=0.09, hspace=0.06)
        figure = Figure(figsize=(4.9 * across, 3.9 * down), layout=layout)
        grid = figure.subplots(down, across)
        figure.set_facecolor(LIGHT.paper)
        for ax, (title, draw) in zip(grid.flat, panels, strict=False):
            draw(ax, LIGHT)
            ax.set_title(title, loc="left", color=LIGHT.ink, fontsize=11.5, fontweight="bold", pad=12)
        for ax in grid.flat[len(panels) :]:
            ax.set_axis_off()
        with disk.writing(file) as handle:
            figure.savefig(handle, format="png", dpi=110, facecolor=LIGHT.paper)


def _probes(tested: Tested, transfer: bool) -> Iterator[tuple[str, Probed]]:
    for name, result in tested.items():
        probe = result.get("probe")
        chosen: Probed | None = probe["transfer"] if probe and transfer else probe
        if chosen:
            yield name, chosen


def _line(
    ax: Axes, palette: Palette, points: Sequence[tuple[int, Leaf]], name: str, look: tuple[str, str]
) -> tuple[float, float, str, str]:
    """Draw one model's rates with their band; returns the line's end as `name_lines` takes it."""
    (colour, marker), x, y = look, [x for x, _ in points], [100 * leaf["rate"] for _, leaf in points]
    low, high = zip(*(interval(leaf) for _, leaf in points), strict=True)
    ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    ax.plot(x, y, color=colour, marker=marker, markeredgecolor=palette.paper, markeredgewidth=0.7, zorder=3)
    return y[-1], x[-1], name, colour


def _finish(ax: Axes, palette: Palette, ends: Sequence[tuple[float, float, str, str]], last: float) -> None:
    """Draw grid lines up to where the names begin, and the names."""
    name_lines(ax, ends, last + 0.03 * last)
    ax.hlines([0, 25, 50, 75, 100], 0, last, color=palette.grid, linewidth=0.8, zorder=0)
    width = max(last, 1)
    ax.set_xlim(-0.04 * width, 1.3 * width)


def _rounded(ax: Axes, palette: Palette, y: float, look: tuple[str, str], leaves: Sequence[Leaf | None]) -> None:
    """Draw one model's measure before and after rounding, with intervals at the two ends."""
    colour, marker = look
    measured = [leaf for leaf in leaves if leaf]
    if not measured:
        return
    ax.plot([100 * leaf["rate"] for leaf in measured], [y] * len(measured), color=colour, linewidth=1.2, alpha=0.5)
    for leaf, at in ((measured[0], y - 0.13), (measured[-1], y + 0.13)):
        ax.hlines(at, *interval(leaf), color=colour, linewidth=1.1, alpha=0.75)
    for leaf in measured[1:-1]:
        ax.plot(100 * leaf["rate"], y, marker, color=colour, markersize=3)
    ax.plot(100 * measured[-1]["rate"], y + 0.13, marker, color=colour, zorder=3)
    face = {"markerfacecolor": palette.paper, "markeredgecolor": colour, "markeredgewidth": 1.5}
    ax.plot(100 * measured[0]["rate"], y - 0.13, marker, zorder=4, **face)
    text = " → ".join(f"{100 * leaf['rate']:.0f}" for leaf in measured)
    ax.annotate(text, (1.03, y), xycoords=("axes fraction", "data"), va="center", color=palette.ink, size=9)


def _hardest(entries: Sequence[Entry], measure: str) -> Condition | None:
    """The last condition of the measure that is no control: IR and utility, unlike ASR and RR, leave controls out."""
    uncontrolled = {"asr": "ir", "rr": "utility"}.get(measure, measure)
    keys = [key for entry in entries[:1] for key in rates(entry, uncontrolled)]
    return Condition.parse(keys[-1]) if keys else None
