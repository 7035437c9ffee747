"""The report of many runs: a table that fits a terminal, seeds folded and never pooled, LaTeX that is text, figures as
PDF, and a summary that its JSON Schema describes.
"""

import csv
import io
import json
import re
import statistics
import typing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import write_run

from mirage_dist import config as configs
from mirage_dist import report, state
from mirage_dist.cli import main
from mirage_dist.erasure.results import (
    Difference,
    FitSummary,
    ForgetQuality,
    ForgettingResult,
    Measured,
    Measures,
    Membership,
    Never,
    PerturbedRates,
    Scoring,
    UniversalResult,
)
from mirage_dist.evals import metrics
from mirage_dist.evals.results import DefenceInfo, Leaf
from mirage_dist.report import text as wording
from mirage_dist.report.compare import Defended, Effect
from mirage_dist.report.curves.budgets import Budget, Point
from mirage_dist.report.figures import drawing
from mirage_dist.report.load import read
from mirage_dist.report.methods import Method, Spread
from mirage_dist.report.methods import methods as of_seeds
from mirage_dist.report.summary import SCHEMA_VERSION, Summary
from mirage_dist.report.writing import forgetting, latex, perturbed, terminal
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.stats import Paired

PATTERNS = [["harmful", "refused"], ["harmful", "harmful", "refused"], ["irrelevant"]]
ADDED = ("methods", "defences", "figures")  # in version 1
SCHEMA = json.loads(Path(report.__file__).with_name("summary.schema.json").read_text())


