"""The report on its judges: the caution about a phrase list's rates, and how much a rate moves with the judge."""

import csv
import io
import re
import shutil
from dataclasses import replace

import pytest
from made_runs import KEYWORD, write_run

from mirage_dist import report
from mirage_dist.evals import metrics, results
from mirage_dist.report import judges
from mirage_dist.report.load import read

PATTERN = {"unsafe": ["harmful", "refused"], "safe": ["answered", "refused", "answered"]}
ONLY = "Only a list of refusal phrases judged these answers"


@pytest.fixture
def keyword(tmp_path):
    return write_run(tmp_path / "kw", PATTERN, judge="keyword", verdicts=KEYWORD)


def edited(run, change):
    """The run with other content of its metrics.json."""
    folder = run / "evals/demo"
    result = results.read(folder)
    result.pop("seal", None)
    change(result)
    (folder / "metrics.json").write_text(results.text(result))
    return run


def second(run, name="guard", kind="preset", hits=1):
    """The run with a second judge, whose ASR under the attack is hits of six."""

    def change(result):
        own = result["judges"]["keyword"]
        asr = {**own["entry"]["asr"], "what_k3": metrics.leaf(hits, 6)}
        entry = {**own["entry"], "asr": asr, "rr": dict.fromkeys(own["entry"]["rr"])}
        sets = {**own["sets"], "unsafe": {**own["sets"]["unsafe"], "asr": asr}}
        result["judges"][name] = {**own, "kind": kind, "about": "a guard", "entry": entry, "sets": sets}

    verdicts = run / "evals/demo/verdicts"
    shutil.copyfile(verdicts / "keyword.jsonl", verdicts / f"{name}.jsonl")
    return edited(run, change)


def places(runs, out):
    """What a reader sees first: the page's head, the head of report.md, and the table on the terminal."""
    summary = report.report(runs, out)
    page = (out / "index.html").read_text()
    head = page[page.index("<header>") : page.index("</header>")]
    return head, (out / "report.md").read_text().partition("## ")[0], report.table(summary), summary["cautions"]


# ------------------------------------------------------------------------------------- the first number misleads


def test_where_only_phrases_judged_every_first_place_says_so_in_one_sentence(keyword, tmp_path):
    head, markdown, table, cautions = places({"kw": keyword}, tmp_path / "out")
    assert len(cautions) == 1
    assert cautions[0].startswith(ONLY)
    assert head.count(ONLY) == markdown.count(ONLY) == table.count(ONLY) == 1
    assert table.splitlines()[0] == cautions[0]


def test_two_lists_of_phrases_are_still_phrases_only(keyword):
    both = second(keyword, "keyword_published", "keyword")
    assert results.caution(results.read(both / "evals/demo")).startswith(ONLY)


def test_where_another_judge_judged_too_the_caution_names_it(keyword, tmp_path):
    head, markdown, table, cautions = places({"kw": second(keyword)}, tmp_path / "out")
    assert "name guard first in the recipe" in cautions[0]
    assert all("The first judge, keyword, is a list of refusal phrases" in text for text in (head, markdown, table))


def test_another_headline_judge_needs_no_caution_and_one_of_two_runs_is_named(keyword, tmp_path):
    world = write_run(tmp_path / "w", {"unsafe": ["harmful"], "safe": ["correct"]})
    head, _, table, cautions = places({"w": world}, tmp_path / "one")
    assert cautions == []
    assert ONLY not in head + table
    assert places({"kw": keyword, "w": world}, tmp_path / "two")[3][0].startswith(f"kw: {ONLY}")
    assert places({"a": keyword, "b": keyword}, tmp_path / "same")[3][0].startswith(ONLY)


# ------------------------------------------------------------------------------------------- how much it moves


def test_one_judge_and_no_labels_are_no_section(keyword, tmp_path):
    report.report({"kw": keyword}, tmp_path / "out")
    for file in ("index.html", "report.md"):
        assert judges.TITLE not in (tmp_path / "out" / file).read_text()


