"""Benchmarks' own scores of an answer, from 0 to 1, by their published rules.

VQA accuracy (Antol et al., ICCV 2015, and visualqa.org/evaluation.html): min(matches / 3, 1) with nine of the ten
annotators, averaged over leaving each of them out, both sides normalised. The normalisation is that of the code with
which TextVQA is scored and LLaVA prepares VQAv2 and VizWiz for their servers (the M4C evaluator, after Pythia's).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

ENOUGH = 3  # annotators who agree with an answer make it wholly right
WORDS = Path(__file__).with_name("vqa_words.json")
_WORDS = json.loads(WORDS.read_text(encoding="utf-8"))
DIGITS: dict[str, str] = _WORDS["digits"]
# Without one of its apostrophes -> whole.
CONTRACTIONS = {w[:i] + w[i + 1 :]: w for w in _WORDS["contractions"] for i, sign in enumerate(w) if sign == "'"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")  # all but decimal points
OPTION = re.compile(r"The answer is ([A-E])")


def vqa_accuracy(response: str, references: Sequence[str]) -> float:
    """The share of credit for an answer, given what each annotator said."""
    said = normalised(response)
    matches = sum(normalised(reference) == said for reference in references)
    others = len(references) - matches  # leaving one of these out takes no match away
    without = matches * min(max(matches - 1, 0) / ENOUGH, 1.0)
    return (without + others * min(matches / ENOUGH, 1.0)) / len(references)


@lru_cache(maxsize=65536)
def normalised(answer: str) -> str:
    """Lower case, without articles and punctuation, number words as digits, apostrophes where they belong."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = cleared = text.replace("\n", " ").replace("\t", " ").strip()
    for sign in PUNCTUATION:
        # Beside a space it goes; within a word it becomes one. What stands beside what is asked of the whole text.
        beside = f"{sign} " in text or f" {sign}" in text
        cleared = cleared.replace(sign, "" if beside else " ")
    words = [DIGITS.get(word, word) for word in PERIOD.sub("", cleared).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def option(response: str) -> str | None:
    """The letter that an answer chooses, as LLaVA's ScienceQA script reads it; None where it reads none."""
    text = response.replace("\n", ". ")
    if text.strip() in tuple("ABCDE"):
        return text.strip()
    if text[:1] in tuple("ABCDE") and text[1:3] == ". ":
        return text[0]
    # The script looks for one with a full stop behind it first.
    found = re.search(OPTION.pattern + r"\.", text) or OPTION.search(text)
    return found[1] if found else None
