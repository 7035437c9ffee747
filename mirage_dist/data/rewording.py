"""Questions worded anew by templates: {question} is the whole of it, {rest} what follows its first word."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mirage_dist.data.sources import FIRST_WORD, Sample
from mirage_dist.schema import ConfigError


def check(templates: Sequence[str], key: str) -> None:
    """Raise ConfigError for no template, one without a placeholder, or one with an unknown one."""
    if not templates:
        raise ConfigError(f"{key} is empty; give at least one, such as 'What {{rest}}'")
    for template in templates:
        if set(re.findall(r"{(.*?)}", template)) - {"rest", "question"} or "{" not in template:
            raise ConfigError(f"{key}: {template!r}; use {{rest}} or {{question}}, and nothing else in braces")


def fill(template: str, sample: Sample) -> str:
    """The question in the template's words, its first letter in the case of the question's."""
    first = first_word(sample)
    rest = sample.question[first.end() :].lstrip(" ,:;")
    return cased(template.replace("{rest}", rest).replace("{question}", sample.question), first[0])


def first_word(sample: Sample) -> re.Match[str]:
    """The first run of word characters of a question; raises ConfigError where there is none."""
    found = FIRST_WORD.search(sample.question)
    if not found:
        raise ConfigError(f"{sample.source}: sample {sample.id!r}: the question has no word: {sample.question!r}")
    return found


def cased(text: str, like: str) -> str:
    """`text` with its first letter in the case of the first letter of `like`."""
    first = text[:1].upper() if like[:1].isupper() else text[:1].lower()
    return first + text[1:]