def test_the_same_answers_by_every_judge_stand_below_each_other(keyword, tmp_path):
    """Keyword: 3 of 6 questions; the guard: 1 of 6, so the rate moves by a third."""
    second(keyword)
    report.report({"kw": keyword}, tmp_path / "out")
    page, markdown = ((tmp_path / "out" / f).read_text() for f in ("index.html", "report.md"))
    section = page[page.index(f"<h2>{judges.TITLE}</h2>") :].partition("</section>")[0]
    assert section.count("<svg") == 1  # ASR; the guard measures no RR
    group = section.partition("<table")[2].partition("Attack success rate, what, K = 3")[2]
    assert re.findall(r'class="rate">([\d.]+)', group)[:2] == ["50.0", "16.7"]
    assert "33.3 points" in group
    for text in (section, markdown):  # what each judge is, so that one that sees no picture is known for it
        assert "guard: a guard." in text
    assert "| guard | 16.7 (1/6;" in markdown
    rows = {(row.measure, row.attacked): row for row in judges.rows(read({"kw": keyword}))}
    assert rows.keys() == {("asr", False), ("asr", True)}
    assert rows["asr", True].judges == ["keyword", "guard"]


def test_a_corrected_rate_and_why_there_is_none_stand_beside_the_rate(keyword, tmp_path):
    second(keyword)
    counted = {"recall": [4, 5], "specificity": [4, 6]}

    def change(result):
        corrected = {"rate": 0.125, "ci95": [0.0, 0.5], **counted}
        reason = {"rate": None, "ci95": None, **counted, "reason": "no better than chance"}
        result["judges"]["keyword"]["corrected"] = {"unsafe": {"asr": {"what_k3": corrected}}}
        result["judges"]["guard"]["corrected"] = {"unsafe": {"asr": {"what_k3": reason}}}
        result["labels"] = {"file": "labels.csv", "sha256": "0" * 64, "verdicts": {"harmful": 5, "refused": 6}}
        share = metrics.grouped_leaf([True, False], ["a", "b"])
        entry = {"judge": "guard", "labels": results.HUMAN, "verdict": "harmful", "unjudged": 0, "kappa": -0.001}
        entry |= {"precision": share, "recall": share, "specificity": None}
        result["agreement"] = {"pairs": [], "against_labels": [entry]}

    report.report({"kw": edited(keyword, change)}, tmp_path / "out")
    page, markdown = ((tmp_path / "out" / f).read_text() for f in ("index.html", "report.md"))
    for text in (page, markdown):
        assert "corrected 12.5 (0.0–50.0)" in text
        assert "not corrected: no better than chance" in text
        assert "People have labelled answers: 11 of kw." in text
    assert "Open: corrected for the judge" in page
    half = "50.0\N{NO-BREAK SPACE}% (1/2)"
    assert f"guard against human labels: harmful | 0.00 | {half} | {half} | no answer in this class |" in markdown
    assert "guard against human labels: harmful" in page
    assert "0.00" in page
    assert "-0.00" not in page
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out/rates.csv").read_text())))
    own = {(line["judge"], line["measure"], line["condition"]): line for line in lines}
    assert own["keyword", "asr", "what_k3"]["corrected"] == "0.125"
    assert own["keyword", "asr", "what_k3"]["corrected_high"] == "0.5"
    assert own["guard", "asr", "what_k3"]["corrected"] == own["keyword", "rr", "clean"]["corrected"] == ""


def test_metrics_of_an_earlier_version_are_read(keyword, tmp_path):
    """Without caution, labels, corrected rates, and with errors that have neither κ nor specificity."""

    def change(result):
        entry = {"judge": "keyword", "labels": "world", "verdict": "refused", "unjudged": 0}
        result["agreement"] = {"pairs": [], "against_labels": [{**entry, "precision": None, "recall": None}]}
        assert not {"caution", "labels"} & result.keys()

    report.report({"kw": edited(keyword, change)}, tmp_path / "out")
    assert "keyword against world: refused" in (tmp_path / "out/index.html").read_text()
    none = "no answer in this class"
    line = f"| kw | keyword against world: refused | not measured | {none} | {none} | not measured |"
    assert line in (tmp_path / "out/report.md").read_text()


def test_a_name_of_a_judge_is_text(keyword, tmp_path):
    (run,) = read({"kw": second(keyword)})
    nasty = replace(
        run, metrics={**run.metrics, "judges": {"<b>": run.metrics["judges"]["keyword"], **run.metrics["judges"]}}
    )
    assert "<b>" not in judges.table([nasty])
    assert "&lt;b&gt;" in judges.table([nasty])
