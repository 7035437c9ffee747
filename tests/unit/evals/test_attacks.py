"""Attacks change the first word and nothing else, join by id, and refuse what they cannot do."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.data.sources import Sample
from mirage_dist.evals import attacks
from mirage_dist.schema import ConfigError


def sample(question, identity="a"):
    return Sample(identity, None, question, "", False, "", "test")


@given(st.lists(st.from_regex(r"[A-Za-z]{1,8}", fullmatch=True), min_size=1, max_size=6))
def test_a_swap_touches_the_first_word_only_and_keeps_its_case(words):
    (rewrite,) = attacks.make({"kind": "swap", "word": "what"}, "r", "k")(sample(" ".join(words) + "?"))
    first, _, rest = rewrite.question.partition(" ")
    assert first.rstrip("?") == ("What" if words[0][0].isupper() else "what")
    assert rest.rstrip("?") == " ".join(words[1:])


@pytest.mark.parametrize(
    ("question", "swapped"),
    [
        ('"Share the shape."', '"What the shape."'),
        ("Please, tell the shape?", "What, tell the shape?"),
        ("what's the shape", "what the shape"),
        ("Été : which shape ?", "What : which shape ?"),
    ],
)
def test_a_swap_keeps_what_stands_around_the_word(question, swapped):
    (rewrite,) = attacks.make({"kind": "swap", "word": "What"}, "r", "k")(sample(question))
    assert rewrite.question == swapped


def test_a_question_without_a_word_is_an_error_that_names_the_sample():
    with pytest.raises(ConfigError, match="sample 'odd'"):
        attacks.make({"kind": "swap", "word": "what"}, "r", "k")(sample("?!", "odd"))


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({"id": "a"}, "list of VLGuard records"),
        ([{"safe": False}], "record 0: field 'id'"),
        ([{"id": "a", "safe": "no"}], "record 0: field 'safe'"),
        ([{"id": "a", "safe": True, "instr-resp": [{"instruction": "What ?"}]}], "'safe_instruction'"),
    ],
)
def test_what_is_no_attack_file_is_said_by_record_and_field(tmp_path, records, words):
    (tmp_path / "x.json").write_text(json.dumps(records))
    attack = attacks.make({"kind": "file", "path": str(tmp_path / "x.json"), "shots": 1}, "r", "k")
    with pytest.raises(ConfigError, match=words):
        attacks.apply(attack, [sample("Share ?")], "what")


def test_templates_give_one_rewrite_each():
    attack = attacks.make(
        {"kind": "templates", "word": "What", "templates": ["What {rest}", "What of {rest}"]}, "r", "k"
    )
    assert [r.question for r in attack(sample("Share the shape."))] == ["What the shape.", "What of the shape."]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "swop"}, "swap"),
        ({"kind": "swap", "word": "two words"}, "one word"),
        ({"kind": "templates", "word": "What", "templates": ["Please {rest}"]}, "does not open"),
        ({"kind": "templates", "word": "What", "templates": ["What {reset}"]}, "nothing else"),
        ({"kind": "file", "path": "x.json", "shots": 0}, "1 or more"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        attacks.make(options, "recipe", "attacks.what")


def published(path, ids):
    rows = [
        {"id": i, "image": "x.png", "safe": False, "instr-resp": [{"instruction": f"What {n} ?", "response": ""}]}
        for n, i in enumerate(ids)
    ]
    path.write_text(json.dumps(rows))
    return attacks.make({"kind": "file", "path": str(path), "shots": 2, "min_match": 0.6}, "r", "k")


def test_a_file_is_joined_by_id_and_its_gaps_are_reported(tmp_path):
    attack = published(tmp_path / "what.json", ["b", "a", "a", "b", "z", "z"])
    rewrites, coverage = attacks.apply(attack, [sample("Share ?", i) for i in "abc"], "what")
    assert [[r.question for r in rows] for rows in rewrites] == [["What 1 ?", "What 2 ?"], ["What 0 ?", "What 3 ?"], []]
    assert (coverage.asked, coverage.without, coverage.unknown) == (2, ["c"], ["z"])


def test_a_file_that_matches_too_little_is_an_error_with_counts(tmp_path):
    attack = published(tmp_path / "what.json", ["z", "z"])
    with pytest.raises(ConfigError, match="0 of 2"):
        attacks.apply(attack, [sample("Share ?", i) for i in "ab"], "what")