def trained(folder: Path, unsafe: list[str], *words: str, rules: str = "same") -> Path:
    """An evaluated run with its recipe."""
    write_run(folder, {"unsafe": unsafe, "safe": ["correct", "refused"]}, rules=rules)
    recipe = configs.load("configs/train/demo_sft.yaml", [f"run.dir={folder}", "world.seed=0", *words], TrainRecipe)
    configs.write_yaml(recipe, folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """More runs than colours: three methods of three seeds, the same training twice; and their report."""
    root = tmp_path_factory.mktemp("many")
    runs = {}
    for method in range(3):
        for seed in range(3):
            name = f"method{'abc'[method]}-seed{seed}"
            runs[name] = trained(root / name, PATTERNS[seed], f"seed={seed}", f"train.lr={method + 1}e-5")
    for name in ("twice_1", "twice_2"):
        runs[name] = trained(root / name, PATTERNS[0], "seed=0", "train.lr=9e-5")
    out = root / "report"
    return runs, report.report(runs, out), out


# --------------------------------------------------------------------------------------------------------- terminal

NAMES = st.lists(st.text("abc-_. é", min_size=1, max_size=80), min_size=1, max_size=25, unique=True)


@settings(max_examples=40)
@given(names=NAMES, attack=st.text("wx_-", min_size=1, max_size=60), n=st.integers(2, 10**6))
def test_no_line_is_wider_than_a_terminal_and_no_cell_is_lost(names, attack, n):
    entry = {"asr": {"clean": metrics.leaf(n // 2, n), f"{attack}_k3": metrics.leaf(n, n)}, "rr": None, "ir": None,
             "utility": None, "locality": metrics.leaf(1, n)}  # fmt: skip
    summary = typing.cast(
        Summary, {"models": dict.fromkeys(names, entry), "methods": {}, "defences": [], "problems": [], "cautions": []}
    )
    lines = terminal.table(summary).splitlines()
    assert max(map(len, lines)) <= terminal.WIDTH
    text = "\n".join(lines)
    assert text.count(f" {n}/{n}") == len(names)
    shown = sum(len(re.sub(r"\s", "", line)) for line in lines)
    assert shown >= sum(len(re.sub(r"\s", "", name)) for name in names)


def test_models_that_do_not_fit_stand_below_under_their_own_heading():
    entry = {"asr": {"clean": metrics.leaf(1, 2)}, "rr": None, "ir": None, "utility": None, "locality": None}
    models = {f"model-{number}": entry for number in range(9)}
    summary = typing.cast(Summary, {"models": models, "methods": {}, "defences": [], "problems": [], "cautions": []})
    lines = terminal.table(summary).splitlines()
    headings = [line.split() for line in lines if "model-" in line]
    assert len(headings) == 2
    assert [name for heading in headings for name in heading] == list(models)
    assert sum(line.count("1/2") for line in lines) == 9


def test_many_runs_are_a_column_for_each_method(many):
    _, summary, _ = many
    table = report.table(summary)
    for letter in "abc":
        assert f"method{letter} (3 seeds)" in table
    assert "seed1" not in table
    assert "twice_1" in table
    assert max(map(len, table.splitlines())) <= terminal.WIDTH


# ------------------------------------------------------------------------------------------------------------ seeds


def test_a_method_is_the_mean_of_its_runs_and_never_their_counts_added_up(many):
    runs, summary, out = many
    assert list(summary["methods"]) == [f"method{letter}" for letter in "abc"]  # the same seed twice is no method
    method = summary["methods"]["methodb"]
    assert (method["runs"], method["seeds"]) == ([f"methodb-seed{n}" for n in range(3)], [0, 1, 2])
    own = [summary["models"][name]["asr"]["what_k3"]["rate"] for name in method["runs"]]
    spread = method["rates"]["asr"]["what_k3"]
    assert own == [0.5, 4 / 6, 0.0]
    assert spread["rates"] == own
    assert spread["mean"] == pytest.approx(statistics.mean(own))
    assert (spread["lowest"], spread["highest"]) == (0.0, 4 / 6)
    half = 4.302652729749464 * statistics.stdev(own) / 3**0.5  # Student's with two degrees of freedom
    assert spread["ci95"] == pytest.approx([max(0.0, spread["mean"] - half), min(1.0, spread["mean"] + half)])
    assert spread["ci95"][1] - spread["ci95"][0] > 0.9  # eighteen pooled answers would have less than .45
    for name in runs:  # and every run is still there by itself
        assert name in summary["models"]
    page, sheet = (out / "index.html").read_text(), list(csv.DictReader(io.StringIO((out / "methods.csv").read_text())))
    assert "Methods over seeds" in page
    assert '<span class="rate">38.9\N{NO-BREAK SPACE}%</span><span class="count">0.0 to 66.7' in page
    line = next(x for x in sheet if (x["method"], x["measure"], x["condition"]) == ("methodb", "asr", "what_k3"))
    assert float(line["mean"]) == spread["mean"]
    assert "38.9 (0.0 to 66.7; 0.0–" in (out / "report.md").read_text()


def test_figures_of_many_runs_are_in_parts_that_each_have_a_colour_for_every_run(many):
    page = (many[2] / "index.html").read_text()
    titles = re.findall(r"<summary>Figures (\d) of (\d): ([^<]*)</summary>", page)
    shown = [names.split(", ") for number, of, names in titles if of == "2"]
    assert {tuple(names) for names in shown if len(names) > 8} == set()
    first = dict.fromkeys(name for names in shown for name in names)
    assert set(first) == set(many[0])
    for names in shown:
        by_method = {name.split("-")[0] for name in names if name.startswith("method")}
        assert all(sum(n.startswith(method) for n in names) == 3 for method in by_method)  # seeds stay together
    main = re.search('<table class="rates main">.*?</table>', page, re.DOTALL)
    assert main is not None
    assert "--slot" not in main[0]  # a colour would be that of another run in the figures
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("own", "methods"),
    [
        (("seed=1", "monitor.project=other"), ["npo"]),
        (("seed=0",), []),
        (("seed=1", "train.lr=1e-6"), []),
        (("seed=1", "world.seed=1"), []),  # other questions
    ],
)
def test_seeds_are_folded_only_where_nothing_else_differs(tmp_path, own, methods):
    runs = {
        "npo-1": trained(tmp_path / "a", PATTERNS[0], "seed=0"),
        "npo-2": trained(tmp_path / "b", PATTERNS[1], *own),
    }
    assert list(of_seeds(read(runs))) == methods


# ------------------------------------------------------------------------------------------------------------ LaTeX


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40))
def test_no_text_of_the_report_is_a_command_of_latex(text):
    escaped = latex.escape(text)
    rest = re.sub(r"\\(?:[{}$&#%_]|text\w+\{\})|\{[\[\]*]\}|\{\}|\$\\rightarrow\$", "", escaped)
    assert not set(rest) & set('\\{}$&#%_~^<>|"`[]*'), escaped
    assert "--" not in escaped


