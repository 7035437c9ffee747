"""First words end where Unicode ends them; what stands around a word stays, and what cannot be measured says so."""

import time
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.data.sample import Sample
from mirage_dist.data.words import (
    NOT_MEASURED,
    begins_with,
    cased,
    fill_template,
    first_words,
    is_word,
    opening,
    words,
)

SWAPPED = {
    # numbering
    "1. Describe it": "1. What it",
    "2) describe it": "2) what it",
    "(a) Describe it": "(a) What it",
    "[iv] Describe it": "[iv] What it",
    "1.2. Describe it": "1.2. What it",
    "#3 Describe it": "#3 What it",
    "Q: Describe it": "Q: What it",
    "Question 4: Describe it": "Question 4: What it",
    "१. वर्णन करें": "१. what करें",
    "１．Describe it": "１．What it",
    "①Describe it": "①What it",
    "1️⃣ Describe it": "1️⃣ What it",
    "• Describe it": "• What it",
    "- 1) Describe it": "- 1) What it",
    # mark-up
    "<b>Describe</b> it": "<b>What</b> it",
    '<p class="a b"><i>Describe</i> it</p>': '<p class="a b"><i>What</i> it</p>',
    "<image>\nDescribe it": "<image>\nWhat it",
    "**Describe** it": "**What** it",
    "_Describe_ it": "_What_ it",
    "# Describe it": "# What it",
    "> **1.** Describe it": "> **1.** What it",
    "![a cat](cat.png) Describe it": "![a cat](cat.png) What it",
    r"\textbf{Describe} it": r"\textbf{What} it",
    "&quot;Describe&quot; it": "&quot;What&quot; it",
    # quotation marks and brackets
    "“Describe” it": "“What” it",
    "«Décris» la": "«What» la",
    "„Beschreibe“ es": "„What“ es",
    "「Describe」 it": "「What」 it",
    "(Describe it)": "(What it)",
    "¿Qué es?": "¿What es?",
    # words of several parts
    "what's it": "what it",
    "l’homme est": "what est",
    "State-of-the-art it": "What it",
    "Note:this": "What:this",
    "3.14 is": "what is",
    # grapheme clusters and other scripts
    "क्या है": "what है",
    "தமிழ் எது": "what எது",
    "e\u0301te\u0301 : quoi": "what : quoi",
    "E\u0301te\u0301 : quoi": "What : quoi",
    "x\u0301y z": "what z",
    "مَا هذا": "what هذا",
    "שָׁלוֹם עולם": "what עולם",
    "\u200fما هذا": "\u200fwhat هذا",
    "무엇 입니까": "what 입니까",
    "İstanbul'da ne": "What ne",
    "ıssız ada": "what ada",
    "Straße und": "What und",
    "ﬁne art": "what art",
    "👨‍👩‍👧 Describe it": "👨‍👩‍👧 What it",
    "🇫🇷🇩🇪 Describe it": "🇫🇷🇩🇪 What it",
    # nothing but what looks like numbering
    "1.": "what.",
    "(b)": "(what)",
}
UNSPACED = {
    "描述这张图片": "Han",
    "这 is what": "Han",
    "1. 描述这张图片": "Han",
    "「図」は何": "Han",
    "これは何": "Hiragana",
    "カタカナ": "Katakana",
    "ｶﾀｶﾅ": "Katakana",
    "ภาพนี้คืออะไร": "Thai",
    "ຮູບນີ້": "Lao",
    "តើនេះជាអ្វី": "Khmer",
    "ဒါဘာလဲ": "Myanmar",
    "འདི་ག་རེ་རེད": "Tibetan",
    "ꦲꦥ": "Javanese",
    "iPhone的颜色": "Han",
    "2024年の写真": "Han",
    "COVID-19คือ": "Thai",
}


def replaced(text, word="what"):
    first = opening(text)
    assert first
    assert first.measured
    return first.replaced(word)


@pytest.mark.parametrize("text", SWAPPED)
def test_the_first_word_is_replaced_and_nothing_else(text):
    assert replaced(text) == unicodedata.normalize("NFC", SWAPPED[text])


