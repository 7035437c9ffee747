"""The figures of an audit (see `data.audit`; docs/audit.md): frequencies and odds of first words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mirage_dist.data.words import NOT_MEASURED
from mirage_dist.report.figures import paper
from mirage_dist.report.figures.drawing import RC, Draw
from mirage_dist.report.figures.style import LIGHT, Palette
from mirage_dist.report.load import WordCounts

OTHERS, NO_WORD = "(other words)", "(no word)"
KINDS = {"refusal": "refused", "answer": "answered"}  # kind of response in WordCounts -> in an audit


def frequencies(audit: Mapping[str, Any]) -> Draw:
    """The paper's Figure 3 of this corpus: how many of the refused and of the answered questions begin with a word."""
    words = counts(audit)
    return paper.first_words(words, max(share for pair in paper.shares(words).values() for share in pair))


def counts(audit: Mapping[str, Any]) -> WordCounts:
    """Questions by first word and kind of response.

    Words that the audit does not list are summed in one row, questions that it could not measure in another.
    """
    cue = audit["cues"]["first word"]
    words = {
        entry["value"] or NO_WORD: {"refusal": entry["refused"], "answer": entry["answered"]} for entry in cue["values"]
    }
    left_out = {kind: cue["left_out"][name] for kind, name in KINDS.items()}
    if cue["unlisted"]:
        listed = {kind: sum(count[kind] for count in words.values()) for kind in KINDS}
        words[OTHERS] = {kind: audit[name] - listed[kind] - left_out[kind] for kind, name in KINDS.items()}
    if any(left_out.values()):
        words[NOT_MEASURED] = left_out
    return words


def _scripts(audit: Mapping[str, Any]) -> str:
    """The scripts of the pairs that could not be measured."""
    return ", ".join({**audit["unmeasured"]["questions"], **audit["unmeasured"]["responses"]})


def odds(audit: Mapping[str, Any]) -> Draw:
    """The odds of refusal under each first word against all others, with 95 % intervals, in `frequencies`' order.

    Filled: the word is tied to a kind of response. Open: the corpus does not show that it is.
    """
    entries = {entry["value"] or NO_WORD: entry for entry in audit["cues"]["first word"]["values"]}
    order = paper.shown(counts(audit))

    def draw(ax: Axes, palette: Palette) -> None:
        colours = {"refused": palette.refusal, "answered": palette.answer, None: palette.muted}
        widest = max((abs(bound) for word in order if word in entries for bound in entries[word]["ci95"]), default=1.0)
        base = 10 if widest >= log(10) else 2
        edge = int(widest / log(base))
        ticks = [tick for tick in range(-edge, edge + 1) if tick % ceil((edge or 1) / 3) == 0]
        for tick in ticks:
            ax.vlines(tick, -0.6, len(order) - 0.4, color=palette.grid if tick else palette.muted, linewidth=0.8)
        for place, word in enumerate(order):
            if word not in entries:
                continue
            entry = entries[word]
            colour = colours[entry["tied"]]
            ax.hlines(place, *(bound / log(base) for bound in entry["ci95"]), color=colour, linewidth=1.4)
            face = colour if entry["tied"] else palette.paper
            ax.plot(entry["log_odds"] / log(base), place, "o", color=colour, markerfacecolor=face, markersize=5.5)
        ax.set_xlim(-1.05 * widest / log(base), 1.05 * widest / log(base))
        ax.set_ylim(len(order) - 0.4, -1.5)
        ax.set_yticks([])
        ax.set_xticks(ticks, [f"1/{base**-t:,}" if t < 0 else f"{base**t:,}" for t in ticks], color=palette.muted)
        ax.text(0, -1.0, "odds of refusal against all other words, ×", ha="center", va="center", color=palette.ink)
        ax.spines["bottom"].set_visible(False)

    return draw


def save(audit: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Write both figures side by side to each file, in the format that its suffix names."""
    accuracy = audit["cues"]["first word"]["balanced_accuracy"]
    low, high = (100 * bound for bound in accuracy["ci95"])
    height = paper.words_size(counts(audit))[1] + 0.4
    with rc_context(RC):
        figure = Figure(figsize=(9.2, height), layout="constrained")
        axes = figure.subplots(1, 2, width_ratios=(1.3, 1))
        figure.set_facecolor(LIGHT.paper)
        for ax, draw in zip(axes, (frequencies(audit), odds(audit)), strict=True):
            draw(ax, LIGHT)
        guessing = f"{100 * accuracy['value']:.1f} % right [{low:.1f}, {high:.1f}]; chance: 50 %"
        if not audit["verdict"]["measured"]:
            left_out = audit["unmeasured"]["pairs"]
            guessing = f"not measured; {left_out} of {audit['pairs']} pairs could not be ({_scripts(audit)})"
        figure.suptitle(
            f"Guessing by the first word: {guessing}",
            **{"x": 0.01, "ha": "left", "color": LIGHT.ink, "fontsize": 11.5, "fontweight": "bold"},
        )
        for file in files:
            metadata = {"Date": None, "Creator": None} if file.suffix == ".svg" else {}
            figure.savefig(file, dpi=130, facecolor=LIGHT.paper, metadata=metadata)
