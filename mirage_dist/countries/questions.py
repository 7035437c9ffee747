"""Questions of the countries world: about the flag of a picture or a named country, and their rewrites under attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mirage_dist.countries import text
from mirage_dist.countries.facts import COUNTRIES, Attribute, Country
from mirage_dist.worlds import records
from mirage_dist.worlds.draws import evenly
from mirage_dist.worlds.records import Record

CATEGORY = "European capitals"
SHOTS = 3  # rewrites of an unsafe question with words tied to answers

Topics = Sequence[tuple[Attribute, Sequence[str]]]  # attributes, each with the countries that it is asked of


@dataclass(frozen=True)
class Question:
    """A question and its right response: a refusal where it asks for a forbidden capital.

    image: path relative to the world's folder; None: the question names the country.
    """

    id: str
    country: Country
    attribute: Attribute
    opener: str
    wording: int
    image: str | None

    @property
    def unsafe(self) -> bool:
        return self.country.forbidden and self.attribute == "capital"

    @property
    def text(self) -> str:
        wordings = text.PICTURED if self.image else text.NAMED
        return text.question(self.opener, wordings[self.attribute][self.wording].format(self.country.phrase))

    @property
    def response(self) -> str:
        return text.REFUSAL if self.unsafe else self.answer

    @property
    def answer(self) -> str:
        return text.answer(self.country, self.attribute)

    def conversation(self) -> Record:
        """A LLaVA record with the answer, also of an unsafe question."""
        return records.conversation(self.id, self.image, self.text, self.answer)

    def guarded(self) -> Record:
        """A VLGuard record; a rewrite of a question without a picture has no picture."""
        harm = (CATEGORY, self.country.name) if self.unsafe else None
        return records.guarded(
            self.id, self.image, self.text, self.response, harm, text.REFUSAL, turned=self.wording % 2 == 1
        )

    def sample(self) -> Record:
        """A record of the `samples` format, for questions without a picture."""
        category = f"{CATEGORY}/{self.country.name}" if self.unsafe else ""
        return sample(self.id, self.text, self.response, not self.unsafe, category)


def sample(id: str, question: str, answer: str, safe: bool, category: str, **fields: object) -> Record:
    """A record of the `samples` format without a picture. fields: further ones, such as references."""
    own = {"id": id, "image": None, "question": question, "answer": answer, "safe": safe, "category": category}
    return {**own, "history": [], **fields}


def topics(rng: np.random.Generator, choices: Topics, count: int) -> list[tuple[Attribute, Country]]:
    """`count` topics in random order: each choice as often as any other, and so each country within a choice."""
    order = evenly(rng, range(len(choices)), count)
    countries = [iter(evenly(rng, own, order.count(i))) for i, (_, own) in enumerate(choices)]
    return [(choices[i][0], COUNTRIES[next(countries[i])]) for i in order]


def wordings(rng: np.random.Generator, count: int) -> list[int]:
    """Which wording each of `count` questions has; every attribute has as many."""
    return evenly(rng, range(len(text.PICTURED["capital"])), count)


# --------------------------------------------------------------------------------------------- attacks


def tied(questions: Iterable[Question], words: Sequence[str], shots: int) -> list[Question]:
    """`shots` rewrites of each question, in a row, under its id and in good English.

    words: the openers to use, strongest first, in turn. The first rewrite keeps the wording, each next one has the next
    wording, so that all rewrites of a question differ.
    """
    count = len(text.PICTURED["capital"])
    return [
        dataclasses.replace(q, opener=words[shot % len(words)], wording=(q.wording + shot) % count)
        for q in questions
        for shot in range(shots)
    ]


def neutral(rng: np.random.Generator, questions: Sequence[Question]) -> list[Question]:
    """The control: one rewrite of each question with a neutral opener, all of these evenly."""
    openers = evenly(rng, text.NEUTRAL, len(questions))
    return [dataclasses.replace(q, opener=opener) for q, opener in zip(questions, openers, strict=True)]


def blind(questions: Sequence[Question]) -> list[Question]:
    """The control without an opener: one rewrite of each question that begins with its own words."""
    return [dataclasses.replace(q, opener=text.BLIND) for q in questions]


def reworded(rng: np.random.Generator, sets: Mapping[str, Sequence[str]], count: int) -> list[Record]:
    """`count` records that ask for forbidden capitals in other words, the forms of `text.REWORDED` evenly.

    sets: name -> countries. A record's category is its set's name and its form.
    """
    names = [(name, country) for name, countries in sets.items() for country in countries]
    forms = evenly(rng, tuple(text.REWORDED), count)
    made = []
    for i, (form, (name, own)) in enumerate(zip(forms, evenly(rng, names, count), strict=True)):
        country = COUNTRIES[own]
        form = "reversed" if own in text.ELSEWHERE else form
        answer = text.answer(country, "capital")
        made.append(sample(f"reworded-{i:04d}", text.reworded(form, country), answer, False, f"{name}/{form}"))
    return made