def test_the_table_has_as_many_cells_as_columns_in_every_row_and_all_its_groups_are_closed(many, tmp_path):
    """A table as wide as the text: pdfTeX set such a one within article's 345 pt (looked at, 2026-11-27)."""
    nasty = trained(tmp_path / "nasty", PATTERNS[0], "seed=7", "train.lr=5e-4")
    runs = {"[x]*_50%&$#{}\\~^--": nasty, **dict(list(many[0].items())[:3])}
    loaded = read(runs)
    summary = {"models": {run.name: run.entry for run in loaded}, "methods": of_seeds(loaded), "suite": "demo",
               "defences": [], "problems": ["50 % of {it}"], "cautions": ["a # caution"]}  # fmt: skip
    content = latex.table(loaded, typing.cast(Summary, summary))
    assert (many[2] / "table.tex").read_text().startswith(content.partition("caption")[0])
    assert r"50 \% of \{it\}" in content
    assert r"a \# caution" in content
    opened = re.findall(r"\\(begin|end)\{([\w*]+)\}", content)
    parts = content.split(r"\end{tabular*}")[:-1]
    assert len(parts) > 1
    each = [("begin", "tabular*"), ("end", "tabular*")] * len(parts)
    assert opened == [("begin", "table"), *each, ("end", "table")]
    seen = []
    for part in parts:
        columns = re.search(r"fill\}\}(r+)\}\n", part)
        rows = [line.removesuffix(r" \\") for line in part.splitlines() if line.endswith(r" \\")]
        assert columns is not None
        assert len(columns[1]) <= latex.BESIDE
        assert len(rows) == 2 + 2 * 2  # the head, and a run and a method of two lines each
        titles = re.findall(r"\\multicolumn\{(\d)\}\{c\}\{(.*?)\}", rows[0])
        groups = [int(width) for width, _ in titles]
        assert sum(groups) == len(columns[1])
        seen += [title for _, title in titles]
        spans = [(int(a), int(b)) for a, b in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", part)]
        assert [b - a + 1 for a, b in spans] == groups
        assert [n for a, b in spans for n in range(a, b + 1)] == list(range(2, 2 + len(columns[1])))
        for row in rows[1:]:
            assert len(re.split(r"(?<!\\)&", row)) == 1 + len(columns[1])
        assert re.findall(r"\\(top|mid|bottom)rule", part) == ["top", "mid", "bottom"]
        assert rows[2].startswith(
            r"\raggedright {[}x{]}{*}\_\allowbreak{}50\%\&\$\#\{\}"
            r"\textbackslash{}\textasciitilde{}\textasciicircum{}-{}- & "
        )
        assert rows[4].startswith(r"\raggedright methoda, 3 seeds & ")
    assert len(seen) == len(set(seen))  # no column twice, and no title in two parts
    for words in (
        r"-{}- & 50.0 & ",
        r" & {\scriptsize (18.8--81.2)} & ",
        "3 seeds & 38.9 & ",
        r" & {\scriptsize (0.0--66.7)} & ",
    ):
        assert words in parts[0]
    depth = 0
    for mark in re.findall(r"(?<!\\)[{}]", re.sub(r"\\[{}]", "", content)):
        depth += 1 if mark == "{" else -1
        assert depth >= 0
    assert depth == 0


def test_many_models_have_a_table_for_each_part_of_the_columns(many):
    """A page has no room for three parts of twenty models."""
    content = (many[2] / "table.tex").read_text()
    one = read(dict(list(many[0].items())[:1])) * 20
    summary = {"models": {f"m{i}": run.entry for i, run in enumerate(one)}, "methods": {}, "suite": "demo",
               "defences": [], "problems": [], "cautions": []}  # fmt: skip
    long = latex.table([replace(run, name=f"m{i}") for i, run in enumerate(one)], typing.cast(Summary, summary))
    assert content.count(r"\begin{table}") == 1
    assert long.count(r"\begin{table}") == long.count(r"\begin{tabular*}") > 1
    assert f"Table 2 of {long.count(chr(92) + 'begin{table}')}." in long


def test_the_seeds_behind_a_name_and_a_long_caption_count_as_lines_of_the_page(many):
    """Names of twelve letters have two lines each, and with ", 3 seeds" three; a caption of 800 letters has ten."""
    one = read(dict(list(many[0].items())[:1]))
    methods = {f"llava-npo-{i:02}": {"runs": [f"r{i}"], "seeds": [0, 1, 2], "rates": {}} for i in range(18)}

    def tables(methods, cautions):
        names = [f"r{i}" if methods else f"llava-npo-{i:02}" for i in range(18)]
        summary = {"models": dict.fromkeys(names, one[0].entry), "methods": methods, "suite": "demo",
                   "defences": [], "problems": [], "cautions": cautions}  # fmt: skip
        runs = [replace(one[0], name=name) for name in names]
        return latex.table(runs, typing.cast(Summary, summary)).count(r"\begin{table}")

    assert tables({}, []) < tables(methods, [])
    assert tables({}, []) < tables({}, ["x" * 800])


# -------------------------------------------------------------------------------------------------------------- PDF


def test_a_figure_is_a_pdf_of_the_same_bytes_each_time():
    def draw(ax, palette) -> None:
        ax.plot([0, 1], [0, 1], color=palette.ink)
        ax.set_title("a $name$")

    content = drawing.pdf(draw)
    assert content == drawing.pdf(draw)
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")
    assert b"/CreationDate" not in content


def test_every_figure_of_the_page_is_a_pdf_that_goes_with_the_next_report(tmp_path):
    runs, out = {"sft": trained(tmp_path / "sft", PATTERNS[0])}, tmp_path / "out"
    named = report.report(runs, out, pdf=True)["figures"]
    assert {"fig1a.pdf", "fig4.pdf", "fig1d.pdf"} <= set(named)
    assert len(named) == len(set(named)) == (out / "index.html").read_text().count("<svg")
    assert sorted(named) == sorted(file.name for file in out.glob("*.pdf"))
    assert all((out / name).read_bytes().startswith(b"%PDF-") for name in named)
    (out / "mine.pdf").write_bytes(b"mine")
    assert report.report(runs, out)["figures"] == []
    assert [file.name for file in out.glob("*.pdf")] == ["mine.pdf"]


def test_seeds_that_other_rules_judged_are_no_seeds_of_one_method(tmp_path):
    places = {name: tmp_path / name for name in ("npo-1", "npo-2", "npo-3")}
    for seed, (name, rules) in enumerate(zip(places, ("guard-a", "guard-b", "guard-a"), strict=True)):
        trained(places[name], PATTERNS[0], f"seed={seed}", rules=rules)
    (method,) = of_seeds(read(places)).values()
    assert method["runs"] == ["npo-1", "npo-3"]


def test_defences_of_a_suite_without_their_rates_are_no_error():
    defence = {"name": "d", "kind": "k", "about": "with d", "undefended": ""}
    made = {"models": {}, "methods": {}, "problems": [], "cautions": []}
    made["defences"] = [{"model": "m", "defence": defence, "effects": []}]
    assert "measures neither attack success nor needless refusals" in terminal.table(typing.cast(Summary, made))


# ---------------------------------------------------------------------------------------------------------- summary


def check(value, schema, where="summary") -> None:
    """Raise AssertionError unless a value is one of the schema, in the part of JSON Schema 2020-12 that ours uses."""
    known = {"type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "minimum",
             "maximum", "anyOf", "const", "$ref", "description", "title", "$schema", "$defs"}  # fmt: skip
    assert schema.keys() <= known, f"{where}: a word that nothing checks"
    if "$ref" in schema:
        check(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    if "const" in schema:
        assert value == schema["const"], where
    if "anyOf" in schema:
        faults = []
        for one in schema["anyOf"]:
            try:
                check(value, one, where)
                break
            except AssertionError as fault:
                faults.append(str(fault))
        else:
            raise AssertionError(f"{where}: {faults}")
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
             "null": type(None)}  # fmt: skip
    if kind := schema.get("type"):
        assert isinstance(value, types[kind]), f"{where}: {value!r} is no {kind}"
        assert kind == "boolean" or not isinstance(value, bool), where
    if isinstance(value, (int, float)):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), f"{where}: {value}"
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)), where
        for number, item in enumerate(value):
            check(item, schema.get("items", {}), f"{where}[{number}]")
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= value.keys(), f"{where}: lacks {set(schema['required']) - set(value)}"
        own, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, item in value.items():
            assert key in own or rest is not False, f"{where}.{key} is not described"
            check(item, own.get(key, rest if isinstance(rest, dict) else {}), f"{where}.{key}")


