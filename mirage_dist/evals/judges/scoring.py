"""Benchmarks' own scores of an answer, from 0 to 1, by their published rules, and how they read it.

VQA accuracy (Antol et al., ICCV 2015, and visualqa.org/evaluation.html): min(matches / 3, 1) over nine of the ten
annotators, averaged over the choice of the one left out; both sides are normalised. The normalisation is that of the
M4C evaluator (after Pythia's), which scores TextVQA and prepares LLaVA's answers to VQAv2 and VizWiz for their servers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

ENOUGH = 3  # an answer that agrees with so many annotators scores 1
WORDS = Path(__file__).with_name("vqa_words.json")
_WORDS = json.loads(WORDS.read_text(encoding="utf-8"))
DIGITS: dict[str, str] = _WORDS["digits"]
# A contraction without one of its apostrophes -> the whole contraction.
CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in _WORDS["contractions"] for i, sign in enumerate(w) if sign == "'"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")  # all but decimal points
OPTION = re.compile(r"The answer is ([A-E])")


def vqa_accuracy(response: str, references: Sequence[str]) -> float:
    """The score of a response, given each annotator's answer."""
    answer = normalised(response)
    matches = sum(normalised(reference) == answer for reference in references)
    others = len(references) - matches  # leaving one of these out removes no match
    without = matches * min(max(matches - 1, 0) / ENOUGH, 1.0)
    return (without + others * min(matches / ENOUGH, 1.0)) / len(references)


@lru_cache(maxsize=65536)
def normalised(answer: str) -> str:
    """The answer in lower case, without articles and punctuation, with digits for number words and with apostrophes."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = cleared = text.replace("\n", " ").replace("\t", " ").strip()
    for sign in PUNCTUATION:
        # A sign beside a space is removed, one within a word becomes a space; as in the published code, one occurrence
        # beside a space decides for all occurrences in the text.
        beside = f"{sign} " in text or f" {sign}" in text
        cleared = cleared.replace(sign, "" if beside else " ")
    words = [DIGITS.get(word, word) for word in PERIOD.sub("", cleared).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def pope(response: str) -> str:
    """Yes or no, as POPE's script (Li et al., EMNLP 2023) reads it from the first sentence: all but a no is a yes."""
    words = response.strip().partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme(response: str) -> str | None:
    """Yes or no in the first four characters, as MME's script (Fu et al., 2023) reads it; None, which is wrong."""
    start = response.strip().lower()[:4]
    return next((answer for answer in ("yes", "no") if answer in start), None)


def gqa(response: str) -> str:
    """What is compared with the answer of GQA, letter by letter, by LLaVA's and GQA's scripts."""
    return response.strip().rstrip(".").lower()


def option(response: str) -> str | None:
    """The letter that a response chooses, as LLaVA's ScienceQA script reads it; None when it reads none."""
    text = response.replace("\n", ". ")
    if text.strip() in tuple("ABCDE"):
        return text.strip()
    if text[:1] in tuple("ABCDE") and text[1:3] == ". ":
        return text[0]
    # The script looks first for a letter with a full stop after it.
    match = re.search(OPTION.pattern + r"\.", text) or OPTION.search(text)
    return match[1] if match else None
