"""Colours and the page's style sheet. A model has one colour everywhere, in figures, tables and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Slots keep their meaning from report to report; other names take the free slots in order. The hues stay
# apart for colour-blind eyes (after Okabe and Ito), and figures repeat them as marker shapes.
SLOTS = ("base", "sft", "sft_control", "npo", "rmu", "sft_diversified", "sft_filtered", "")
MARKERS = ("s", "o", "^", "D", "v", "P", "X", "p")


@dataclass(frozen=True)
class Palette:
    """ink: text; muted: secondary text; grid: hairlines; paper: background; refusal, answer, harmful, irrelevant: kinds
    of answer; one colour a slot of `SLOTS`.
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
# Drawn in these, a figure's colours can be told apart in its SVG and exchanged for CSS variables.
STENCIL = Palette(
    **{name: f"#f0e0{i:02x}" for i, name in enumerate(_PLAIN)},
    slots=tuple(f"#f0e1{i:02x}" for i in range(len(SLOTS))),
)


def slots(names: Sequence[str]) -> dict[str, int]:
    """Each model's slot; beyond the last one they start again."""
    taken = {name: SLOTS.index(name) for name in names if name and name in SLOTS}
    free = [i for i in range(len(SLOTS)) if i not in taken.values()] or list(range(len(SLOTS)))
    others = [name for name in names if name not in taken]
    return taken | {name: free[i % len(free)] for i, name in enumerate(others)}


def to_variables(svg: str) -> str:
    """An SVG drawn with `STENCIL`, its colours replaced by `var(--…)`."""
    for variable, colour in STENCIL.variables().items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _block(variables: Mapping[str, str]) -> str:
    return "".join(f"{name}:{colour};" for name, colour in variables.items())


def sheet() -> str:
    """The page's CSS: both palettes, and the rules of page.css."""
    dark = _block(DARK.variables())
    rules = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f":root{{{_block(LIGHT.variables())}color-scheme:light dark}}\n" + (
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{rules}"
    )
