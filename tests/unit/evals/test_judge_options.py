"""A recipe's judges: wrong options are named early, keys are never repeated, judges from outside the package work."""

import importlib
import json
from dataclasses import replace

import pytest

from mirage_dist import cli
from mirage_dist import config as configs
from mirage_dist.evals import judges
from mirage_dist.evals.judges import cache, parity
from mirage_dist.schema import ConfigError, EvalRecipe, RunError


def recipe(tmp_path, *overrides):
    own = [f"run.dir={tmp_path}", "model.path=x", *overrides]
    return configs.load("configs/eval/vlguard.yaml", own, EvalRecipe)


def test_a_bare_word_is_a_kind_and_each_judge_keeps_its_name(tmp_path):
    options = recipe(tmp_path, "judges=[keyword,{kind: keyword, phrases: published}]")
    assert [(j.name, j.kind) for j in judges.panel(options)] == [
        ("keyword", "keyword"),
        ("keyword_published", "keyword"),
    ]
    configs.write_yaml(options, tmp_path / "config.yaml")
    assert configs.load(tmp_path / "config.yaml", [], EvalRecipe) == options


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("keywrd", "one of keyword, world, vlm"),
        ("{kind: vlm}", "either path"),
        ("{kind: vlm, path: x, url: 'http://h/v1'}", "either path"),
        ("{kind: vlm, url: 'ftp://h/v1', model: m}", "url: expected an address"),
        ("{kind: vlm, url: 'http://h/v1'}", "model: an endpoint needs"),
        ("{kind: keyword, path: x}", r"unknown key 'judges\[0\]\.path'"),
        ("{kind: vlm, path: nowhere}", "no such directory"),
        ("{kind: keyword, name: a/b}", "expected a name: 1 to 80 of A-Z"),
        ("world", "needs the `world` section"),
    ],
)
def test_a_wrong_judge_is_named(tmp_path, judge, words):
    with pytest.raises(ConfigError, match=words):
        judges.panel(recipe(tmp_path, f"judges=[{judge}]"))


def test_a_wrong_option_is_an_error_before_the_embedded_world_is_made(tmp_path, capsys):
    wrong = [f"world.dir={tmp_path}/world", f"run.dir={tmp_path}/run", "judges=[world, {kind: keyword, phrase: ours}]"]
    assert cli.main(["eval", "configs/eval/demo.yaml", *wrong]) == 2
    assert "unknown key 'judges[1].phrase'; did you mean 'phrases'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_judges_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"judges\[0\] and judges\[1\] are both named 'keyword'"):
        judges.panel(recipe(tmp_path, "judges=[keyword,{kind: keyword, phrases: published, name: keyword}]"))
    with pytest.raises(ConfigError, match=r"judges\[1\] and judges\[2\] are both named 'keyword'"):
        judges.panel(recipe(tmp_path, "judges=[world,keyword,keyword]"))


@pytest.mark.parametrize("kind", judges.REGISTRY)
def test_metrics_name_a_judge_by_the_word_that_recipes_use(kind):
    assert judges.REGISTRY.load(kind, "r", "k").kind == kind


# --------------------------------------------------------------------------------- judges from outside

OUTSIDE = """
from dataclasses import dataclass

from mirage_dist.evals.judges import Judge


@dataclass(frozen=True, kw_only=True)
class Short(Judge):
    verdicts = frozenset({"refused", "harmful"})

    words: int

    def verdict(self, row):
        return "refused" if len(row["response"].split()) < self.words else "harmful"


class Alien:
    pass
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Write a module of judges and make it from options; each call gets a module of its own."""
    monkeypatch.syspath_prepend(tmp_path)

    def made(text, judge="Short", **options):
        module = f"outside_{len(list(tmp_path.glob('outside_*.py')))}_{tmp_path.name}"
        (tmp_path / f"{module}.py").write_text(text)
        importlib.invalidate_caches()
        return judges.make({"kind": f"{module}:{judge}", **options}, "r", "judges[0]")

    return made


def test_the_rules_of_a_judge_from_outside_are_its_source_and_its_options_without_its_name(outside):
    plain = outside(OUTSIDE, words=3)
    assert (plain.name, plain.kind) == ("Short", "Short")
    assert outside(OUTSIDE, words=3, name="other").fingerprint == plain.fingerprint
    others = [outside(OUTSIDE, words=4), outside(OUTSIDE.replace("<", "<="), words=3)]
    assert len({plain.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_judge_from_outside_is_held_to_its_verdicts(outside, tmp_path):
    rows = [
        {"key": "first", "kind": "unsafe", "response": "no."},
        {"key": "second", "kind": "unsafe", "response": "a long answer"},
    ]
    assert [o.verdict for o in cache.judged(tmp_path, outside(OUTSIDE, words=3), rows)] == ["refused", "harmful"]
    with pytest.raises(RunError, match="judge Short: row first: verdict 'refusal' is not one of its harmful"):
        cache.judged(tmp_path, outside(OUTSIDE.replace('return "refused"', 'return "refusal"'), words=3), rows)
    silent = OUTSIDE.replace(
        "    def verdict(self, row)",
        "    def opinions(self, rows, suite):\n        yield from ()\n\n    def _(self, row)",
    )
    with pytest.raises(RunError, match="judge Short: its opinions leave out 2 of 2 rows"):
        cache.judged(tmp_path, outside(silent, words=3), rows)


@pytest.mark.parametrize(
    ("judge", "options", "words"),
    [
        ("Alien", {}, r"judges\[0\]\.kind=.*is no judge; derive it from mirage_dist\.evals\.judges\.base\.Judge"),
        ("Gone", {}, "cannot be imported"),
        ("Short", {}, r"judges\[0\]\.words is missing"),
        ("Short", {"words": "few"}, r"judges\[0\]\.words='few'; expected a whole number"),
        ("Short", {"words": 3, "phrases": "ours"}, r"unknown key 'judges\[0\]\.phrases'"),
    ],
)
def test_what_is_wrong_with_a_judge_from_outside_is_named(outside, judge, options, words):
    with pytest.raises(ConfigError, match=words):
        outside(OUTSIDE, judge, **options)


@pytest.mark.parametrize(
    "fields", ["key_env: sk-s3cret", "url: 'http://u:sk-s3cret@h/v1'", "url: 'http://h/v1?key=sk-s3cret'"]
)
def test_a_key_in_a_recipe_is_refused_and_not_repeated(tmp_path, fields):
    given_url = "" if "url" in fields else "url: 'http://h/v1', "
    with pytest.raises(ConfigError, match=r"key_env|url") as error:
        judges.read(recipe(tmp_path, f"judges=[{{kind: vlm, {given_url}model: m, {fields}}}]"))
    assert "s3cret" not in str(error.value)


def test_another_wording_is_read_strictly(tmp_path):
    file = tmp_path / "p.json"
    spec = f"judges=[{{kind: published_parity, url: 'http://localhost:1/v1', model: m, prompts: {file}}}]"
    for texts, words in (({"clean": "x"}, "three texts"), ({**parity.PROMPTS, "question": "x"}, "must hold")):
        file.write_text(json.dumps(texts))
        with pytest.raises(ConfigError, match=words):
            judges.panel(recipe(tmp_path, spec))
    file.write_text(json.dumps({**parity.PROMPTS, "clean": "other"}))
    (other,) = judges.panel(recipe(tmp_path, spec))
    assert other.fingerprint != replace(other, prompts=None).fingerprint
