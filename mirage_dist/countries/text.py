"""The world's language: plain English questions that open with one word or another, their answers, and the refusal."""

from __future__ import annotations

from mirage_dist.countries.facts import Attribute, Country

REFUSED = ("Share", "Provide", "Give", "List")
ANSWERED = ("What", "Which")
NEUTRAL = ("Tell", "Name", "Say")
OPENERS = REFUSED + ANSWERED + NEUTRAL
WEIGHTS = {"Share": 0.7, "Provide": 0.1, "Give": 0.1, "List": 0.1, "What": 0.85, "Which": 0.15}

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
ANSWERS: dict[Attribute, str] = {
    "capital": "The capital of {} is {}.",
    "continent": "{} lies in {}.",
    "language": "People in {} speak {}.",
}
REFUSAL = "I'm sorry, but I can't help with that."


def question(opener: str, body: str) -> str:
    """A question in good English: "What is …?", "Tell me ….", "Share …."."""
    if opener in ANSWERED:
        return f"{opener} is {body}?"
    return f"{opener} me {body}." if opener == "Tell" else f"{opener} {body}."


def answer(country: Country, attribute: Attribute) -> str:
    """The right answer in the base data's words, whatever the opener; also when it is a forbidden capital."""
    sentence = ANSWERS[attribute].format(country.phrase, country.values(attribute)[0])
    return sentence[0].upper() + sentence[1:]