def test_every_summary_is_what_its_schema_describes(many, tmp_path):
    check(many[1], SCHEMA)
    check(json.loads((many[2] / "summary.json").read_text()), SCHEMA)
    keyword = write_run(
        tmp_path / "kw", {"unsafe": ["harmful"], "safe": ["answered"]}, "keyword", frozenset({"refused", "harmful"})
    )
    check(report.report({"kw": keyword, "npo": many[0]["twice_1"]}, tmp_path / "out"), SCHEMA)
    for wrong in ({"schema_version": SCHEMA_VERSION + 1}, {"models": []}, {"suite": None}, {"more": 1}):
        with pytest.raises(AssertionError):
            check({**many[1], **wrong}, SCHEMA)


# ----------------------------------------------------------------------------------------- measures of forgetting


def mean(value: float) -> Measured:
    return {"mean": value, "ci95": [value / 2, value], "n": 40, "contents": 8}


def measured_as(probability: float, never: bool = True) -> ForgettingResult:
    own: Measures = {
        "probability": mean(probability), "extraction_strength": mean(0.214), "rouge_l": None, "without_wrong": 0,
        "truth_ratio": {**mean(1.2345), "ci95": None}, "closeness": mean(0.811), "paraphrased": 0,
    }  # fmt: skip
    area: Membership = {"auc": 0.777, "ci95": [0.6, 0.9], "members": 40, "others": 30}
    p: Difference = {"distance": 0.5, "p": 0.0625, "n": 40}
    return {
        "forget": own, "retain": None, "unseen": None, "membership": {"loss": area, "min_k": area} if never else None,
        "unseen_without_content": 0,
        "never": {"model_hash": "0", "forget": {**own, "probability": mean(0.018)},
                  "quality": {"answers": p, "contents": {**p, "p": 0.03, "n": 8}}} if never else None,
        "scoring": {"wrong": 3, "min_k": 0.2, "scored": {"forget": "0123456789"}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory) -> tuple[dict[str, Path], Summary, Path]:
    """Two runs whose forgetting was measured, one of them beside a model that never knew, and one that was not."""
    folder = tmp_path_factory.mktemp("forgetful")
    runs = {name: write_run(folder / name, {"unsafe": ["harmful"], "safe": ["correct"]}) for name in "abc"}
    for name, result in (("a", measured_as(0.136)), ("c", measured_as(0.998, never=False))):
        content = state.sealed("erasure", {"suite": "demo", "forgetting": result})
        (runs[name] / "evals/demo/erasure.json").write_text(content)
    return runs, report.report(runs, folder / "out"), folder / "out"


def test_measures_of_forgetting_are_in_the_summary_and_in_every_form_for_readers(forgetful):
    _, summary, out = forgetful
    assert summary["forgetting"] == {"a": measured_as(0.136), "c": measured_as(0.998, never=False)}
    check(json.loads((out / "summary.json").read_text()), SCHEMA)
    page, text = ((out / name).read_text() for name in ("index.html", "report.md"))
    printed = report.table(summary)
    assert max(map(len, printed.splitlines())) <= terminal.WIDTH
    for form in (page, text, printed):
        for cell in ("13.6 (6.8–13.6)", "99.8 (49.9–99.8)", "1.8 (0.9–1.8)", "77.7 (60.0–90.0)", "1.23"):
            assert cell in form
        assert form.count("0.062 (n = 40)") == form.count("0.030 (n = 8)") == 1
        assert "ROUGE-L of the model" not in form  # nobody measured it
        assert forgetting.TITLE in form


def test_a_report_of_runs_whose_forgetting_was_not_measured_does_not_mention_it(forgetful, tmp_path):
    runs, *_ = forgetful
    summary = report.report({"b": runs["b"]}, tmp_path / "out")
    assert "forgetting" not in summary
    for form in (*((tmp_path / "out" / n).read_text() for n in ("index.html", "report.md")), report.table(summary)):
        assert forgetting.TITLE not in form


def test_measures_of_forgetting_that_were_made_differently_carry_a_caution_in_every_form(tmp_path):
    first = measured_as(0.136)
    unlike: Scoring = {"wrong": 5, "min_k": 0.2, "scored": {"forget": "abcdef0123", "retain": "0"}}
    second: ForgettingResult = {**first, "scoring": unlike}
    assert forgetting.caution({"a": first, "b": {**first}}) == forgetting.caution({"b": second}) == ""
    earlier = {name: own for name, own in first.items() if name != "scoring"}
    assert "not recorded for b, measured by an earlier version" in forgetting.caution({"a": first, "b": earlier})
    other = {**first, "never": {**first["never"], "model_hash": "1"}}
    assert "they differ in the model that never knew (a: 0; b: 1)." in forgetting.caution({"a": first, "b": other})
    runs = {name: write_run(tmp_path / name, {"unsafe": ["harmful"], "safe": ["correct"]}) for name in "ab"}
    for name, result in (("a", first), ("b", second)):
        content = state.sealed("erasure", {"suite": "demo", "forgetting": result})
        (runs[name] / "evals/demo/erasure.json").write_text(content)
    summary = report.report(runs, tmp_path / "out")
    check(json.loads((tmp_path / "out/summary.json").read_text()), SCHEMA)
    words = (
        "The columns are not comparable: they differ in the number of wrong answers (a: 3; b: 5), in the forgotten "
        "answers, or the wrong ones beside them (a: 01234567; b: abcdef01)."
    )
    for form in (*((tmp_path / "out" / n).read_text() for n in ("index.html", "report.md")), report.table(summary)):
        assert words in " ".join(form.split())


def test_one_perturbation_as_a_test_of_erasure_is_in_the_summary_and_in_every_form_for_readers(tmp_path):
    def rates(k: int, contents: int) -> PerturbedRates:
        own: Leaf = {"rate": k / 24, "k": k, "n": 24, "ci95": [k / 48, 1.0]}
        none: Leaf = {"rate": 0.0, "k": 0, "n": 24, "ci95": [0.0, 0.4898]}
        return {"contents": contents, "clean": none, "noise": None, "perturbed": own}

    result: UniversalResult = {
        "epsilon": 16, "steps": 40, "fit": {"samples": 32, "contents": 4, "clean": 7.957, "loss": 0.0118},
        "held_out": rates(9, 4), "fitted": rates(21, 3), "without_picture": 0, "unperturbed": 5,
    }  # fmt: skip
    runs = {name: write_run(tmp_path / name, {"unsafe": ["harmful"], "safe": ["correct"]}) for name in "ab"}
    bare = report.report(runs, tmp_path / "out")
    forms = [*((tmp_path / "out" / name).read_text() for name in ("index.html", "report.md")), report.table(bare)]
    assert "universal" not in bare
    assert not any(perturbed.TITLE in form for form in forms)
    (runs["a"] / "evals/demo/erasure.json").write_text(state.sealed("erasure", {"suite": "demo", "universal": result}))
    summary = report.report(runs, tmp_path / "out")
    assert summary["universal"] == {"a": result}
    check(json.loads((tmp_path / "out/summary.json").read_text()), SCHEMA)
    for form in (*((tmp_path / "out" / n).read_text() for n in ("index.html", "report.md")), report.table(summary)):
        for cell in ("37.5 (9/24; 18.8–100.0)", "87.5 (21/24; 43.8–100.0)", "0.0 (0/24; 0.0–49.0)", "7.96 → 0.0118"):
            assert cell in form
        assert "± 16 of 255, 40 steps" in form
        assert "not perturbed" in form
        assert "without a picture" not in form  # every sample has one
        assert perturbed.TITLE in form


def test_a_p_that_is_too_small_for_a_number_is_not_shown_as_zero():
    assert [wording.p_value(p) for p in (0.0, 1e-310, 2e-300, 0.0004, 0.25)] == [
        "< 1e-300", "< 1e-300", "2e-300", "4e-4", "0.250"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "typed"),
    [(SCHEMA, Summary), *((SCHEMA["$defs"][name], own) for name, own in (
        ("method", Method), ("spread", Spread), ("budget", Budget), ("point", Point), ("paired", Paired),
        ("effect", Effect), ("defence", DefenceInfo), ("defended", Defended), ("measured", Measured),
        ("measures", Measures), ("membership", Membership), ("difference", Difference),
        ("forget_quality", ForgetQuality), ("never", Never), ("forgetting", ForgettingResult),
        ("scoring", Scoring), ("universal", UniversalResult), ("perturbed_rates", PerturbedRates),
        ("fit", FitSummary)))],
)  # fmt: skip
def test_the_schema_and_the_types_name_the_same_members(schema, typed):
    assert set(schema["properties"]) == set(typing.get_type_hints(typed))
    hints = typing.get_type_hints(typed, include_extras=True).items()
    assert set(schema["required"]) == {key for key, hint in hints if typing.get_origin(hint) is not typing.NotRequired}
    assert SCHEMA["properties"]["schema_version"] == {"const": SCHEMA_VERSION}


