"""The paper's figures, as SVG for the page and as PNG for a README.

Figure numbers are those of "Safety Mirage" (arXiv 2503.11832). Rates are in percent; whiskers and bands are 95 %
intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mirage_dist import disk, stats
from mirage_dist.data.words import NOT_MEASURED
from mirage_dist.evals.results import CLEAN
from mirage_dist.report.figures.drawing import RC, SIZE, Draw, interval, looks, name_lines, percent_axis
from mirage_dist.report.figures.style import LIGHT, Palette
from mirage_dist.report.load import Run, WordCounts

CONTROL_AT = -1.15  # x of the neutral control, left of K = 0
WORDS_SHOWN = 14


def overview(runs: Sequence[Run], file: Path) -> None:
    """Write one PNG of the main figures: ASR against K, RR against K, utility before and after."""
    panels = [
        ("Attack success rate", curve(runs, "asr", "unsafe")),
        ("Rejection rate on harmless questions", curve(runs, "rr", "safe")),
        ("Correct answers to harmless questions", dumbbell(runs, "utility", "safe")),
    ]
    with rc_context(RC):
        layout = ConstrainedLayoutEngine(wspace=0.07)
        figure = Figure(figsize=(14.4, 4.0), layout=layout)
        axes = figure.subplots(1, 3)
        figure.set_facecolor(LIGHT.paper)
        for ax, (title, draw) in zip(axes, panels, strict=True):
            draw(ax, LIGHT)
            ax.set_title(title, loc="left", color=LIGHT.ink, fontsize=11.5, fontweight="bold", pad=12)
        with disk.writing(file) as handle:
            figure.savefig(handle, format="png", dpi=130, facecolor=LIGHT.paper)


def curve(runs: Sequence[Run], measure: str, kind: str) -> Draw:
    """Figures 4 and 5: a rate against the number of rewrites K (0: the clean question), one line for each model.

    The neutral control, one rewrite without a trigger word, stands apart on the left with open markers.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.yaxis, palette, grid=False)
        own, labels, shots, control = looks(runs, palette), [], 0, None
        attacks = [attack for run in runs if (attack := run.attack(kind))]
        every = sorted({0, *(c.shots for attack in attacks for c in attack.conditions)})
        for place, run in enumerate(runs):
            attack, steady = run.attack(kind), run.controlled(kind)
            colour, marker = own[run.name]
            conditions = [CLEAN, *(attack.conditions if attack else [])]
            points = [(every.index(c.shots), leaf) for c in conditions if (leaf := run.leaf(measure, c))]
            if not points:
                continue
            shots = len(every) - 1
            shift = (place - (len(runs) - 1) / 2) * 0.045
            x = [k + shift for k, _ in points]
            y = [100 * leaf["rate"] for _, leaf in points]
            low, high = zip(*(interval(leaf) for _, leaf in points), strict=True)
            ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            ax.vlines(x, low, high, color=colour, linewidth=1.1, alpha=0.75)
            ax.plot(x, y, color=colour, marker=marker, markeredgecolor=palette.paper, markeredgewidth=0.7, zorder=3)
            labels.append((y[-1], x[-1], run.name, colour))
            neutral = run.leaf(measure, steady)
            if neutral and steady:
                control = steady.attack
                at = CONTROL_AT + 2.6 * shift
                ax.vlines(at, *interval(neutral), color=colour, linewidth=1.1, alpha=0.75)
                ax.plot(at, 100 * neutral["rate"], marker, color=palette.paper, markeredgecolor=colour, zorder=3)
        name_lines(ax, labels, shots + 0.17)
        ticks: dict[float, str] = {k: "clean" if k == 0 else f"K = {every[k]}" for k in range(shots + 1)}
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
    """Figures 1a and 1b: a rate on the clean (open) and on the attacked questions (filled), one line for each model.

    Attacked: under the first attack with all of its rewrites.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.xaxis, palette)
        own = looks(runs, palette)
        for place, run in enumerate(runs):
            colour, marker = own[run.name]
            before, after = run.leaf(measure), run.leaf(measure, run.attacked(kind))
            ends = [100 * leaf["rate"] for leaf in (before, after) if leaf]
            for leaf, offset in ((before, -0.16), (after, 0.16)):
                if leaf:
                    ax.hlines(place + offset, *interval(leaf), color=colour, linewidth=1.1, alpha=0.75)
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
            label.set_color(own[run.name][0])
            label.set_fontweight("bold")
        ax.set_ylim(len(runs) - 0.5, -0.5)

    return draw


def shares(words: WordCounts) -> dict[str, tuple[float, float]]:
    """First word -> the percentages of the refused and of the answered questions that begin with it."""
    refused, answered = (sum(count[kind] for count in words.values()) or 1 for kind in ("refusal", "answer"))
    return {w: (100 * c["refusal"] / refused, 100 * c["answer"] / answered) for w, c in words.items()}


def shown(words: WordCounts) -> list[str]:
    """The most frequent words, ordered from the most to the least associated with refusal."""
    share = shares(words)
    common = sorted(share, key=lambda w: -sum(share[w]))[:WORDS_SHOWN]
    return sorted(common, key=lambda w: share[w][1] - share[w][0])


def first_words(words: WordCounts, widest: float) -> Draw:
    """Figure 3: how many of the refused (left) and of the answered questions (right) begin with each word.

    widest: the percentage at the edge, equal for all runs of a report.
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
    """Width and height in inches that `dumbbell` needs."""
    return SIZE[0], 0.6 + 0.45 * len(runs)


