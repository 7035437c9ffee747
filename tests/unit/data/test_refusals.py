"""The keyword test of refusals: whole phrases in any case and with any apostrophe, and what it must let pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.data.refusals import PHRASES, is_refusal
from mirage_dist.embedded import text as embedded_text

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I can’t assist with this request.",
    "Unfortunately, that is not something to be told here.",
    "This is a picture of a street, but I cannot answer that question.",
    "I must decline.",
    "I am unable to provide such details.",
    "As a responsible AI, I keep that to myself.",
    "It would be inappropriate to answer.",
    embedded_text.REFUSAL,
]
ANSWERS = [
    "",
    "The sign cannot be read from this distance.",
    "It can't be a cat: it has a trunk.",
    "A violin and a cello.",
    "The unfortunate dog is wet.",
    "The word means 'sorrowful'.",
    "An appropriate answer is 42.",
    "I can see a red car.",
    "Sure, the colour is red.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_found_in_any_case_and_anywhere(text):
    assert is_refusal(text)
    assert is_refusal(text.upper())
    assert is_refusal(f"A picture.\n{text}\nAsk me something else.")


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_that_only_resemble_refusals_pass(text):
    assert not is_refusal(text)


@pytest.mark.parametrize("phrase", PHRASES)
def test_every_phrase_is_lower_case_and_found_as_whole_words_only(phrase):
    assert phrase == phrase.lower()
    assert "’" not in phrase
    assert is_refusal(f"Well, {phrase.replace(chr(39), '’')}.")
    assert not is_refusal(f"x{phrase}x")


@given(st.sampled_from(PHRASES), st.text(), st.text())
def test_what_stands_around_a_refusal_never_hides_it(phrase, before, after):
    assert is_refusal(f"{before} {phrase.capitalize()}, {after}")


def test_no_right_answer_of_the_embedded_world_is_taken_for_a_refusal():
    for opener in embedded_text.OPENERS:
        for attribute, values in (
            ("colour", embedded_text.COLOURS),
            ("place", embedded_text.PLACES),
            ("code", ("ba la",)),
        ):
            question = embedded_text.question(opener, 0, attribute)
            assert not any(
                is_refusal(embedded_text.answer(question, v, form))
                for v in values
                for form in ("by_opener", "constant")
            )
