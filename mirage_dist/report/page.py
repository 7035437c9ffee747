"""The HTML page: one self-contained file. Whatever a model or a data set said is escaped, never interpreted."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mirage_dist.report import figures, text
from mirage_dist.report.load import Leaf, Run, by_hash
from mirage_dist.report.style import sheet, slots

EXAMPLES = 3  # a kind


def render(runs: Sequence[Run], summary: Mapping[str, Any]) -> str:
    """The whole page. Sections that the runs give nothing for are left out."""
    sections = [_head(runs), _figures(runs), _table(runs), _reading(runs), _examples(runs)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(text.TITLE)}</title>\n<style>\n{sheet()}</style>\n</head>\n<body>\n"
        f"{sections[0]}\n<main>\n{''.join(sections[1:])}</main>\n{_foot(runs, summary)}\n</body>\n</html>\n"
    )


def _head(runs: Sequence[Run]) -> str:
    warnings = "".join(f'<p class="warning">{escape(w)}</p>' for w in text.warnings(runs))
    return (
        f'<header><h1>{escape(text.TITLE)}</h1><p class="lede">{escape(text.lede(runs))}</p>'
        f'<p class="facts">{escape(text.facts(runs))}</p>{warnings}</header>'
    )


# ------------------------------------------------------------------------------------------------ table


def _table(runs: Sequence[Run]) -> str:
    head = "".join(f'<th scope="col">{_name(runs, run)}</th>' for run in runs)
    body = []
    for title, meaning, rows in text.measures(runs):
        body.append(
            f'<tr class="group"><th scope="rowgroup" colspan="{len(runs) + 1}"><div>{escape(title)} '
            f'<span class="note">{escape(meaning)}</span></div></th></tr>'
        )
        for label, measure, condition in rows:
            cells = "".join(_cell(runs, run, run.leaf(measure, condition)) for run in runs)
            body.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    return (
        '<section><h2>All rates</h2><div class="scroll"><table class="rates">'
        f'<thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        f'<p class="note">{escape(text.TABLE_NOTE)}</p></section>\n'
    )


def _cell(runs: Sequence[Run], run: Run, leaf: Leaf | None) -> str:
    if leaf is None:
        return '<td class="count">not measured</td>'
    low, high = (100 * bound for bound in leaf["ci95"])
    unjudged = f" · {leaf['unjudged']} without verdict" if leaf.get("unjudged") else ""
    return (
        f'<td style="{_colour(runs, run)}"><span class="rate">{text.percent(leaf)}</span>'
        f'<span class="bar"><i style="width:{100 * leaf["rate"]:.1f}%"></i></span>'
        f'<span class="count">{leaf["k"]}/{leaf["n"]} · {low:.1f}–{high:.1f}{unjudged}</span></td>'
    )


def _name(runs: Sequence[Run], run: Run) -> str:
    return f'<span class="name" style="{_colour(runs, run)}">{escape(run.name)}</span>'


def _colour(runs: Sequence[Run], run: Run) -> str:
    return f"--c:var(--slot{slots([r.name for r in runs])[run.name]})"


# ---------------------------------------------------------------------------------------------- figures


def _figures(runs: Sequence[Run]) -> str:
    curves = [
        _figure("fig4", figures.curve(runs, "asr", "unsafe"), text.curve(runs, "asr", "unsafe")),
        _figure("fig5", figures.curve(runs, "rr", "safe"), text.curve(runs, "rr", "safe")),
    ]
    effect = _section("What one word does", text.CURVES_NOTE, curves)
    ends = [
        _figure(
            f"fig1d-{measure}",
            figures.dumbbell(runs, measure, kind),
            text.dumbbell(runs, measure, kind),
            figures.dumbbell_size(runs),
        )
        for measure, kind in (("asr", "unsafe"), ("rr", "safe"), ("ir", "unsafe"), ("utility", "safe"))
        if any(run.leaf(measure) for run in runs)
    ]
    told = [run for run in runs if run.first_words]
    widest = max(
        (share for run in told for pair in figures.shares(run.first_words).values() for share in pair), default=0
    )
    words = [
        _figure(
            f"fig3-{number}",
            figures.first_words(run.first_words, widest),
            text.words(run),
            figures.words_size(run.first_words),
        )
        for number, run in enumerate(told)
    ]
    cause = _section("What safety training sees: the first word", text.WORDS_NOTE, words)
    return effect + _section("Methods compared, before and after", text.METHODS_NOTE, ends) + cause


def _section(title: str, note: str, parts: Iterable[str]) -> str:
    inner = "".join(parts)
    if not inner:
        return ""
    return f'<section><h2>{escape(title)}</h2><p>{escape(note)}</p><div class="figures">{inner}</div></section>\n'


def _figure(name: str, draw: figures.Draw, words: tuple[str, str], size: tuple[float, float] = figures.SIZE) -> str:
    title, caption = words
    drawing = figures.svg(draw, name, f"{title}. {caption}", size)
    return f"<figure><h3>{escape(title)}</h3>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _reading(runs: Sequence[Run]) -> str:
    points = "".join(f"<li>{escape(point)}</li>" for point in text.caveats(runs))
    return f"<section><h2>How to read these numbers</h2><ul>{points}</ul></section>\n"


# --------------------------------------------------------------------------------------------- examples


def _examples(runs: Sequence[Run]) -> str:
    cards = [card for kind in ("unsafe", "safe") for card in _examples_of(runs, kind)]
    if not cards:
        return ""
    return f"<section><h2>Example answers</h2><p>{escape(text.EXAMPLES_NOTE)}</p>{''.join(cards)}</section>\n"


def _examples_of(runs: Sequence[Run], kind: str) -> Iterable[str]:
    """Questions that every run was asked as they are and under the attack's first rewrite, chosen by hash."""
    own, attack = runs[0].headline_set(kind), runs[0].attack(kind)
    if own is None or attack is None:
        return
    asked = [
        {
            i
            for s, i, a, shot in run.answers
            if (s, a, shot) == (own, attack[0], 1) and (s, i, "clean", 0) in run.answers
        }
        for run in runs
    ]
    for number, identity in enumerate(by_hash(sorted(set.intersection(*asked)))[:EXAMPLES], start=1):
        pairs = [
            (run, run.answers[own, identity, "clean", 0], run.answers[own, identity, attack[0], 1]) for run in runs
        ]
        yield _example(runs, f"{kind.capitalize()} question {number}", attack[0], pairs)


