"""Colours and the page's style sheet. A model has one colour everywhere, in figures, tables and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Slots keep their meaning from report to report; other names take the free slots in order. The hues stay
# apart for colour-blind eyes (after Okabe and Ito), and figures repeat them as marker shapes.
SLOTS = ("base", "sft", "sft_control", "npo", "rmu", "", "", "")
MARKERS = ("s", "o", "^", "D", "v", "P", "X", "p")


@dataclass(frozen=True)
class Palette:
    """ink: text; muted: secondary text; grid: hairlines; paper: background; one colour a slot of `SLOTS`."""

    ink: str
    muted: str
    grid: str
    paper: str
    refusal: str
    answer: str
    slots: tuple[str, ...]

    def variables(self) -> dict[str, str]:
        """CSS variable -> colour."""
        plain = {f"--{name}": getattr(self, name) for name in _PLAIN}
        return plain | {f"--slot{i}": colour for i, colour in enumerate(self.slots)}


_PLAIN = ("ink", "muted", "grid", "paper", "refusal", "answer")
LIGHT = Palette(
    ink="#1d2126",
    muted="#5b636d",
    grid="#dfe1e0",
    paper="#fbfbf9",
    refusal="#8a4f9e",
    answer="#5d7f33",
    slots=("#69717b", "#c9501c", "#9c7400", "#0b6bb0", "#008a68", "#b0407f", "#4b4fb8", "#6b5a3a"),
)
DARK = Palette(
    ink="#e9e8e4",
    muted="#a2a8b0",
    grid="#33383f",
    paper="#15181c",
    refusal="#c890db",
    answer="#a3c76d",
    slots=("#aab2bc", "#ff8b52", "#e3b93d", "#5cb1f2", "#39cda2", "#f088bd", "#9da1ff", "#cdb98f"),
)
# Drawn in these, a figure's colours can be told apart in its SVG and exchanged for CSS variables.
STENCIL = Palette(
    **{name: f"#f0e0{i:02x}" for i, name in enumerate(_PLAIN)},
    slots=tuple(f"#f0e1{i:02x}" for i in range(len(SLOTS))),
)


def slots(names: Sequence[str]) -> dict[str, int]:
    """Each model's slot; beyond the last one they start again."""
    taken = {name: SLOTS.index(name) for name in names if name in SLOTS[:5]}
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
    """The page's CSS."""
    dark = _block(DARK.variables())
    return f":root{{{_block(LIGHT.variables())}color-scheme:light dark}}\n" + (
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_RULES}"
    )


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.55;
  font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:68rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:3rem}
h1{font-size:clamp(1.7rem,4.5vw,2.5rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .6rem;text-wrap:balance}
h2{font-size:1.35rem;letter-spacing:-.01em;margin:3.2rem 0 .4rem;padding-top:1.1rem;border-top:1px solid var(--grid)}
h3{font-size:1rem;margin:0 0 .15rem}
p{max-width:44rem;margin:.5rem 0 1rem}
.lede{font-size:1.12rem;max-width:46rem}
.facts,.note,figcaption,footer{color:var(--muted);font-size:.9rem}
.warning{border-left:3px solid var(--slot1);padding-left:.9rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1.8rem 2.5rem}
figure{margin:1.2rem 0 0;min-width:0}
figure svg{display:block;width:100%;height:auto;margin:.3rem 0;overflow:visible}
figure svg text{font-family:inherit!important}
figcaption{max-width:40rem}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.4rem 0;padding:0;list-style:none;font-size:.9rem}
.name{font-weight:600;white-space:nowrap}
.name::before{content:"";display:inline-block;width:.62em;height:.62em;border-radius:50%;margin-right:.42em;
  background:var(--c)}
.scroll{overflow-x:auto;margin:1rem 0 .4rem;-webkit-overflow-scrolling:touch}
table{border-collapse:separate;border-spacing:0;font-variant-numeric:tabular-nums;width:100%}
.rates{min-width:44rem;font-size:.93rem}
.rates th,.rates td{padding:.42rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
.rates thead th{vertical-align:bottom;border-bottom:1px solid var(--muted)}
.rates tbody th{font-weight:400;position:sticky;left:0;background:var(--paper);white-space:nowrap}
.rates .group th{font-weight:600;padding-top:1.1rem;border-bottom-color:var(--muted);white-space:normal}
.group div{position:sticky;left:.6rem;max-width:min(44rem,calc(100vw - 3.7rem))}
.group .note{font-weight:400}
.rate{font-weight:600}
.bar{display:block;height:3px;border-radius:2px;margin:.1rem 0 .2rem;background:var(--grid)}
.bar i{display:block;height:100%;border-radius:2px;background:var(--c)}
.count{display:block;color:var(--muted);font-size:.78rem;white-space:nowrap}
details{border:1px solid var(--grid);border-radius:8px;margin:.7rem 0;padding:0 1rem}
summary{cursor:pointer;padding:.7rem 0;font-weight:600}
summary:focus-visible{outline:2px solid var(--slot3);outline-offset:3px}
.example{display:flex;gap:1rem;align-items:flex-start;margin:.2rem 0 .6rem}
.example img{width:80px;height:80px;image-rendering:pixelated;border-radius:4px;flex:none}
.example dl{margin:0;min-width:0}
.example dt,.asked{color:var(--muted);font-size:.82rem}
.example dd{margin:0 0 .35rem;overflow-wrap:anywhere}
.answers{font-size:.92rem;margin-bottom:1rem}
.answers th,.answers td{padding:.5rem .6rem .5rem 0;text-align:left;vertical-align:top;
  border-top:1px solid var(--grid);overflow-wrap:anywhere}
.answers thead th{font-weight:400;color:var(--muted);border-top:0;font-size:.82rem}
.verdict{display:inline-block;font-size:.78rem;border:1px solid currentColor;border-radius:4px;padding:0 .38em}
.harmful{color:var(--slot1)}.refused{color:var(--refusal)}.correct{color:var(--answer)}
.irrelevant,.answered{color:var(--muted)}
li{max-width:44rem;margin:.35rem 0}
footer{padding-top:1rem;padding-bottom:3rem;overflow-wrap:anywhere}
code{font-size:.9em}
@media (max-width:40rem){
  .answers thead{position:absolute;left:-999rem}
  .answers tr{display:block;border-top:1px solid var(--grid);padding:.4rem 0}
  .answers th,.answers td{display:block;border:0;padding:.15rem 0}
  .answers td::before{content:attr(data-label) " ";color:var(--muted);font-size:.82rem}
}
"""
