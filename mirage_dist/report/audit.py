"""The results of an audit (see `data.audit`; docs/audit.md) as a table for a terminal and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from mirage_dist import disk
from mirage_dist.report.figures import audit as figures
from mirage_dist.report.figures.audit import NO_WORD

SIGN = ("audit.json", '{\n "files": [')  # what is written, and how it begins (see `disk.files`)
FIGURES = ("audit.svg", "audit.png")
ROWS = 12  # rows of the table for each cue
WIDEST = 40  # characters of a value that the table shows
HEAD = ("", "refused", "answered", "share refused", "the rest", "odds ratio [95 %]", "q", "tied to")


def write(audit: Mapping[str, Any], out: Path) -> list[Path]:
    """Write audit.json and, unless the corpus has no cue, audit.svg and audit.png; returns the files.

    Writes all of them or none (see `disk.files`).
    """
    names = [SIGN[0], *(FIGURES if audit["cues"] else ())]
    with disk.files(out, SIGN, FIGURES) as folder:
        (folder / names[0]).write_text(json.dumps(audit, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if audit["cues"]:
            figures.save(audit, [folder / name for name in names[1:]])
    return [out / name for name in names]


def table(audit: Mapping[str, Any]) -> str:
    """The audit as text: a table for each cue, warnings, and the verdict as the last line."""
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
    warnings = [f"WARNING: {warning}" for warning in audit["warnings"]]
    return "\n".join([*lines, "", *warnings, audit["verdict"]["text"]])


def _some(words: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {
        kind: [*tied[:ROWS], *([f"and {len(tied) - ROWS} more"] if len(tied) > ROWS else [])]
        for kind, tied in words.items()
    }


def _cue(name: str, cue: Mapping[str, Any], fdr: float) -> list[str]:
    tied = [entry for entry in cue["values"] if entry["tied"]]
    accuracy = cue["balanced_accuracy"]
    low, high = (100 * bound for bound in accuracy["ci95"])
    left_out = sum(cue["left_out"].values())
    title = (
        f"{name}: balanced accuracy {100 * accuracy['value']:.1f} % [{low:.1f}, {high:.1f}], by chance 50 %; "
        f"{len(tied)} of {cue['distinct']} values tied to a kind of response (false-discovery rate {100 * fdr:.0f} %)"
        + (f"; not measured in {left_out} pairs, for which a coin is tossed" if left_out else "")
    )
    if not cue["values"]:
        return [f"{name}: not measured in any of {left_out} pairs"]
    frequent = sorted(cue["values"], key=lambda entry: -entry["refused"] - entry["answered"])
    rows = [HEAD, *(_row(entry) for entry in (tied or frequent)[:ROWS])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    more = len(tied) - ROWS
    return [title, *(f"  {line}" for line in lines), *([f"  and {more} more tied"] if more > 0 else [])]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Pad the cells to their columns' widths: words on the right, numbers on the left."""
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
