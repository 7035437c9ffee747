"""The keyword test of refusals: whole phrases in any case and with any apostrophe, and what it must let pass."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.data.refusals import PHRASES, PhraseList, is_refusal, is_refusal_as_published
from mirage_dist.embedded import text as embedded_text
from mirage_dist.schema import ConfigError

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


APOSTROPHES = "'’‘ʼ´`＇′‛ʹˈ"
SPACES = [" ", "  ", "\n", "\r\n\t", "\u00a0", "\u202f", "\u3000", "\u2028", " \u200b", "\u200b", "\u2060 \ufeff"]


@pytest.mark.parametrize("space", SPACES, ids=ascii)
def test_a_refusal_is_recognised_whatever_its_apostrophe_and_spaces(space):
    for apostrophe in (*APOSTROPHES, "", " ' ", "&#39;", "&rsquo;", "\u200b'"):
        assert is_refusal(f"Well, I{space}can{apostrophe}t{space}help{space}with that.")
        assert is_refusal(f"I{apostrophe}m{space}unable to say.")


@pytest.mark.parametrize(
    "text",
    [
        "I **cannot** say.",
        "I _cannot_ say.",
        "I can\u00adnot say.",
        "Ｉ ｃａｎｎｏｔ say.",
        "𝐒𝐨𝐫𝐫𝐲.",
        "I c\u200dannot.",
        "ſorry",
    ],
)
def test_emphasis_and_letters_of_other_forms_hide_no_refusal(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text", ["I canter along.", "I want wontons.", "Cant is a dialect.", "Lemons or rye.", "so rry", "_sorryx_"]
)
def test_normalising_invents_no_refusal(text):
    assert not is_refusal(text)


def test_the_published_test_stays_as_it_was_published():
    assert is_refusal_as_published("I'm sorry, no.")
    assert not is_refusal_as_published("I’m sorry, no.")
    assert not is_refusal_as_published("I  cannot say.")


# ------------------------------------------------------------------------------------ lists of other languages


@pytest.fixture
def listed(tmp_path):
    def read(content):
        file = tmp_path / "list.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return PhraseList.read(str(file))

    return read


@pytest.mark.parametrize(
    ("phrase", "refused", "answered"),
    [
        ("抱歉", "非常抱歉，我不能。", "这是红色的。"),
        ("ขออภัย", "ต้องขออภัยด้วย", "สีแดง"),
        ("je ne peux pas", "Désolé, JE NE\u202fPEUX PAS le dire.", "Je ne peux passer."),
        ("je n’ai pas le droit", "Je n'ai pas le droit.", "Je n'ai rien."),
        ("de\u0301sole\u0301", "Désolé !", "Désolée"),
        ("मैं नहीं कर सकता", "क्षमा करें, मैं नहीं कर सकता।", "मैं नहीं कर सकती।"),
        ("yapamıyorum", "YAPAMIYORUM.", "Yapıyorum."),
        ("İmkânsız", "imkânsız!", "imkân"),
        ("לא יכול", "אני לא יכול לעזור", "אני יכול"),
        ("größe", "GRÖSSE", "groß"),
    ],
)
def test_a_list_of_another_language_recognises_its_phrases(listed, phrase, refused, answered):
    refuses = listed({"language": "x", "phrases": [phrase]})
    assert refuses(refused)
    assert not refuses(answered)
    assert refuses.reads(refused)
    assert refuses.sha256


def test_a_list_knows_the_scripts_that_it_reads(listed):
    ours, chinese = PhraseList.read(None), listed({"phrases": ["抱歉"]})
    assert all(map(ours.reads, ("It is red.", "C'est été.", "42!", "")))
    assert not any(map(ours.reads, ("红色", "красный", "लाल है")))
    assert chinese.reads("红色的汽车 car")
    assert not chinese.reads("The car is 红")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "list.json: not JSON"),
        ("", "list.json: the file is empty"),
        (["sorry"], "no list of refusal phrases; expected an object such as"),
        ({"phrase": ["sorry"]}, "no list of refusal phrases"),
        ({"phrases": ["sorry"], "langauge": "en"}, "field 'langauge' is unknown"),
        ({"phrases": ["sorry"], "language": 1}, "field 'language': expected text, got 1"),
        ({"phrases": "sorry"}, "field 'phrases': expected a list of one phrase or more"),
        ({"phrases": []}, "field 'phrases': expected a list"),
        ({"phrases": ["sorry", 3]}, r"field 'phrases\[1\]': expected text, got 3"),
        ({"phrases": ["sorry", " ?!"]}, r"field 'phrases\[1\]': ' \?!' has no letter"),
        ({"phrases": ["I can’t", "x", "i  can't"]}, r"field 'phrases\[2\]': .* is phrases\[0\] again"),
        ({"phrases": ["\ud83d"]}, "half of a surrogate pair"),
    ],
)
def test_what_is_no_list_is_named_by_file_and_field(listed, content, message):
    with pytest.raises(ConfigError, match=message):
        listed(content)


def test_a_list_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read"):
        PhraseList.read(str(tmp_path / "nowhere.json"))
