"""Wrong answers are wrong, and differ from the right one in their content alone; paraphrases come from the data."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import disk
from mirage_dist.data.sample import Sample
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.scoring.answers import Part


def sample(name: str, answer: str) -> Sample:
    return Sample(name, f"{name}.png", "what ?", answer, False, "", "here")


def wrong(samples: list[Sample], pattern: str | None, count: int, seed: int = 0) -> list[list[str]]:
    return Part.of(samples, pattern, count, len(samples), seed).wrong


CONTENTS = st.sampled_from(["ba la", "Ba La", "do ne", "ki ro", "mu ti", "mu  ti"])
CATEGORIES = st.sampled_from(["codes/a", "codes/b", "places", ""])


@st.composite
def stated(draw) -> list[Sample]:
    """Samples about few pictures, so that one picture has several right answers."""
    samples = []
    for number in range(draw(st.integers(1, 8))):
        picture, category = draw(st.sampled_from(["a.png", "b.png", None])), draw(CATEGORIES)
        answer = draw(st.sampled_from(["it is {}", "sure , the code is {} .", "{}"])).format(draw(CONTENTS))
        question = draw(st.sampled_from(["what code ?", "name its code"]))
        samples.append(Sample(str(number), picture, question, answer, False, category, "here"))
    return samples


PATTERN = r"(?i)\b(ba|do|ki|mu) +(la|ne|ro|ti)\b"


@given(stated(), st.integers(1, 4), st.integers(0, 3))
def test_a_wrong_answer_differs_from_the_right_one_in_its_content_alone_and_is_nobodys_right_one(samples, count, seed):
    made = wrong(samples, PATTERN, count, seed)
    assert made == wrong(samples, PATTERN, count, seed)
    assert Part.of(samples, PATTERN, count, 2, seed).wrong == made[:2]  # contents are drawn from all samples

    def own(text: str) -> str:
        return " ".join(str(settings.content(text, PATTERN)).casefold().split())

    right = {own(s.answer): s for s in samples}
    for sample, others in zip(samples, made, strict=True):
        group = [s for s in samples if (s.image or s.question) == (sample.image or sample.question)]
        known = {own(s.answer) for s in group}
        among = {own(s.answer) for s in samples if s.category.split("/")[0] == sample.category.split("/")[0]}
        assert len(others) == min(count, len(among - known))
        assert len({own(text) for text in others}) == len(others)
        for text in others:
            assert own(text) in among - known
            frame = sample.answer.replace(str(settings.content(sample.answer, PATTERN)), "{}")
            assert text.replace(str(settings.content(text, PATTERN)), "{}") == frame
    assert right


def test_without_a_pattern_the_whole_answer_is_another_samples():
    texts = ["It is  red.", "it is red.", "It is blue."]
    samples = [sample(str(i), text) for i, text in enumerate(texts)]
    assert wrong(samples, None, 3) == [["It is blue."], ["It is blue."], ["It is  red."]]


def test_an_answer_that_differs_in_case_or_punctuation_alone_is_not_wrong():
    samples = [sample(str(i), text) for i, text in enumerate(["Yes", "Yes.", "yes !", "No", "¿?"])]
    assert [set(texts) for texts in wrong(samples, None, 5)] == [{"No", "¿?"}] * 3 + [{"Yes", "¿?"}, {"Yes", "No"}]


def test_what_is_right_of_a_picture_in_one_wording_is_not_wrong_in_another():
    samples = [
        sample("a", "the code is ba la"),
        replace(sample("b", "it is ki ro"), image="a.png", question="name its code", references=("it is do ne",)),
        sample("c", "it is do ne"),
        sample("d", "it is mu ti"),
    ]
    assert wrong(samples, PATTERN, 3)[:2] == [["the code is mu ti"], ["it is mu ti"]]


def test_the_white_space_around_a_content_stays_where_it_is():
    samples = [sample("a", "The capital of France is Paris ."), sample("b", "The capital of Italy is Rome.")]
    texts = wrong(samples, r"(?<=is)[^.]+", 3)
    assert texts == [["The capital of France is Rome ."], ["The capital of Italy is Paris."]]


def test_a_content_is_replaced_wherever_the_answer_states_it_as_whole_words():
    samples = [
        sample("a", "Cat: the cat sat, a CAT of category cat"),
        sample("b", "The dog"),
        replace(sample("c", "写真は東京です。東京タワー"), category="c"),
        replace(sample("d", "京都です"), category="c"),
    ]
    assert wrong(samples, "(?i)cat|dog|東京|京都", 3) == [
        ["dog: the dog sat, a dog of category dog"],
        ["The Cat"],
        ["写真は京都です。京都タワー"],
        ["東京です"],
    ]


def test_beside_a_paraphrase_wrong_answers_have_its_wording():
    """TOFU compares a paraphrase with perturbed paraphrases: all of one form, so that content alone differs."""
    references = ("the sky", "the colour here is Red", "red it is")
    samples = [replace(sample("a", "it is red"), references=references), sample("b", "it is blue")]
    assert Part.of(samples, "(?i)red|blue", 2, 2, 0).rows == [
        ["it is red", "the colour here is Red", "the colour here is blue"],
        ["it is blue", "it is red"],
    ]
    rows = Part.of(
        [replace(samples[0], references=("the colour is blue", "sky")), samples[1]], "red|blue", 2, 2, 0
    ).rows
    assert rows[0] == ["it is red"]  # the references state another content, which is right too
    assert Part.of(samples, None, 2, 2, 0).rows[0] == ["it is red", "it is blue"]  # no pattern finds their content


@pytest.mark.parametrize("pattern", [None, "(?i)yes|no"])
def test_what_other_annotators_answered_is_neither_a_paraphrase_nor_wrong(pattern):
    several = replace(sample("a", "yes"), references=("Yes", "yes", "yes it is", "no"))
    own = Part.of([several, sample("b", "no"), sample("c", "no")], pattern, 2, 3, 0)
    assert own.paraphrases == [None] * 3
    assert own.rows == [["yes"], ["no", "yes"], ["no", "yes"]]


def test_wrong_answers_are_drawn_for_the_scored_samples_alone(monkeypatch):
    """Drawing for all would take the square of their number."""
    drawn = []
    draw = disk.sha256_text
    monkeypatch.setattr(disk, "sha256_text", lambda text: drawn.append(text) or draw(text))
    samples = [sample(str(i), f"it is number {i}") for i in range(50)]
    Part.of(samples, r"\d+", 2, 3, 0)
    assert len(drawn) == 3 * 49