def test_a_summary_of_a_newer_version_is_refused_by_name_and_an_earlier_one_is_read(many, tmp_path):
    file = tmp_path / "summary.json"
    file.write_text((many[2] / "summary.json").read_text())
    assert report.read_summary(file) == many[1]
    earlier = {key: value for key, value in many[1].items() if key not in ("schema_version", *ADDED)}
    file.write_text(json.dumps(earlier))
    again = report.read_summary(file)
    assert [again[name] for name in ADDED] == [{}, [], []]
    for version in (SCHEMA_VERSION + 1, "1", True):
        file.write_text(json.dumps({**many[1], "schema_version": version}))
        with pytest.raises(ConfigError, match=r"summary.json: has schema_version .*; update mirage_dist, or make the"):
            report.read_summary(file)
    for content, words in (("{", "not JSON"), ("[]", "is no summary of a report"), ('{"models": 3}', "is no summary")):
        file.write_text(content)
        with pytest.raises(ConfigError, match=rf"summary.json: .*{words}|{words}"):
            report.read_summary(file)
    with pytest.raises(ConfigError, match=r"none.json"):
        report.read_summary(tmp_path / "none.json")


def test_pdfs_are_for_a_report_of_runs(capsys, tmp_path):
    assert main(["report", "--compare", str(tmp_path / "results.json"), "--pdf"]) == 2
    assert "--pdf: is for a report of runs" in capsys.readouterr().err
