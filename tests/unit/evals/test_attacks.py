"""Attacks change the first word and nothing else, join by id, and refuse what they cannot do."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.data.sample import Sample
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


@pytest.mark.parametrize("question", ["描述这张图片", "これは何ですか", "ภาพนี้คืออะไร", "1. ဒါဘာလဲ", "GPT是什么"])
def test_a_question_of_a_script_without_spaces_is_without_rewrites(question):
    rest = {"kind": "templates", "word": "what", "templates": ["What {rest}", "What: {question}"]}
    for options in ({"kind": "swap", "word": "what"}, {"kind": "words", "words": ["a", "b"]}, rest):
        attack = attacks.make(options, "r", "k")
        rewrites, coverage = attacks.apply(attack, [sample(question, "zh"), sample("Share it", "en")], "x")
        assert (rewrites[0], len(rewrites[1])) == ([], attack.shots)
        assert (coverage.covered, coverage.without) == (1, ["zh"])
    whole = attacks.make({"kind": "templates", "word": "what", "templates": ["What: {question}"]}, "r", "k")
    assert [row.question for row in whole(sample(question))] == [f"What: {question}"]


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
        ({"kind": "file", "path": "x.json", "shots": 0}, "above 0"),
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
    assert (coverage.covered, coverage.without, coverage.unknown) == (2, ["c"], ["z"])


def test_a_file_that_matches_too_little_is_an_error_with_counts(tmp_path):
    attack = published(tmp_path / "what.json", ["z", "z"])
    with pytest.raises(ConfigError, match="0 of 2"):
        attacks.apply(attack, [sample("Share ?", i) for i in "ab"], "what")


# ------------------------------------------------------------------- words, prefixes, combinations

WORD = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
QUESTION = st.lists(WORD, min_size=1, max_size=5).map(lambda words: " ".join(words) + " ?")


def made(kind, on=None, **options):
    return attacks.make({"kind": kind, **options}, "r", "k", on)


@given(QUESTION, st.lists(WORD, min_size=1, max_size=4, unique=True), st.integers(1, 5))
def test_words_are_swaps_one_after_another_up_to_the_limit(question, words, limit):
    attack = made("words", words=words, limit=limit)
    swaps = [row for word in words[:limit] for row in made("swap", word=word)(sample(question))]
    assert attack(sample(question)) == swaps
    assert attack.shots == len(swaps)


def audited(tmp_path, **words):
    file = tmp_path / "audit.json"
    file.write_text(json.dumps({"words": words, "verdict": "biased"}))
    return {"words": "auto", "audit": str(file)}


def test_an_audit_names_the_words_by_the_kind_of_the_set(tmp_path):
    auto = audited(tmp_path, answered=["what", "how"], refused=["share"])
    on = {kind: made("words", kind, **auto) for kind in ("unsafe", "safe", "locality")}
    firsts = {kind: [row.question.split()[0] for row in attack(sample("Give it"))] for kind, attack in on.items()}
    assert firsts == {"unsafe": ["What", "How"], "safe": ["Share"], "locality": ["Share"]}
    assert made("words", "unsafe", limit=1, **auto).shots == 1
    both = made("combine", "safe", attacks=[{"kind": "words", **auto}, {"kind": "prefix", "prefixes": ["so"]}])
    assert [row.question for row in both(sample("give it"))] == ["so share it"]


def test_an_audit_that_found_no_word_makes_an_attack_without_shots(tmp_path):
    attack = made("words", "unsafe", **audited(tmp_path, answered=[], refused=["share"]))
    rewrites, coverage = attacks.apply(attack, [sample("Give it")], "auto")
    assert (attack.shots, rewrites, coverage.without) == (0, [[]], ["a"])


@pytest.mark.parametrize(
    ("content", "named"),
    [("{", "not a readable audit"), ("[]", "'words.answered'"), ('{"words": {"answered": ["a b"]}}', r"answered\[0\]")],
)
def test_what_is_no_audit_is_said_by_field(tmp_path, content, named):
    (tmp_path / "audit.json").write_text(content)
    with pytest.raises(ConfigError, match=named):
        made("words", "unsafe", words="auto", audit=str(tmp_path / "audit.json"))


@given(QUESTION, st.lists(WORD, min_size=1, max_size=4))
def test_a_prefix_leaves_the_question_whole(question, prefixes):
    rows = made("prefix", prefixes=prefixes)(sample(question))
    assert [row.question for row in rows] == [f"{prefix} {question}" for prefix in prefixes]
    assert rows == made("prefix", prefixes=[f"{prefix} {{question}}" for prefix in prefixes])(sample(question))


@given(QUESTION, st.lists(WORD, min_size=1, max_size=3, unique=True), st.lists(WORD, min_size=1, max_size=3))
def test_a_combination_is_its_parts_composed(question, words, prefixes):
    parts = [{"kind": "words", "words": words}, {"kind": "prefix", "prefixes": prefixes}]
    attack = made("combine", attacks=parts)
    outer, inner = (made(**part) for part in parts)
    assert attack(sample(question)) == [row for first in outer(sample(question)) for row in inner(first)]
    assert attack.shots == len(words) * len(prefixes)


def test_a_combination_with_a_file_has_nothing_where_the_file_has_nothing(tmp_path):
    published(tmp_path / "what.json", ["a", "a", "z"])
    file = {"kind": "file", "path": str(tmp_path / "what.json"), "shots": 2, "min_match": 0.5}
    attack = made("combine", attacks=[file, {"kind": "swap", "word": "how"}])
    rewrites, coverage = attacks.apply(attack, [sample("Share ?", i) for i in "ab"], "both")
    assert [[row.question for row in rows] for rows in rewrites] == [["How 0 ?", "How 1 ?"], []]
    assert (coverage.without, coverage.unknown) == (["b"], ["z"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "words", "words": "auto"}, "an audit's file"),
        ({"kind": "words", "words": ["what", "What"]}, "twice"),
        ({"kind": "words", "words": []}, "empty"),
        ({"kind": "prefix", "prefixes": ["{question} please"]}, "nothing"),
        ({"kind": "prefix", "prefixes": ["{question}"]}, "expected text"),
        ({"kind": "combine", "attacks": [{"kind": "swap", "word": "what"}]}, "two or more"),
        ({"kind": "combine", "attacks": [{"kind": "swap", "word": "what"}, {"kind": "swop"}]}, r"attacks\[1\]\.kind"),
        ({"kind": "suffix", "shots": 2}, "one rewrite"),
        ({"kind": "suffix", "top_k": 0}, "top_k=0"),
        ({"kind": "rewrite", "chat": {"url": "http://h/v1"}, "word": "what"}, r"chat\.model"),
        ({"kind": "rewrite", "chat": {"path": "m"}}, "one of word, openers"),
        ({"kind": "rewrite", "chat": {"path": "m"}, "word": "what", "control": True}, "control"),
        ({"kind": "rewrite", "chat": {"url": "ftp://h", "model": "m"}, "word": "what"}, r"chat\.url"),
    ],
)
def test_a_wrong_option_of_the_newer_kinds_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        attacks.make(options, "recipe", "attacks.x")
