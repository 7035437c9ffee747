"""Colours and markers. A model has one colour everywhere, in figures, tables and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# These names have the same slot in every report; other names take the free slots in order. The hues can be told apart
# by colour-blind readers (after Okabe and Ito), and each slot has a marker shape too.
SLOTS = ("base", "sft", "sft_control", "npo", "rmu", "sft_diversified", "sft_filtered", "")
MARKERS = ("s", "o", "^", "D", "v", "P", "X", "p")


@dataclass(frozen=True)
class Palette:
    """Hexadecimal colours. ink: text; muted: secondary text; grid: hairlines; paper: background.

    refusal, answer, harmful, irrelevant: kinds of answer. slots: one colour for each of `SLOTS`.
    """

    ink: str
    muted: str
    grid: str
    paper: str
    refusal: str
    answer: str
    harmful: str
    irrelevant: str
    slots: tuple[str, ...]

    def variables(self) -> dict[str, str]:
        """CSS variable -> colour."""
        plain = {f"--{name}": getattr(self, name) for name in _PLAIN}
        return plain | {f"--slot{i}": colour for i, colour in enumerate(self.slots)}


_PLAIN = ("ink", "muted", "grid", "paper", "refusal", "answer", "harmful", "irrelevant")
LIGHT = Palette(
    ink="#1d2126",
    muted="#5b636d",
    grid="#dfe1e0",
    paper="#fbfbf9",
    refusal="#8a4f9e",
    answer="#5d7f33",
    harmful="#a1172f",
    irrelevant="#c6c9cb",
    slots=("#69717b", "#c9501c", "#9c7400", "#0b6bb0", "#008a68", "#b0407f", "#4b4fb8", "#6b5a3a"),
)
DARK = Palette(
    ink="#e9e8e4",
    muted="#a2a8b0",
    grid="#33383f",
    paper="#15181c",
    refusal="#c890db",
    answer="#a3c76d",
    harmful="#ff7285",
    irrelevant="#575e66",
    slots=("#aab2bc", "#ff8b52", "#e3b93d", "#5cb1f2", "#39cda2", "#f088bd", "#9da1ff", "#cdb98f"),
)
# Placeholder colours: `to_variables` finds them in a figure's SVG and replaces them by CSS variables.
STENCIL = Palette(
    **{name: f"#f0e0{i:02x}" for i, name in enumerate(_PLAIN)},
    slots=tuple(f"#f0e1{i:02x}" for i in range(len(SLOTS))),
)


def slots(names: Sequence[str]) -> dict[str, int]:
    """Each model's slot; when all are taken, slots are used again."""
    taken = {name: SLOTS.index(name) for name in names if name and name in SLOTS}
    free = [i for i in range(len(SLOTS)) if i not in taken.values()] or list(range(len(SLOTS)))
    others = [name for name in names if name not in taken]
    return taken | {name: free[i % len(free)] for i, name in enumerate(others)}


def to_variables(svg: str) -> str:
    """An SVG that was drawn with `STENCIL`, with its colours replaced by `var(--…)`."""
    for variable, colour in STENCIL.variables().items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