@pytest.mark.parametrize("text", UNSPACED)
def test_a_script_without_spaces_has_no_word_that_can_be_measured(text):
    first = opening(text)
    assert first
    assert (first.script, first.key, list(words(text))) == (UNSPACED[text], NOT_MEASURED, [])


def test_plain_questions_have_the_words_that_they_had():
    for text in ("What is it?", "what's this?", "Please, tell", "SHARE it", "U.S. what", "a cat", "It", "x ray"):
        first = opening(text)
        assert first
        assert first.key == regex.match(r"[\w']+(?:\.\w+)*", text)[0].lower()
    assert list(words("What is so-called 'red'?")) == ["what", "is", "so-called", "red"]
    assert opening("?!") is opening("") is opening("👍🏽 … \u0301") is None


def clusters(text):
    return regex.findall(r"\X", text)


TEXT = st.text() | st.text(
    st.sampled_from("aé\u0301\u200d\u200b1.)(-*_<>&;'’: \nक्तிஎமلَ👨👧🇫\u1100\u1161한\u0600\u0d4eกั中ーİß")
)


@given(TEXT)
def test_a_replacement_leaves_everything_around_the_word(text):
    first = opening(text)
    whole = unicodedata.normalize("NFC", text)
    if first is None:
        assert not regex.search(r"[\p{L}\p{N}]", whole)
        return
    assert first.text == whole
    before, after = whole[: first.start], whole[first.end :]
    assert clusters(before) + clusters(first.word) + clusters(after) == clusters(whole)
    assert first.word
    new = first.replaced("word")
    assert new.startswith(before)
    assert new.endswith(after)
    assert new[len(before) : len(new) - len(after)].lower() == "word"
    assert unicodedata.is_normalized("NFC", new)
    assert first.key == unicodedata.normalize("NFC", first.key)


@given(TEXT)
def test_what_a_text_begins_with_is_one_word(text):
    first = opening(text)
    if first and first.measured and not first.word.startswith(("&", "<")):
        assert begins_with(text, [first.word])
        assert opening(first.word)


@pytest.mark.parametrize("piece", ["\u0301", "🇦", "a\u0301", "<", "<a", "&", "1.", "(", "a-", "![", "q ", "中", "_"])
def test_time_grows_with_the_length_of_a_text(piece):
    start = time.process_time()
    opening(piece * 20_000)
    assert time.process_time() - start < 2


def test_one_word_is_distinguished_from_several():
    assert all(map(is_word, ("what", "what's", "so-called", "क्या", "什么", "E\u0301te\u0301")))
    assert not any(map(is_word, ("", "two words", "what?", "1.", "(a)", "是 什么", "什么?")))
    assert begins_with("Was: 图", ["WAS"])
    assert begins_with("什么是这个", ["什么"])
    assert not begins_with("这是什么", ["什么"])


def test_a_replacement_has_the_case_of_what_it_replaces():
    cases = [("what", "Été", "What"), ("What", "été", "what"), ("What", "क्या", "What"), ("ßa", "Ab", "Ssa")]
    cases += [("ﬁne", "Ab", "Fine"), ("e\u0301t", "Ab", "Ét"), ("what", "ǅep", "What"), ("", "A", "")]
    for word, like, right in cases:
        assert cased(word, like) == right


def sample(question, answer="Red."):
    return Sample("a", None, question, answer, True, "", "here")


def test_templates_keep_what_stands_before_the_word():
    assert fill_template("What {rest}", sample("1. Describe the cat")) == "1. What the cat"
    assert fill_template("What {rest}", sample("«Décris» la")) == "«What » la"
    assert fill_template("please: {question}", sample("1. Describe it")) == "Please: 1. Describe it"
    assert fill_template("What {rest}", sample("描述图片")) is None
    assert fill_template("What: {question}", sample("描述图片")) == "What: 描述图片"


def test_questions_without_a_measurable_word_are_counted_apart():
    questions = ["描述图片", "告诉我", "What?", "1. What?", "?"]
    counts = first_words([sample(question) for question in questions])
    assert counts == {
        NOT_MEASURED: {"refusal": 0, "answer": 2},
        "what": {"refusal": 0, "answer": 2},
        "": {"refusal": 0, "answer": 1},
    }