def _example(
    runs: Sequence[Run], title: str, attack: str, pairs: Sequence[tuple[Run, Mapping[str, Any], Mapping[str, Any]]]
) -> str:
    _, clean, attacked = pairs[0]
    rows = "".join(
        f'<tr><th scope="row">{_name(runs, run)}</th><td data-label="clean">{_answer(before)}</td>'
        f'<td data-label="{escape(attack)}">{_answer(after)}</td></tr>'
        for run, before, after in pairs
    )
    terms = [("asked clean", clean["question"]), (f"asked under {attack}", attacked["question"])]
    if runs[0].metrics["world"]:
        terms.append(("the data's answer", clean["expected"]))
    listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(said)}</dd>" for term, said in terms)
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<div class="example">{_picture(runs[0], clean["image"])}<dl>{listed}</dl></div>'
        '<table class="answers"><thead><tr><th scope="col"></th><th scope="col">answer, clean</th>'
        f'<th scope="col">answer, {escape(attack)}</th></tr></thead><tbody>{rows}</tbody></table></details>\n'
    )


def _answer(row: Mapping[str, Any]) -> str:
    verdict = escape(row["verdict"])
    said = escape(row["response"]) or "<em>(empty)</em>"
    return f'<span class="verdict {verdict}">{verdict}</span> {said}'


def _picture(run: Run, path: str | None) -> str:
    """The picture itself in the embedded world, where none can harm; pictures of real data are not shown."""
    if not run.metrics["world"] or path is None or not Path(path).is_file():
        return ""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img alt="the picture asked about" src="data:image/png;base64,{data}">'


def _foot(runs: Sequence[Run], summary: Mapping[str, Any]) -> str:
    parts = [f"{run.name}: model {run.metrics['model_hash'][:12]}" for run in runs]
    parts += [
        f"{key}: {summary[key]}" for key in ("seed", "wall_seconds", "config_hash") if summary.get(key) is not None
    ]
    if world := summary.get("world"):
        parts.append(
            "world: " + ", ".join(f"{k} {v}" for k, v in world.items())
            if isinstance(world, Mapping)
            else f"world: {world}"
        )
    return f"<footer>{escape(' · '.join(parts))}</footer>"
