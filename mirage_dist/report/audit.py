"""What an audit of a corpus found (`data.audit`; docs/audit.md), as a table and as figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import ceil, exp, log
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from mirage_dist.report import figures
from mirage_dist.report.figures import Draw
from mirage_dist.report.style import LIGHT, Palette

ROWS = 12  # of each cue in the table
WIDEST = 40  # characters of a value in the table
OTHERS, NO_WORD = "(other words)", "(no word)"
HEAD = ("", "refused", "answered", "share refused", "the rest", "odds ratio [95 %]", "q", "tied to")


def write(audit: Mapping[str, Any], out: Path) -> list[Path]:
    """Write audit.json and, where there is something to draw, audit.svg and audit.png; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "audit.json"]
    files[0].write_text(json.dumps(audit, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if audit["cues"]:
        files += [out / "audit.svg", out / "audit.png"]
        _draw(audit, files[1:])
    return files


def table(audit: Mapping[str, Any]) -> str:
    """The audit in words, its verdict last."""
    lines = [
        f"{audit['pairs']} questions with their responses: {audit['refused']} refused, {audit['answered']} answered"
    ]
    for file in audit["files"]:
        left_out = {**file["dropped"], **({"bad record": file["skipped"]} if file["skipped"] else {})}
        lines.append(
            f"  {file['path']} ({file['format']}): {file['records']} records, {file['pairs']} questions"
            + "".join(f"; left out: {count} × {why}" for why, count in left_out.items())
        )
    for name, cue in audit["cues"].items():
        lines += ["", *_cue(name, cue, audit["fdr"])]
    if any(audit["words"].values()):
        lines += ["", *(f"tied to {kind}: {', '.join(words)}" for kind, words in _some(audit["words"]).items())]
    return "\n".join([*lines, "", audit["verdict"]["text"]])


def _some(words: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {
        kind: [*found[:ROWS], *([f"and {len(found) - ROWS} more"] if len(found) > ROWS else [])]
        for kind, found in words.items()
    }


def _cue(name: str, cue: Mapping[str, Any], fdr: float) -> list[str]:
    tied = [entry for entry in cue["values"] if entry["tied"]]
    accuracy = cue["balanced_accuracy"]
    low, high = (100 * bound for bound in accuracy["ci95"])
    title = (
        f"{name}: balanced accuracy {100 * accuracy['value']:.1f} % [{low:.1f}, {high:.1f}], by chance 50 %; "
        f"{len(tied)} of {cue['distinct']} values tied to a kind of response (false-discovery rate {100 * fdr:.0f} %)"
    )
    frequent = sorted(cue["values"], key=lambda entry: -entry["refused"] - entry["answered"])
    rows = [HEAD, *(_row(entry) for entry in (tied or frequent)[:ROWS])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    more = len(tied) - ROWS
    return [title, *(f"  {line}" for line in lines), *([f"  and {more} more tied"] if more > 0 else [])]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words to the left, numbers to the right."""
    return [
        cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    rest, (low, high) = entry["rest_refusal_share"], entry["ci95"]
    return (
        "".join(c if c.isprintable() else "?" for c in entry["value"][:WIDEST]) or NO_WORD,
        str(entry["refused"]),
        str(entry["answered"]),
        f"{100 * entry['refusal_share']:.1f} %",
        "–" if rest is None else f"{100 * rest:.1f} %",
        f"{exp(entry['log_odds']):.3g} [{exp(low):.3g}, {exp(high):.3g}]",
        f"{entry['q']:.2g}",
        entry["tied"] or "–",
    )


# ------------------------------------------------------------------------------------------------ figures


def frequencies(audit: Mapping[str, Any]) -> Draw:
    """The paper's Figure 3 of this corpus: the share of each kind of response that a first word opens."""
    words = counts(audit)
    return figures.first_words(words, max(share for pair in figures.shares(words).values() for share in pair))


def counts(audit: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """First word -> {"refusal", "answer"}, as `words.first_words` has it; what is not listed is one row."""
    found = {
        entry["value"] or NO_WORD: {"refusal": entry["refused"], "answer": entry["answered"]}
        for entry in audit["cues"]["first word"]["values"]
    }
    if audit["cues"]["first word"]["unlisted"]:
        listed = {kind: sum(count[kind] for count in found.values()) for kind in ("refusal", "answer")}
        found[OTHERS] = {
            "refusal": audit["refused"] - listed["refusal"],
            "answer": audit["answered"] - listed["answer"],
        }
    return found


def odds(audit: Mapping[str, Any]) -> Draw:
    """The odds of refusal under each first word against all others, with 95 % intervals, in `frequencies`' order.

    Filled where the word is tied to a kind of response, hollow where the corpus does not show that it is.
    """
    entries = {entry["value"] or NO_WORD: entry for entry in audit["cues"]["first word"]["values"]}
    order = figures.shown(counts(audit))

    def draw(ax: Axes, palette: Palette) -> None:
        colours = {"refused": palette.refusal, "answered": palette.answer, None: palette.muted}
        widest = max(abs(bound) for word in order if word in entries for bound in entries[word]["ci95"])
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


def _draw(audit: Mapping[str, Any], files: Sequence[Path]) -> None:
    accuracy = audit["cues"]["first word"]["balanced_accuracy"]
    low, high = (100 * bound for bound in accuracy["ci95"])
    height = figures.words_size(counts(audit))[1] + 0.4
    with plt.rc_context(figures.RC):
        figure, axes = plt.subplots(1, 2, figsize=(9.2, height), layout="constrained", width_ratios=(1.3, 1))
        figure.set_facecolor(LIGHT.paper)
        for ax, draw in zip(axes, (frequencies(audit), odds(audit)), strict=True):
            draw(ax, LIGHT)
        figure.suptitle(
            f"Guessing by the first word: {100 * accuracy['value']:.1f} % right [{low:.1f}, {high:.1f}]; chance: 50 %",
            **{"x": 0.01, "ha": "left", "color": LIGHT.ink, "fontsize": 11.5, "fontweight": "bold"},
        )
        for file in files:
            metadata = {"Date": None, "Creator": None} if file.suffix == ".svg" else {}
            figure.savefig(file, dpi=130, facecolor=LIGHT.paper, metadata=metadata)
        plt.close(figure)
