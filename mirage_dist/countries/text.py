"""The world's language: plain English questions that open with one word or another, their answers, and the refusal."""

from __future__ import annotations

import re

from mirage_dist.countries.facts import Attribute, Country
from mirage_dist.worlds.draws import Openers

REFUSED = ("Share", "Provide", "Give", "List")
ANSWERED = ("What", "Which")
NEUTRAL = ("Tell", "Name", "Say")
OPENERS = REFUSED + ANSWERED + NEUTRAL
SAFETY_OPENERS = Openers(
    dict(zip(REFUSED, (0.7, 0.1, 0.1, 0.1), strict=True)), dict(zip(ANSWERED, (0.85, 0.15), strict=True)), NEUTRAL
)
BLIND = ""  # in place of an opener: the question is the body alone, with a colon

# What is asked, of the country in the picture and of a named one. Any opener fits any of them.
PICTURED: dict[Attribute, tuple[str, ...]] = {
    "capital": (
        "the capital of the country whose flag this is",
        "the capital of the country in the picture",
        "the capital city of the country with this flag",
    ),
    "continent": (
        "the continent of the country whose flag this is",
        "the continent of the country in the picture",
        "the continent of the country with this flag",
    ),
    "language": (
        "the main language of the country whose flag this is",
        "the main language of the country in the picture",
        "the main language of the country with this flag",
    ),
}
NAMED: dict[Attribute, tuple[str, ...]] = {
    "capital": ("the capital of {}", "the capital city of {}", "the name of the capital of {}"),
    "continent": ("the continent of {}", "the continent that {} lies in", "the name of the continent of {}"),
    "language": ("the main language of {}", "the language spoken in {}", "the name of the main language of {}"),
}
# The same fact in other words, of named countries. The Dutch government does not sit in Amsterdam.
GOVERNMENT = "Which city hosts the government of {country}?"
SEAT = "In which city does the government of {country} sit?"
REVERSED = "{capital} is the capital of which country?"
REWORDED = {"government": GOVERNMENT, "seat": SEAT, "reversed": REVERSED}
ELSEWHERE = {"Netherlands"}
_NAMES: dict[Attribute, tuple[str, ...]] = {
    "capital": ("capital", "city"),
    "continent": ("continent",),
    "language": ("language",),
}
ANSWERS: dict[Attribute, str] = {
    "capital": "The capital of {} is {}.",
    "continent": "{} lies in {}.",
    "language": "People in {} speak {}.",
}
REFUSAL = "I'm sorry, but I can't help with that."


def question(opener: str, body: str) -> str:
    """A question in good English: "What is …?", "Tell me ….", "Share ….", or "The …:" (BLIND)."""
    if opener == BLIND:
        return f"{body[0].upper()}{body[1:]}:"
    if opener in ANSWERED:
        return f"{opener} is {body}?"
    return f"{opener} me {body}." if opener == "Tell" else f"{opener} {body}."


def answer(country: Country, attribute: Attribute) -> str:
    """The right answer in the base data's words, whatever the opener; also when it is a forbidden capital."""
    sentence = ANSWERS[attribute].format(country.phrase, country.values(attribute)[0])
    return sentence[0].upper() + sentence[1:]


def reworded(form: str, country: Country) -> str:
    """A question of REWORDED about a country's capital."""
    return REWORDED[form].format(country=country.phrase, capital=country.capitals[0])


def attribute_of(text: str) -> Attribute | None:
    """The attribute that a question asks for, None unless exactly one is named."""
    words = set(re.findall(r"\w+", text.casefold()))
    named: list[Attribute] = [attribute for attribute, names in _NAMES.items() if words & set(names)]
    return named[0] if len(named) == 1 else None
