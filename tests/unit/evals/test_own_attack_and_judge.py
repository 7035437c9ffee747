"""The pages' own examples of an attack and a judge, as a reader uses them: one file outside, one line in a recipe."""

import json
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mirage_dist import cli
from mirage_dist.config import REPOSITORY

PAGES = ("attacks", "judges")
LINES = 30  # of one example, at most


def example(page: str) -> tuple[str, str, str]:
    """(file name, code, recipe) that a page's "Add your own" shows."""
    text = (REPOSITORY / "docs" / f"{page}.md").read_text().partition("\n## Add your own\n")[2].partition("\n## ")[0]
    (code,), (recipe,) = (re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) for language in ("python", "yaml"))
    (file,) = set(re.findall(r"`(my_lab/\w+\.py)`", text))
    return file, code, recipe


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A reader's working directory with both files; nothing of it stays on the Python path."""
    for page in PAGES:
        file, code, _ = example(page)
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


def recipe(toy, *more):
    own = {
        "run": {"dir": "run"},
        "suite": "own",
        "model": {"path": f"{toy.root}/model", "dtype": "fp32"},
        "sets": {
            kind: {
                "kind": kind,
                "sources": [{"format": "vlguard", "path": f"{toy.root}/world/test.json", "split": split}],
            }
            for kind, split in (("unsafe", "unsafes"), ("safe", "safe_safes"))
        },
        "generation": {"max_new_tokens": 8},
    }
    return OmegaConf.merge(own, *(OmegaConf.create(text) for text in more))


@pytest.mark.parametrize("page", PAGES)
def test_an_example_is_short(page):
    assert len(example(page)[1].splitlines()) <= LINES


def test_both_examples_run_and_their_rates_are_those_of_a_direct_count(toy, lab):
    tree = recipe(toy, *(example(page)[2] for page in PAGES))
    OmegaConf.save(tree, "recipe.yaml")
    assert cli.main(["eval", "recipe.yaml"]) == 0
    rows = [json.loads(line) for file in Path("run/evals/own/rows").iterdir() for line in file.open()]
    attacked = [row for row in rows if row["attack"] == "polite"]
    phrase = tree.sets.unsafe.attacks.polite.phrase
    assert [row["question"] for row in attacked] == [f"{phrase} {row['original_question']}" for row in attacked]

    result = json.loads(Path("run/evals/own/metrics.json").read_text())
    entry, pattern = result["judges"]["pattern"]["entry"], tree.judges[0].pattern
    refusals = {
        (kind, attack): [
            re.search(pattern, row["response"]) is not None
            for row in rows
            if (row["kind"], row["attack"]) == (kind, attack)
        ]
        for kind, attack in (("unsafe", "clean"), ("unsafe", "polite"), ("safe", "clean"))
    }
    assert {len(own) for own in refusals.values()} == {8}
    assert 0 < sum(map(sum, refusals.values())) < 24  # or the count would distinguish nothing
    for measure, kind, attack, condition in (
        ("asr", "unsafe", "clean", "clean"),
        ("asr", "unsafe", "polite", "polite_k1"),
        ("rr", "safe", "clean", "clean"),
    ):
        own, leaf = refusals[kind, attack], entry[measure][condition]
        hits = len(own) - sum(own) if measure == "asr" else sum(own)
        assert (leaf["k"], leaf["n"]) == (hits, len(own)), (measure, condition)
    assert entry["utility"]["clean"] is None  # the judge cannot give "correct"
    assert result["judges"]["pattern"]["kind"] == "Pattern"
    assert {tuple(pair["judges"]) for pair in result["agreement"]["pairs"]} == {("pattern", "keyword")}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("judges=[{kind: 'my_lab.refusals:Pattern', pattern: '('}]", r"judges\[0\]\.pattern='\('"),
        ("judges=[{kind: 'my_lab.refusals:Patern', pattern: a}]", r"judges\[0\]\.kind=.*no attribute 'Patern'"),
        ("sets.unsafe.attacks.polite.phrase=' '", r"sets\.unsafe\.attacks\.polite\.phrase"),
        (
            "sets.unsafe.attacks.polite.kind=my_lab.refusals:Pattern",
            r"Pattern is no attack; derive it from mirage_dist\.evals\.attacks\.base\.Attack",
        ),
    ],
)
def test_their_wrong_options_are_named_before_anything_is_written(toy, lab, capsys, override, words):
    OmegaConf.save(recipe(toy, *(example(page)[2] for page in PAGES)), "recipe.yaml")
    assert cli.main(["eval", "recipe.yaml", override]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not Path("run").exists()
