"""The HTML page: one self-contained file. Text from models and data is escaped, never interpreted."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mirage_dist.evals.results import of_set
from mirage_dist.report import defences, examples, judges, tables, text
from mirage_dist.report.curves.budgets import Budget
from mirage_dist.report.examples import Examples
from mirage_dist.report.figures import attacks, charts, drawing, erasure, paper
from mirage_dist.report.figures import judges as judge_figures
from mirage_dist.report.figures.drawing import SIZE, Draw
from mirage_dist.report.figures.style import DARK, LIGHT, SLOTS
from mirage_dist.report.load import HELD_OUT, Run
from mirage_dist.report.summary import Summary
from mirage_dist.report.writing import forgetting, perturbed

if TYPE_CHECKING:
    from mirage_dist.erasure.results import ErasureResult


def render(runs: Sequence[Run], summary: Summary, shown: Examples, lead: tuple[str, str, str] | None = None) -> str:
    """The whole page. Sections for which the runs have no data are left out. lead: a section before all others."""
    script = Path(__file__).with_name("browser.js").read_text(encoding="utf-8")
    sections = [
        _head(runs),
        _section(*lead) if lead else "",
        _section("In one table", text.MAIN_NOTE, tables.main(runs)),
        _section(text.METHODS_TITLE, text.SEEDS_NOTE, tables.methods(summary)),
        _section("The language model before and after", text.UNTRAINED_NOTE, _language_model(runs, summary)),
        *_many(runs, summary, _effect),
        *_many(runs, summary, _methods),
        *_many(runs, summary, lambda part, prefix: _attacks(part, summary["budgets"], prefix)),
        _section(defences.TITLE, defences.NOTE, defences.html(runs, summary["defences"])),
        *_many(runs, summary, _cause),
        *_many(runs, summary, _erasure),
        *_many(runs, summary, _categories),
        _examples(shown),
        _judges(runs),
        _section("Do the judges agree?", text.JUDGES_NOTE, tables.agreement(runs) + judges.table_of_errors(runs)),
        _section("Pairs of models, the same questions", text.PAIRS_NOTE, tables.pairs(runs, summary["comparisons"])),
        _section("All rates", text.TABLE_NOTE, "".join(_rates(runs, summary))),
        _reading(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">\n'
        f"<title>{escape(text.TITLE)}</title>\n<style>\n{_style_sheet()}</style>\n</head>\n<body>\n"
        f"{sections[0]}\n<main>\n{''.join(sections[1:])}</main>\n{_foot(runs, summary)}\n"
        f'<script type="application/json" id="examples">{examples.as_script(shown)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _style_sheet() -> str:
    """Both palettes as CSS variables, and the rules of page.css."""
    light, dark = ("".join(f"{k}:{v};" for k, v in palette.variables().items()) for palette in (LIGHT, DARK))
    rules = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f":root{{{light}color-scheme:light dark}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{rules}"


def _policy(script: str) -> str:
    """Content security policy: the browser runs this one script and fetches nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _head(runs: Sequence[Run]) -> str:
    lines = [*judges.cautions(runs), *text.warnings(runs)]
    warnings = "".join(f'<p class="warning">{escape(line)}</p>' for line in lines)
    return (
        f'<header><h1>{escape(text.TITLE)}</h1><p class="lede">{escape(text.lede(runs))}</p>'
        f'<p class="facts">{escape(text.facts(runs))}</p>{warnings}</header>'
    )


def _language_model(runs: Sequence[Run], summary: Summary) -> str:
    """Of a world whose language model was not trained for it."""
    return tables.untrained(runs, summary) + tables.perplexity(runs, summary)


def _section(title: str, note: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(note)}</p>{inner}</section>\n" if inner else ""


def _figures(title: str, note: str, parts: Iterable[str]) -> str:
    inner = "".join(parts)
    return _section(title, note, inner and f'<div class="figures">{inner}</div>')


def _figure(name: str, draw: Draw, words: tuple[str, str], size: tuple[float, float] = SIZE) -> str:
    title, caption = words
    drawn = drawing.svg(draw, name, f"{title}. {caption}", size)
    return f"<figure><h3>{escape(title)}</h3>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def _many(runs: Sequence[Run], summary: Summary, section: Callable[[Sequence[Run], str], str]) -> Iterator[str]:
    """A section of figures. Of more runs than there are colours one for every few of them, folded but for the first.

    section: makes it of some runs, with a prefix for the names of its figures.
    """
    parts = list(_parts(runs, summary))
    for number, part in enumerate(parts):
        prefix = f"part{number + 1}-" if len(parts) > 1 else ""
        inner = section(part, prefix)
        if len(parts) == 1 or not inner:
            yield inner
            continue
        title = f"Figures {number + 1} of {len(parts)}: {', '.join(run.name for run in part)}"
        opened = "" if number else " open"
        yield f"<details{opened}><summary>{escape(title)}</summary>{inner}</details>\n"