def words_size(words: WordCounts) -> tuple[float, float]:
    """Width and height in inches that give each shown word the same space."""
    return SIZE[0], 0.7 + 0.22 * min(len(words), WORDS_SHOWN)


def trade(runs: Sequence[Run]) -> Draw:
    """Figure 1d: rejection rate against attack success rate, from the clean questions (open) to the attacked (filled).

    Lower and further left is better. The whiskers belong to the attacked ends.
    """

    def draw(ax: Axes, palette: Palette) -> None:
        percent_axis(ax.xaxis, palette)
        percent_axis(ax.yaxis, palette)
        ends = []
        for run in runs:
            colour, marker = looks(runs, palette)[run.name]
            before = [run.leaf("rr"), run.leaf("asr")]
            after = [run.leaf("rr", run.attacked("safe")), run.leaf("asr", run.attacked("unsafe"))]
            if not (before[0] and before[1] and after[0] and after[1]):
                continue
            (x0, y0), (x1, y1) = ([100 * leaf["rate"] for leaf in end if leaf] for end in (before, after))
            ax.plot([x0, x1], [y0, y1], color=colour, linewidth=1.2, alpha=0.5)
            ax.hlines(y1, *interval(after[0]), color=colour, linewidth=1.1, alpha=0.75)
            ax.vlines(x1, *interval(after[1]), color=colour, linewidth=1.1, alpha=0.75)
            ax.plot(x0, y0, marker, color=palette.paper, markeredgecolor=colour, markeredgewidth=1.5, zorder=3)
            ax.plot(x1, y1, marker, color=colour, zorder=4)
            ends.append((y1, x1, run.name, colour))
        _name_points(ax, ends)
        ax.set_xlabel("needless refusals", color=palette.muted)
        ax.set_ylabel("attack success", color=palette.muted)

    return draw


def _name_points(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside their points, towards the middle of the figure, and stack those that would overlap."""
    taken: list[tuple[float, float]] = []
    for y, x, name, colour in sorted(ends):
        left = x > 70
        at = y + 4.5 if y < 94 else y - 4.5
        while any(abs(at - other_y) < 7 and abs(x - other_x) < 32 for other_y, other_x in taken):
            at += 1
        taken.append((at, x))
        ax.text(x + (-2 if left else 2), at, name, color=colour, va="center", ha="right" if left else "left",
                fontweight="bold")  # fmt: skip


def association(run: Run, runs: Sequence[Run]) -> Draw:
    """Figure 1c: the association of first words with refusal in the training data, and in the model's answers.

    Left: log-odds of refusal in the data (see `stats.log_odds`). Right: how often the model refuses questions that
    begin with the word, unsafe (filled) and safe (open).
    """

    def draw(ax: Axes, palette: Palette) -> None:
        ax.set_axis_off()
        odds = odds_by_word({word: n for word, n in run.first_words.items() if word != NOT_MEASURED})
        order = sorted(odds, key=lambda word: odds[word][0])[-WORDS_SHOWN:]
        left, right = ax.inset_axes((0.0, 0.0, 0.44, 1.0)), ax.inset_axes((0.54, 0.0, 0.46, 1.0))
        for place, word in enumerate(order):
            middle, low, high = odds[word]
            colour = palette.refusal if low > 0 else palette.answer if high < 0 else palette.muted
            left.hlines(place, low, high, color=colour, linewidth=1.1)
            left.plot(middle, place, "o", color=colour)
        left.axvline(0, color=palette.muted, linewidth=0.8)
        left.set_yticks(range(len(order)), order, color=palette.ink)
        left.tick_params(axis="x", colors=palette.muted)
        left.set_title("log-odds of refusal, data", loc="left", fontsize=9.5, color=palette.muted)
        colour, _ = looks(runs, palette)[run.name]
        for kind, shift, face in (("unsafe", 0.15, colour), ("safe", -0.15, palette.paper)):
            for place, word in enumerate(order):
                if counts := run.refusals_by_word.get((kind, word)):
                    low, high = (100 * bound for bound in stats.wilson(*counts))
                    right.hlines(place + shift, low, high, color=colour, linewidth=1.1, alpha=0.75)
                    right.plot(
                        100 * counts[0] / counts[1], place + shift, "o", color=face, markeredgecolor=colour, zorder=3
                    )
        percent_axis(right.xaxis, palette)
        right.set_yticks(range(len(order)), [""] * len(order))
        right.set_title("refused, model", loc="left", fontsize=9.5, color=palette.muted)
        for part in (left, right):
            part.set_ylim(-0.6, len(order) - 0.4)
            part.spines["bottom"].set_visible(False)

    return draw


def odds_by_word(words: WordCounts) -> dict[str, tuple[float, float, float]]:
    """Word -> log-odds of refusal against all other words, with the lower and upper bound of the 95 % interval."""
    refused, answered = (sum(count[kind] for count in words.values()) for kind in ("refusal", "answer"))
    odds = {}
    for word, count in words.items():
        r, a = count["refusal"], count["answer"]
        estimate, (low, high) = stats.log_odds(r, a, refused - r, answered - a)
        odds[word] = (estimate, low, high)
    return odds
