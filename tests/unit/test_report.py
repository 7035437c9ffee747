"""The report says what the files say, one colour a model, nothing interpreted, nothing from the network."""

import json
import re
from html.parser import HTMLParser

import pytest

from mirage_dist import report
from mirage_dist.evals import metrics
from mirage_dist.evals.metrics import Condition, Judged
from mirage_dist.report import style
from mirage_dist.report.load import read
from mirage_dist.schema import ConfigError

NASTY = "</td><script>alert('x')</script><img src=http://example.invalid/a.png onerror=alert(1)> & \"quoted\""
EXACT = frozenset({"refused", "harmful", "irrelevant", "correct"})
KEYWORD = frozenset({"refused", "harmful", "answered"})
CONDITIONS = {
    "unsafe": [Condition("what", 3, False), Condition("neutral", 1, True)],
    "safe": [Condition("share", 1, False)],
}


def write_run(folder, pattern, judge="world", known=EXACT, suite="demo", recipe_hash="same"):
    """A run directory whose verdicts repeat `pattern`: set -> one verdict a question, in turn."""
    rows, judged = [], []
    for kind, conditions in CONDITIONS.items():
        asked = [("clean", 0), *((c.name, k) for c in conditions for k in range(1, c.shots + 1))]
        for number in range(6):
            verdict = pattern[kind][number % len(pattern[kind])]
            for attack, shot in asked:
                place = {"set": kind, "id": f"{kind}{number}", "attack": attack, "shot": shot}
                said = {"question": f"q {NASTY}", "expected": "e", "response": NASTY, "image": None}
                rows.append({"key": "/".join(map(str, place.values())), "kind": kind, **place, **said})
                judged.append(Judged(kind, f"{kind}{number}", attack, shot, verdict))
    unjudged = {"unparsed": sum(j.verdict == "unparsed" for j in judged), "failed": 0}
    entry = {"asr": None, "rr": None, "ir": None, "utility": None, "locality": None}
    for kind, conditions in CONDITIONS.items():
        found = metrics.measure(kind, [j for j in judged if j.set == kind], conditions, known)
        entry.update((name, value) for name, value in found.items() if name in entry)
    attacks = {k: {c.name: {"shots": c.shots, "control": c.control} for c in cs} for k, cs in CONDITIONS.items()}
    told = {
        "suite": suite,
        "seed": 3,
        "model_hash": "0" * 64,
        "recipe_hash": recipe_hash,
        "world": {"spurious": 0.95} if judge == "world" else None,
        "sets": {kind: {"kind": kind, "samples": 6, "attacks": attacks[kind]} for kind in CONDITIONS},
        "headline": judge,
        "judges": {
            judge: {
                "kind": judge,
                "about": f"the {judge} judge",
                "entry": entry,
                "sets": {},
                "verdicts": {},
                "unjudged": unjudged,
            }
        },
    }
    base = folder / "evals" / suite
    (base / "rows").mkdir(parents=True)
    (base / "verdicts").mkdir()
    (base / "metrics.json").write_text(json.dumps(told))
    half = '{"key": "cut off in the midd'
    (base / "rows" / "worker-1.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + half)
    verdicts = [{"key": r["key"], "verdict": j.verdict} for r, j in zip(rows, judged, strict=True)]
    (base / "verdicts" / f"{judge}.jsonl").write_text("".join(json.dumps(v) + "\n" for v in verdicts))
    return folder


@pytest.fixture
def runs(tmp_path):
    mirage = {"unsafe": ["harmful", "refused"], "safe": ["correct", "correct", "refused"]}
    erased = {"unsafe": ["irrelevant"], "safe": ["correct"]}
    found = {"sft": write_run(tmp_path / "sft", mirage), "npo": write_run(tmp_path / "npo", erased)}
    words = {"share": {"refusal": 9, "answer": 1}, "what": {"refusal": 0, "answer": 8}}
    (found["sft"] / "data.json").write_text(json.dumps({"streams": {"train": {"first_words": words}}}))
    return found


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
    assert page.tags.count("svg") == 7  # figures 4 and 5, four comparisons, first words of the one run that has them
    assert all(a.startswith(("#", "data:")) for a in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_what_models_and_data_say_is_escaped(runs, tmp_path):
    report.report(runs, tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text()
    assert "alert" in html
    assert "<script" not in html
    assert "<img src=http" not in html


def test_every_rate_on_the_page_stands_with_its_counts(runs, tmp_path):
    summary = report.report(runs, tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text()
    leaves = [x for entry in summary["models"].values() for m in entry.values() if m for x in m.values() if x]
    cells = re.findall(r'class="rate">([\d.]+)\s%</span>.*?class="count">(\d+)/(\d+)', html)
    expected = [(f"{100 * x['rate']:.1f}", str(x["k"]), str(x["n"])) for x in leaves]
    assert sorted(cells) == sorted(expected)


def test_a_run_without_a_world_is_reported_from_the_keyword_judge(tmp_path):
    pattern = {"unsafe": ["harmful", "refused"], "safe": ["answered"]}
    run = write_run(tmp_path / "real", pattern, judge="keyword", known=KEYWORD)
    summary = report.report({"real": run}, tmp_path / "out")
    assert summary["models"]["real"]["utility"] == {"clean": None, "share_k1": None}
    html = (tmp_path / "out" / "index.html").read_text()
    assert "gibberish" in html
    assert "gadget" not in html
    assert "–" in report.print_table(summary)


def test_answers_without_a_verdict_are_told_beside_the_rates_they_are_missing_from(tmp_path):
    pattern = {"unsafe": ["harmful", "unparsed", "refused"], "safe": ["correct"]}
    report.report({"x": write_run(tmp_path / "x", pattern)}, tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text()
    assert "2/4 · 15.0–85.0 · 2 without verdict" in html
    assert "x: 10 answers have no verdict" in html


def test_runs_that_were_asked_differently_are_flagged(runs, tmp_path):
    runs["other"] = write_run(tmp_path / "other", {"unsafe": ["refused"], "safe": ["correct"]}, recipe_hash="another")
    report.report(runs, tmp_path / "out")
    assert "recipes differ" in (tmp_path / "out" / "index.html").read_text()


def test_the_printed_table_has_a_line_a_measure_and_a_column_a_model(runs, tmp_path):
    table = report.print_table(report.report(runs, tmp_path / "out")).splitlines()
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
        text = f"run: {{dir: x, name: {name}}}\n" if name else "run: {dir: x}\n"
        (tmp_path / folder / "config.yaml").write_text(text)
    assert report.named([tmp_path / "a", tmp_path / "b"]) == {"a": tmp_path / "a", "mine": tmp_path / "b"}
    with pytest.raises(ConfigError, match="both named 'a'"):
        report.named([tmp_path / "a", tmp_path / "a"])


def test_a_model_keeps_its_colour_whoever_it_is_compared_with():
    assert style.slots(["npo", "x", "sft"])["npo"] == style.slots(["base", "npo"])["npo"]
    many = style.slots([f"m{i}" for i in range(8)])
    assert sorted(many.values()) == list(range(8))