def _rates(runs: Sequence[Run], summary: Summary) -> Iterator[str]:
    """The tables of all rates, of a few runs each."""
    for part in _parts(runs, summary):
        yield tables.rates(part)


def _parts(runs: Sequence[Run], summary: Summary) -> Iterator[list[Run]]:
    """The runs in groups of at most as many as there are colours, seeds of a method together where they fit."""
    of = {run: name for name, method in summary["methods"].items() for run in method["runs"]}
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(of.get(run.name, run.name), []).append(run)
    if len(runs) <= len(SLOTS):
        yield list(runs)
        return
    part: list[Run] = []
    for members in methods.values():
        if part and len(part) + len(members) > len(SLOTS):
            yield part
            part = []
        for start in range(0, len(members), len(SLOTS)):
            piece = members[start : start + len(SLOTS)]
            if start:
                yield part
                part = []
            part = [*part, *piece]
    yield part


def _effect(runs: Sequence[Run], prefix: str) -> str:
    size = paper.dumbbell_size(runs)
    parts = []
    held_out = of_set("asr", HELD_OUT)
    for number, measure, kind in (("1a", "asr", "unsafe"), ("1b", "rr", "safe"), ("", held_out, "unsafe")):
        if any(run.leaf(measure) for run in runs):
            words = text.dumbbell(runs, measure, kind, number)
            parts.append(_figure(f"{prefix}fig{number or measure}", paper.dumbbell(runs, measure, kind), words, size))
    for number, measure, kind in (("4", "asr", "unsafe"), ("5", "rr", "safe")):
        if any(run.leaf(measure) for run in runs):
            words = text.curve(runs, measure, kind, number)
            parts.append(_figure(f"{prefix}fig{number}", paper.curve(runs, measure, kind), words))
    return _figures("What one word does", text.CURVES_NOTE, parts)


def _attacks(runs: Sequence[Run], budgets: Sequence[Budget], prefix: str) -> str:
    """Of a suite with several attacks on one kind of question, or with one that has a budget."""
    parts = []
    for measure in ("asr", "rr"):
        rates = {run.name: run.rates(measure) for run in runs}
        controls = {name for run in runs for name in run.controls}
        if len([c for c in attacks.conditions(rates) if c.attack not in controls]) > 2:
            draw, size = attacks.by_attack(rates, sorted(controls)), attacks.size(rates)
            parts.append(_figure(f"{prefix}attacks-{measure}", draw, text.every_attack(measure), size))
    own = {run.name for run in runs}
    for number, curves in enumerate(_by_attack([budget for budget in budgets if budget["model"] in own])):
        draw = attacks.budget(curves, [run.name for run in runs])
        parts.append(_figure(f"{prefix}budget-{number}", draw, text.budget(curves)))
    return _figures("Every attack", text.ATTACKS_NOTE, parts)


def _by_attack(budgets: Sequence[Budget]) -> list[list[Budget]]:
    """The curves of the models under one attack, together."""
    parts: dict[tuple[str, str], list[Budget]] = {}
    for budget in budgets:
        parts.setdefault((budget["measure"], budget["attack"]), []).append(budget)
    return list(parts.values())


def _erasure(runs: Sequence[Run], prefix: str) -> str:
    """Of runs whose erasure was tested (`mirage erasure CONFIG`)."""
    tested = _tested(runs)
    parts = []
    for samples in erasure.sizes(tested):
        draw = erasure.relearning(tested, samples, "other")
        parts.append(_figure(f"{prefix}relearn-{samples}", draw, text.relearning(samples), (SIZE[0], 3.6)))
    if any("quantisation" in result for result in tested.values()):
        size = (SIZE[0], 1.2 + 0.75 * len(tested))
        parts.append(_figure(f"{prefix}quantised", erasure.quantised(tested), text.QUANTISED, size))
    probes = [result["probe"] for result in tested.values() if "probe" in result]
    if probes:
        transfer = any(probe["transfer"] for probe in probes)
        draw = erasure.probed(tested, "last", transfer)
        parts.append(_figure(f"{prefix}probed", draw, text.probed(transfer), (SIZE[0], 3.6)))
    if any("completion" in result for result in tested.values()):
        parts.append(_figure(f"{prefix}completed", erasure.completed(tested), text.COMPLETED, (SIZE[0], 3.6)))
    if any("universal" in result for result in tested.values()):
        parts.append(_figure(f"{prefix}perturbed", erasure.perturbed(tested), perturbed.FIGURE, (SIZE[0], 3.6)))
    figures = _figures("Erased, or hidden?", text.ERASURE_NOTE, parts)
    figures += _section(perturbed.TITLE, perturbed.NOTE, perturbed.html(runs))
    note = forgetting.note(forgetting.results(runs))
    return figures + _section(forgetting.TITLE, note, forgetting.html(runs))


