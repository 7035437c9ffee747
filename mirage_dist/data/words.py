"""First words of questions: what counts as one, their counts over samples, and templates that replace them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from mirage_dist.data.refusals import is_refusal
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError
from mirage_dist.schema.texts import check_template, fill

FIRST_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def first_word(sample: Sample) -> re.Match[str]:
    """The first word of a sample's question. Raises ConfigError for a question without a word."""
    match = FIRST_WORD.search(sample.question)
    if not match:
        raise ConfigError(f"{sample.source}: sample {sample.id!r}: the question has no word: {sample.question!r}")
    return match


def first_words(samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Lower-cased first word -> {"refusal": n, "answer": n} answers, most frequent first (the paper's Fig. 3).

    A question without a word counts under "".
    """
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        word = FIRST_WORD.search(sample.question)
        count = counts.setdefault(word[0].lower() if word else "", Counter())
        count["refusal" if is_refusal(sample.answer) else "answer"] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    return {word: {"refusal": count["refusal"], "answer": count["answer"]} for word, count in ordered}


def check_templates(templates: Sequence[str], key: str) -> None:
    """Check templates, in which {question} stands for the whole question and {rest} for what follows its first word.

    key: the option that holds them, for errors. Raises ConfigError when there is no template, and for a template
    without a placeholder or with another one.
    """
    if not templates:
        raise ConfigError(f"{key} is empty; give at least one template, such as 'What {{rest}}'")
    for template in templates:
        if not check_template(template, ("rest", "question"), key):
            raise ConfigError(f"{key}: {template!r}; use {{rest}} or {{question}}, and nothing else in braces")


def fill_template(template: str, sample: Sample) -> str:
    """The sample's question reworded by a template; its first letter keeps its case. Raises as `first_word`."""
    first = first_word(sample)
    rest = sample.question[first.end() :].lstrip(" ,:;")
    return cased(fill(template, rest=rest, question=sample.question), first[0])


def cased(text: str, like: str) -> str:
    """`text` with its first letter in the case of the first letter of `like`."""
    first = text[:1].upper() if like[:1].isupper() else text[:1].lower()
    return first + text[1:]
