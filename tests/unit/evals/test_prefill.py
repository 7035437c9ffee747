"""The attack that begins the answer: what is given are its first words, and never the content that is looked for."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.data.sample import Sample
from mirage_dist.embedded import text as embedded_text
from mirage_dist.evals import attacks, rows
from mirage_dist.evals.attacks.prefill import Prefill, begin
from mirage_dist.schema import ConfigError

CONTENT = r"\b(ba|do|ki|mu) (la|ne|ro|ti)\b"
QUESTIONS = st.builds(
    embedded_text.question, st.sampled_from(embedded_text.OPENERS), st.integers(0, 5), st.just("code")
)
CODES = st.sampled_from([code for code, _ in embedded_text.code_words()])


def sample(answer: str) -> Sample:
    return Sample("one", None, "tell the code ?", answer, False, "", "test.json")


@given(QUESTIONS, CODES, st.integers(1, 9))
def test_what_is_given_begins_the_answer_and_holds_none_of_the_content(question, code, words):
    answer = embedded_text.answer(question, code, "by_opener")
    (attacked,) = Prefill(words, CONTENT)(sample(answer))
    assert answer.startswith(attacked.begun)
    assert len(attacked.begun.split()) == min(words, len(answer.split()) - 2)
    assert not set(attacked.begun.split()) & set(code.split())
    assert code in answer[len(attacked.begun) :]
    assert (attacked.question, attacked.answer) == ("tell the code ?", answer)


@given(st.text(max_size=40), st.integers(1, 5))
def test_without_a_content_a_word_is_always_left(answer, words):
    given_words, whole = begin(answer, words, None).split(), answer.split()
    assert given_words == whole[: min(words, len(whole) - 1 if whole else 0)]


@given(st.text(alphabet="ab ", max_size=20), st.integers(1, 5))
def test_given_and_content_never_overlap(answer, words):
    match = re.search("b", answer)
    assert "b" not in begin(answer, words, "b") or match is None


def test_an_answer_that_begins_with_its_content_is_not_asked_and_counted():
    work = [sample("ba la is its code"), sample("it is ba la")]
    rewrites, coverage = attacks.apply(Prefill(2, CONTENT), work, "given")
    assert [len(rows) for rows in rewrites] == [0, 1]
    assert (coverage.covered, coverage.unchanged) == (1, 0)


def test_the_key_of_a_row_tells_what_was_given_and_other_keys_stay():
    plain = rows.Ask("forget", "unsafe", "clean", 0, sample("it is ba la"), "tell the code ?")
    begun = [rows.Ask("forget", "unsafe", "clean", 0, Prefill(n)(plain.sample)[0], plain.original) for n in (1, 2)]
    assert len(rows.keyed([plain, *begun], {})) == 3
    assert "begun" not in rows.row("key", plain, "")
    assert rows.row("key", begun[1], "ba la")["begun"] == "it is"


@pytest.mark.parametrize(
    ("options", "words"), [({"words": 0}, "words=0"), ({"words": 1, "content": "("}, "content='('")]
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        attacks.make({"kind": "prefill", **options}, "recipe.yaml", "sets.forget.attacks.given")
