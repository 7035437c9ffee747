"""The report says what the files say, one colour a model, nothing interpreted, nothing from the network."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
from made_runs import KEYWORD, NASTY, write_run
from PIL import Image

from mirage_dist import config as configs
from mirage_dist import report, state
from mirage_dist.evals import metrics, results
from mirage_dist.report import examples
from mirage_dist.report import text as captions
from mirage_dist.report.figures import drawing, style
from mirage_dist.report.load import read, row_label
from mirage_dist.schema import ConfigError, TrainRecipe


@pytest.fixture
def runs(tmp_path):
    mirage = {"unsafe": ["harmful", "refused"], "safe": ["correct", "correct", "refused"]}
    erased = {"unsafe": ["irrelevant"], "safe": ["correct"]}
    written = {"sft": write_run(tmp_path / "sft", mirage), "npo": write_run(tmp_path / "npo", erased)}
    words = {"share": {"refusal": 9, "answer": 1}, "what": {"refusal": 0, "answer": 8}}
    (written["sft"] / "data.json").write_text(state.sealed("data", {"streams": {"train": {"first_words": words}}}))
    return written


class Page(HTMLParser):
    """Tags, addresses and open tags of a page."""

    VOID = ("meta", "img", "br", "path", "use")

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.stack, self.ids = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.addresses += [given[a] for a in ("src", "href", "xlink:href") if given.get(a)]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()


def test_the_summary_is_the_runs_own_leaves(runs, tmp_path):
    summary = report.report(runs, tmp_path / "out", {"wall_seconds": 12.5, "config_hash": "abc"})
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert {"models", "seed", "world", "wall_seconds", "config_hash"} <= set(summary)
    sft = summary["models"]["sft"]
    assert sft["asr"]["what_k3"] == metrics.leaf(3, 6)
    assert sft["ir"]["what_k3"] == metrics.clustered_leaf([(0, 3)] * 6)
    assert summary["models"]["npo"]["ir"]["clean"] == metrics.clustered_leaf([(1, 1)] * 6)
    assert (summary["seed"], summary["wall_seconds"]) == (3, 12.5)


def test_the_page_is_well_formed_and_needs_no_network(runs, tmp_path):
    report.report(runs, tmp_path / "out")
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert page.stack == []
    # Figures 1a, 1b, 4, 5; 1d, kinds of answer, IR, utility; 3 and 1c of the one run that has words; two heat maps.
    assert page.tags.count("svg") == 12
    assert all(a.startswith(("#", "data:")) for a in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert not {"link", "iframe"} & set(page.tags)
    assert page.tags.count("script") == 2  # the data, and the one that the page's policy names by its hash


def test_text_from_models_and_data_is_escaped(runs, tmp_path):
    report.report(runs, tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text()
    assert "alert" in html
    assert "<script>alert" not in html
    assert "<img src=http" not in html


def test_data_in_the_script_element_come_back_as_they_were_and_cannot_end_it():
    data = {"response": f"{NASTY} </script> <!-- \u2028 é"}
    text = examples.as_script(data)
    assert json.loads(text) == data
    assert not set("<>&\u2028") & set(text)


def test_answers_to_real_data_are_in_the_file_only_on_request(tmp_path):
    pattern = {"unsafe": ["harmful", "refused"], "safe": ["answered"]}
    run = {"real": write_run(tmp_path / "real", pattern, judge="keyword", verdicts=KEYWORD)}
    for outputs in (False, True):
        report.report(run, tmp_path / "out", outputs=outputs)
        files = list((tmp_path / "out").iterdir())
        assert any("response-0" in file.read_text() for file in files) == outputs
        assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    benign = {"world": write_run(tmp_path / "world", {"unsafe": ["refused"], "safe": ["correct"]})}
    report.report(benign, tmp_path / "out")
    assert "response-0" in (tmp_path / "out" / "index.html").read_text()


def test_every_two_runs_are_compared_on_the_questions_they_share(runs, tmp_path):
    comparisons = report.report(runs, tmp_path / "out")["comparisons"]
    attacked = next(c for c in comparisons if (c["measure"], c["condition"]) == ("asr", "what_k3"))
    # sft answers every other of six questions harmfully, npo none: three discordant pairs, p = 2 / 2 ** 3.
    assert (attacked["runs"], attacked["n"], attacked["only_before"], attacked["only_after"]) == (
        ["sft", "npo"],
        6,
        3,
        0,
    )
    assert attacked["p"] == pytest.approx(0.25)
    assert attacked["p_holm"] == pytest.approx(min(1, 0.25 * len(comparisons)))
    assert {(c["measure"], c["condition"]) for c in comparisons} == {
        *(("asr", c) for c in ("clean", "what_k3")),
        *((measure, c) for measure in ("rr", "utility") for c in ("clean", "share_k1")),
    }


def test_runs_with_different_headline_judges_are_not_compared(runs, tmp_path):
    pattern = {"unsafe": ["harmful", "refused"], "safe": ["answered"]}
    runs["other"] = write_run(tmp_path / "other", pattern, judge="keyword", verdicts=KEYWORD)
    comparisons = report.report(runs, tmp_path / "out")["comparisons"]
    assert {tuple(c["runs"]) for c in comparisons} == {("sft", "npo")}


def test_no_cell_of_the_csv_is_a_formula(tmp_path):
    pattern = {"unsafe": ["harmful"], "safe": ["correct"]}
    summary = report.report({"=cmd|' /C calc'!A0": write_run(tmp_path / "x", pattern)}, tmp_path / "out")
    with (tmp_path / "out" / "rates.csv").open(newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert not any(cell.startswith(("=", "+", "-", "@")) for line in lines for cell in line.values())
    clean = next(x for x in lines if (x["measure"], x["condition"]) == ("asr", "clean"))
    leaf = next(iter(summary["models"].values()))["asr"]["clean"]
    assert [float(clean[name]) for name in ("rate", "k", "n")] == [leaf[name] for name in ("rate", "k", "n")]


def test_the_markdown_has_every_rate_and_no_markup_of_others(runs, tmp_path):
    runs["<b>*x*|y"] = write_run(tmp_path / "other", {"unsafe": ["harmful"], "safe": ["correct"]})
    summary = report.report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    leaf = summary["models"]["sft"]["asr"]["what_k3"]
    assert f"{100 * leaf['rate']:.1f} ({leaf['k']}/{leaf['n']};" in text
    assert r"\<b\>\*x\*\|y" in text
    assert NASTY not in text


def test_every_rate_on_the_page_stands_with_its_counts(runs, tmp_path):
    summary = report.report(runs, tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text()
    leaves = [x for entry in summary["models"].values() for m in entry.values() if m for x in m.values() if x]
    table = html[html.index('class="rates all"') :]
    cells = re.findall(r'class="rate">([\d.]+)\s%</span>.*?class="count">(\d+)/(\d+)', table)
    expected = [(f"{100 * x['rate']:.1f}", str(x["k"]), str(x["n"])) for x in leaves]
    assert sorted(cells) == sorted(expected)


def test_a_run_without_a_world_is_reported_from_the_keyword_judge(tmp_path):
    pattern = {"unsafe": ["harmful", "refused"], "safe": ["answered"]}
    run = write_run(tmp_path / "real", pattern, judge="keyword", verdicts=KEYWORD)
    summary = report.report({"real": run}, tmp_path / "out")
    assert summary["models"]["real"]["utility"] == {"clean": None, "share_k1": None}
    html = (tmp_path / "out" / "index.html").read_text()
    assert "gibberish" in html
    assert "gadget" not in html
    assert "–" in report.table(summary)


def test_answers_without_a_verdict_are_shown_beside_the_rates_that_lack_them(tmp_path):
    pattern = {"unsafe": ["harmful", "unparsed", "refused"], "safe": ["correct"]}
    report.report({"x": write_run(tmp_path / "x", pattern)}, tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text()
    assert "2/4 · 15.0–85.0 · 2 without verdict" in html
    assert "x: 10 answers have no verdict" in html


def test_runs_with_different_recipes_are_flagged(runs, tmp_path):
    runs["other"] = write_run(tmp_path / "other", {"unsafe": ["refused"], "safe": ["correct"]}, recipe_hash="another")
    report.report(runs, tmp_path / "out")
    assert "recipes differ" in (tmp_path / "out" / "index.html").read_text()


def test_results_of_erasure_under_their_old_name_are_reported_as_outdated(runs, tmp_path, capsys):
    (runs["sft"] / "evals/demo/robustness.json").write_text("{}")
    for tested in (False, True):
        if tested:  # of a new run of the tests
            (runs["sft"] / "evals/demo/erasure.json").write_text(state.sealed("erasure", {"suite": "demo"}))
        report.report(runs, tmp_path / "out")
        for name in ("index.html", "report.md"):
            assert ("mirage erasure" in (tmp_path / "out" / name).read_text()) != tested
        assert ("mirage erasure" in capsys.readouterr().err) != tested


def test_the_printed_table_has_a_line_a_measure_and_a_column_a_model(runs, tmp_path):
    table = report.table(report.report(runs, tmp_path / "out")).splitlines()
    assert table[0].split() == ["sft", "npo"]
    assert any(re.fullmatch(r" +what, K = 3 +50\.0 3/6 +0\.0 0/6", line) for line in table)


def test_the_overview_is_a_picture(runs, tmp_path):
    report.overview(runs, tmp_path / "docs" / "overview.png")
    assert (tmp_path / "docs" / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="mirage eval"):
        read({"empty": tmp_path})
    with pytest.raises(ConfigError, match="not evaluated on suite 'dem'; did you mean 'demo'"):
        read(runs, "dem")
    write_run(runs["sft"], {"unsafe": ["refused"], "safe": ["correct"]}, suite="second")
    assert read(runs)[0].suite == "demo"  # the only one they share
    write_run(runs["npo"], {"unsafe": ["refused"], "safe": ["correct"]}, suite="second")
    with pytest.raises(ConfigError, match="share 2 suites"):
        read(runs)


def test_runs_are_named_by_their_recipe_or_their_folder(tmp_path):
    for folder, name in (("a", None), ("b", "mine")):
        (tmp_path / folder).mkdir()
        words = ["run.dir=x", f"run.name={name or 'null'}"]
        recipe = configs.load("configs/train/demo_sft.yaml", words, TrainRecipe)
        configs.write_yaml(recipe, tmp_path / folder / "config.yaml")
    assert report.named([tmp_path / "a", tmp_path / "b"]) == {"a": tmp_path / "a", "mine": tmp_path / "b"}
    with pytest.raises(ConfigError, match="both named 'a'"):
        report.named([tmp_path / "a", tmp_path / "a"])


def test_a_model_keeps_its_colour_whoever_it_is_compared_with():
    assert style.slots(["npo", "x", "sft"])["npo"] == style.slots(["base", "npo"])["npo"]
    many = style.slots([f"m{i}" for i in range(8)])
    assert sorted(many.values()) == list(range(8))
    names = ["base", "npo", "rmu", *(f"m{i}" for i in range(15))]
    looks = drawing.looks_of(names, style.LIGHT)
    assert len(set(looks.values())) == len(names)  # more than there are colours
    assert looks["npo"] == drawing.looks_of(["npo"], style.LIGHT)["npo"]


def test_a_suite_of_benchmarks_alone_is_reported_by_its_accuracies(tmp_path):
    run = write_run(tmp_path / "x", {"unsafe": ["refused"], "safe": ["answered"]}, judge="keyword", verdicts=KEYWORD)
    file = run / "evals/demo/metrics.json"
    metrics = results.read(file.parent)
    leaf = {"rate": 0.615, "k": 3.69, "n": 6, "ci95": [0.3, 0.85]}
    nothing = dict.fromkeys(("asr", "rr", "ir", "utility", "locality"))
    metrics["judges"]["keyword"]["entry"] = {**nothing, "accuracy": {"vqav2": leaf}}
    metrics["sets"] = {"vqav2": {"kind": "utility", "samples": 6, "attacks": {}}}
    file.write_text(results.text(metrics))
    table = report.table(report.report({"x": run}, tmp_path / "out"))
    assert re.search(r"Accuracy +vqav2 +61\.5 3\.69/6", table)
    html = (tmp_path / "out" / "index.html").read_text()
    assert "Accuracy, vqav2" in html
    assert "3.69/6 · 30.0–85.0" in html


@pytest.mark.parametrize(
    ("measure", "key", "label"),
    [
        ("asr", "clean", "clean"),
        ("asr", "what_k3", "what, K = 3"),
        ("rr", "ask_kindly_k12", "ask_kindly, K = 12"),
        ("accuracy", "my_kit_k2", "my_kit_k2"),  # a benchmark's set may be named so
    ],
)
def test_a_rate_is_named_by_its_condition_and_an_accuracy_by_its_benchmark(measure, key, label):
    assert row_label(measure, key) == label


@pytest.mark.parametrize("measured", [False, True])
def test_questions_without_a_measurable_first_word_are_no_evidence_of_evenness(runs, measured):
    words = {
        "(not measured)": {"refusal": 9, "answer": 9},
        **({"what": {"refusal": 9, "answer": 9}} if measured else {}),
    }
    (runs["sft"] / "data.json").write_text(state.sealed("data", {"streams": {"train": {"first_words": words}}}))
    _, caption = captions.words(read({"sft": runs["sft"]})[0])
    assert f"18 of {36 if measured else 18} questions are in scripts without spaces between words" in caption
    assert ("equally often" in caption) is measured


def test_only_pictures_of_the_world_that_was_asked_about_get_into_the_page(tmp_path, capsys):
    """Not any file that a row names, nor a text file or a link inside the world's folder; one warning for all these.

    Of an attack on pixels it is the picture before it, and the page says so.
    """
    run = write_run(tmp_path / "run", {"unsafe": ["refused"], "safe": ["correct"]})
    (tmp_path / "world").mkdir()
    for file in ("world/own.png", "private.png"):
        Image.new("RGB", (3, 2), "red").save(tmp_path / file)
    (tmp_path / "world/notes.png").write_text("root:x:0:0")
    (tmp_path / "world/link.png").symlink_to(tmp_path / "private.png")
    names = ["own.png", "../private.png", "notes.png", "link.png", "missing.png"]
    rows = run / "evals/demo/rows/worker-1.jsonl"
    lines = rows.read_text().splitlines()
    own, changed = json.loads(lines[0]), set()
    for number, line in enumerate(lines[:-1]):
        row = {**state.parse("row", line.encode(), rows), "image": f"{tmp_path}/world/{names[number % len(names)]}"}
        if number % 2:
            row |= {"image": f"{tmp_path}/run/evals/demo/pictures/{number}.png", "original_image": row["image"]}
            changed.add((row["id"], row["attack"], row["shot"]))
        lines[number] = state.sealed("row", row)
    rows.write_text("".join(lines))
    (loaded,) = read({"run": run})
    data = examples.gather([loaded], 6, outputs=False)
    (picture,) = data["pictures"]
    with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as embedded:
        assert (embedded.size, embedded.convert("RGB").getpixel((0, 0))) == ((3, 2), (255, 0, 0))
    shown = {q["id"] + q["attack"] + str(q["shot"]) for q in data["questions"] if q["picture"] == 0}
    assert 0 < len(shown) < len(data["questions"])
    assert {(q["id"], q["attack"], q["shot"]) for q in data["questions"] if q["pixels"]} == changed
    assert own["id"] + own["attack"] + str(own["shot"]) in shown
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if "left out of the page" in line)
    assert re.search(
        r"examples: 4 pictures left out of the page; .*private\.png: lies outside the world's folder", warning
    )


def test_a_further_set_has_its_measures_name_and_its_own():
    assert captions.meaning("asr_held_out") == (
        "Attack success rate, held_out",
        "harmful answers to unsafe questions, set held_out",
    )
    assert captions.meaning("rr")[0] == "Rejection rate"
    entry = dict.fromkeys(("asr", "rr", "ir", "utility", "locality", "asr_held_out", "ir_held_out", "rr_text", "asr_b"))
    assert [results.further(entry, measure) for measure in ("asr", "ir", "rr", "utility")] == [
        ["held_out", "b"],
        ["held_out"],
        ["text"],
        [],
    ]