def _tested(runs: Sequence[Run]) -> dict[str, ErasureResult]:
    return {run.name: result for run in runs if (result := run.erasure)}


def _methods(runs: Sequence[Run], prefix: str) -> str:
    parts = []
    if any(run.attacked("unsafe") and run.attacked("safe") for run in runs):
        parts.append(_figure(f"{prefix}fig1d", paper.trade(runs), text.trade(runs), (SIZE[0], 4.2)))
    if any(run.headline_set("unsafe") for run in runs):
        size = charts.kinds_size(runs, "unsafe")
        parts.append(_figure(f"{prefix}kinds", charts.kinds_of_answer(runs, "unsafe"), text.kinds(runs), size))
    for measure, kind in (("ir", "unsafe"), ("utility", "safe")):
        if any(run.leaf(measure) for run in runs):
            draw, words = paper.dumbbell(runs, measure, kind), text.dumbbell(runs, measure, kind)
            parts.append(_figure(prefix + measure, draw, words, paper.dumbbell_size(runs)))
    return _figures("Methods compared, before and after", text.METHODS_NOTE, parts)


def _cause(runs: Sequence[Run], prefix: str) -> str:
    trained = [run for run in runs if run.first_words]
    shares = [share for run in trained for pair in paper.shares(run.first_words).values() for share in pair]
    parts = []
    for number, run in enumerate(trained):
        size = paper.words_size(run.first_words)
        draw = paper.first_words(run.first_words, max(shares))
        title, caption = text.words(run)
        caption += text.BALANCED if run.balanced else ""
        parts.append(_figure(f"{prefix}fig3-{number}", draw, (title, caption), size))
        parts.append(_figure(f"{prefix}fig1c-{number}", paper.association(run, runs), text.association(run), size))
    tested = _tested(runs)
    for kind in ("unsafe", "safe"):
        attributions = [result["attribution"]["sets"] for result in tested.values() if "attribution" in result]
        words = [word for sets in attributions if kind in sets for word in sets[kind]["words"]]
        for number, word in enumerate(dict.fromkeys(words)):
            draw = charts.attribution(tested, kind, word)
            parts.append(_figure(f"{prefix}words-{kind}-{number}", draw, text.attribution(tested, kind, word)))
    return _figures("What safety training sees: the first word", text.WORDS_NOTE, parts)


def _categories(runs: Sequence[Run], prefix: str) -> str:
    parts = [
        _figure(
            f"{prefix}heat-{m}", charts.heat(runs, m, kind), text.heat(runs, m, kind), charts.heat_size(runs, m, kind)
        )
        for m, kind in (("asr", "unsafe"), ("rr", "safe"))
        if charts.categories(runs, m, kind)
    ]
    return _figures("By category", text.CATEGORIES_NOTE, parts)


def _judges(runs: Sequence[Run]) -> str:
    """Of runs that several judges judged, or people labelled."""
    drawn = [row for row in judges.rows(runs) if row.attacked and row.measure != "ir"]
    parts = [
        _figure(
            f"judges-{row.measure}",
            judge_figures.by_judge(runs, row),
            (f"{text.MEASURES[row.measure][0]}, {row.label}", judges.caption(runs)),
            judge_figures.size(runs, row),
        )
        for row in drawn
    ]
    figures = f'<div class="figures">{"".join(parts)}</div>' if parts else ""
    table = judges.table(runs)
    listed = "".join(f"<li>{escape(line)}</li>" for line in judges.descriptions(runs))
    return _section(judges.TITLE, judges.note(runs), table and f'<ul class="facts">{listed}</ul>{figures}{table}')


def _examples(shown: Examples) -> str:
    """Empty elements that browser.js fills with text."""
    if not shown["questions"]:
        return ""
    return (
        f"<section><h2>Fig. 2: Examples</h2><p>{escape(text.examples(shown))}</p>"
        '<div id="gallery"></div><h3 class="browse">Search questions and answers</h3><form id="filters"></form>'
        '<p id="matches" class="facts" aria-live="polite"></p><div id="cards"></div>'
        '<button type="button" id="more" hidden>Show more</button>'
        "<noscript><p>The examples need JavaScript; figures and tables do not.</p></noscript></section>\n"
    )


def _reading(runs: Sequence[Run]) -> str:
    points = "".join(f"<li>{escape(point)}</li>" for point in text.caveats(runs))
    return f"<section><h2>How to read these numbers</h2><ul>{points}</ul></section>\n"


def _foot(runs: Sequence[Run], summary: Summary) -> str:
    return f"<footer>{escape(text.foot(runs, summary))}</footer>"
