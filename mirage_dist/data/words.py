"""First words of questions: what counts as one, their counts over samples, and templates that replace them.

A word ends where Unicode ends it (UAX #29), never within a grapheme cluster, in NFC; a contraction or a compound with
hyphens is one word. Numbering, quotation marks, brackets and mark-up before a question are not its first word. Scripts
without spaces between words (see `data.scripts`) have none that can be measured.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import regex

from mirage_dist.data.refusals import is_refusal
from mirage_dist.data.sample import Sample
from mirage_dist.data.scripts import UNSPACED, script_of
from mirage_dist.schema import ConfigError
from mirage_dist.schema.texts import check_template, fill

LOOK_BACK = 64  # characters before a word among which the start of its cluster is looked for
END = " .?!"  # what may end a question
PLACEHOLDERS = ("rest", "body", "question")  # of templates of questions
NOT_MEASURED = "(not measured)"  # in place of the first word of a question whose script has no spaces between words

# `(?w)\b` is a boundary of UAX #29, without its rule for colons, which join words in Swedish only.
_WORD = regex.compile(
    r"(?w)[\p{L}\p{N}][^:]*?(?:\b|(?=:))(?:[-\u2010\u2011][\p{L}\p{N}][^:]*?(?:\b|(?=:)))*", regex.VERSION1
)
_UNSPACED = regex.compile(UNSPACED, regex.VERSION1)
_CLUSTER = regex.compile(r"\X")
_PLAIN = regex.compile(r"[A-Za-z]{2,}(?=[ ?])")  # most questions begin so, and need no rule
_TEXT = regex.compile(r"[\p{L}\p{N}]")
_TAG = r"<[/!?]?\p{L}[^<>]{0,300}>|<!--.{0,300}?-->|<\|[^|<>]{0,80}\|>"
# Entities of HTML that are no letters, as far as they stand around words.
_ENTITY = (
    r"&(?:quot|apos|nbsp|ensp|emsp|lt|gt|amp|[lr][ds]quo|[lr]aquo|[bs]dquo|bull|middot|hellip|[nm]dash|iexcl|iquest"
    r"|\#0?(?:3[2-9]|4[0-7]|9[1-6]|16[01]|171|18[37]|191|8[12]\d\d)|\#[xX](?:0?2[\da-fA-F]|[aA]0|20[0-6][\da-fA-F]));"
)
_NUMBER, _LETTER = r"\p{Nd}{1,3}", rf"(?:(?!{UNSPACED})\p{{L}}\p{{M}}*|[ivxIVX]{{1,5}})"
# What may stand before a first word, one piece at a time.
_LEAD = regex.compile(
    rf"""(?:{_TAG}
    |!\[[^\[\]]{{0,300}}\]\([^()\s]{{0,300}}\)         # a picture in Markdown
    |\\[A-Za-z]+\*?(?=\{{)                             # a command of LaTeX
    |{_ENTITY}
    |[(\[{{（［【]\s?(?:{_NUMBER}|{_LETTER})\s?[)\]}}）］】]   # (1) [a] (iv)
    |(?<![\p{{L}}\p{{N}}])(?:
      {_NUMBER}(?:\.{_NUMBER})*[.):．、）：](?!\p{{N}})      # 1. 2) 1.2.
      |\#{_NUMBER}(?=\s)                               # #1
      |{_LETTER}[.):](?=\s)                            # a) B. Q:
      |(?i:q|question)\s?{_NUMBER}?\s?[.):](?=\s)      # Q1: Question 2.
      |[\d#*]\uFE0F?\u20E3                             # a keycap
    )
    |[\u2460-\u249b\u24ea-\u24ff\u2776-\u2793]         # a number in a circle
    |[^\p{{L}}\p{{N}}]
    )*+""",
    regex.VERSION1 | regex.VERBOSE | regex.DOTALL,
)
_GAP = regex.compile(rf"(?:{_TAG}|{_ENTITY}|[^\p{{L}}\p{{N}}])*+", regex.VERSION1 | regex.DOTALL)


@dataclass(frozen=True)
class Opening:
    """The first word of a text: `text`[`start`:`end`].

    text: in NFC. script: None, or the script in which the text begins, if it has no spaces between words; the first
    word then cannot be measured, and the range holds its first letters only.
    """

    text: str
    start: int
    end: int
    script: str | None = None

    @property
    def word(self) -> str:
        """The word as it is written."""
        return self.text[self.start : self.end]

    @property
    def measured(self) -> bool:
        return self.script is None

    @property
    def key(self) -> str:
        """The word by which questions are counted: in lower case, or NOT_MEASURED."""
        return _lower(self.word) if self.measured else NOT_MEASURED

    @property
    def goes_on(self) -> bool:
        """Whether there is a letter or a digit after the first word."""
        return _TEXT.search(self.text, self.end) is not None

    def replaced(self, word: str) -> str:
        """The text with `word` in place of its first word, in the case of that; everything around it stays."""
        return self.text[: self.start] + cased(word, self.word) + self.text[self.end :]

    def after(self, openings: Sequence[str] = ()) -> str:
        """The text after its first word, or after the longest of `openings` that begins there, in any case."""
        begun, end = self.text[self.start :], self.end
        for phrase in (unicodedata.normalize("NFC", opening) for opening in openings):
            goes_on = _TEXT.match(begun, len(phrase)) is not None
            if not goes_on and _lower(begun[: len(phrase)]) == _lower(phrase):
                end = max(end, self.start + len(phrase))
        return self.text[end:].lstrip(" ,:;")

    def characters(self, count: int) -> str:
        """The first letters and digits (grapheme clusters) from the first word on, in lower case."""
        clusters = (match[0] for match in _CLUSTER.finditer(self.text, self.start))
        return _lower("".join(islice((cluster for cluster in clusters if _TEXT.search(cluster)), count)))


def opening(text: str) -> Opening | None:
    """The opening of a text, None when it has no letter and no digit."""
    text = unicodedata.normalize("NFC", text)
    if (plain := _PLAIN.match(text)) and plain[0].lower() != "question":
        return Opening(text, 0, plain.end())
    lead = _LEAD.match(text)
    return _word_from(text, lead.end() if lead else 0) or _word_from(text, 0)


def first_word(sample: Sample) -> Opening:
    """The opening of a sample's question. Raises ConfigError for a question without a word."""
    first = opening(sample.question)
    if first is None:
        raise ConfigError(f"{sample.source}: sample {sample.id!r}: the question has no word: {sample.question!r}")
    return first


def words(text: str) -> Iterator[str]:
    """The words of a text in lower case, up to the first that cannot be measured."""
    here = opening(text)
    while here is not None and here.measured:
        yield _lower(here.word)
        gap = _GAP.match(here.text, here.end)
        here = _word_from(here.text, gap.end() if gap else here.end)


def is_word(text: str) -> bool:
    """Whether a text is one word and nothing else; of a script without spaces, whether it is letters of it alone."""
    first = opening(text)
    if first is None or first.start:
        return False
    return first.end == len(first.text) if first.measured else all(map(_UNSPACED.match, first.text))


def begins_with(text: str, options: Sequence[str]) -> bool:
    """Whether the first word of a text is one of these words, in any case."""
    first = opening(text)
    if first is None:
        return False
    if first.measured:
        return _lower(first.word) in map(_lower, options)
    return _lower(first.text[first.start :]).startswith(tuple(map(_lower, options)))


def first_words(samples: Sequence[Sample], refuses: Callable[[str], bool] = is_refusal) -> dict[str, dict[str, int]]:
    """Lower-cased first word -> {"refusal": n, "answer": n} answers, most frequent first (the paper's Fig. 3).

    A question without a word counts under "", one without a measurable first word under NOT_MEASURED.
    """
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        first = opening(sample.question)
        count = counts.setdefault(first.key if first else "", Counter())
        count["refusal" if refuses(sample.answer) else "answer"] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    return {word: {"refusal": count["refusal"], "answer": count["answer"]} for word, count in ordered}


def check_templates(templates: Sequence[str], key: str) -> None:
    """Check templates of questions (see `fill_template`).

    key: the option that holds them, for errors. Raises ConfigError when there is no template, and for a template
    without a placeholder or with another one.
    """
    if not templates:
        raise ConfigError(f"{key} is empty; give at least one template, such as 'What {{rest}}'")
    for template in templates:
        if not check_template(template, PLACEHOLDERS, key):
            raise ConfigError(
                f"{key}: {template!r}; use {{rest}}, {{body}} or {{question}}, and nothing else in braces"
            )


def fill_template(template: str, sample: Sample, openings: Sequence[str] = ()) -> str | None:
    """The sample's question reworded by a template; its first letter keeps its case.

    {question}: the whole question. {rest}: what follows its first word, or the longest of `openings` that it begins
    with. {body}: the same without the sign that ends the question.
    What stands before the first word stays before the template, unless this has the whole {question}. None for a
    template with {rest} or {body} when the first word cannot be measured. Raises as `first_word`.
    """
    first = first_word(sample)
    names = check_template(template, PLACEHOLDERS, "template")
    if not names <= {"question"} and not first.measured:
        return None
    before = "" if "question" in names else first.text[: first.start]
    rest = first.after(openings) if first.measured else ""
    filled = fill(template, rest=rest, body=rest.rstrip(END), question=first.text)
    return before + cased(filled, first.word)


def cased(text: str, like: str) -> str:
    """`text` in NFC, its first letter in the case of the first letter of `like`, where that has one."""
    text, first = unicodedata.normalize("NFC", text), like[:1]
    if first.isupper() or first.istitle():
        return text[:1].title() + text[1:]
    return unicodedata.normalize("NFC", text[:1].lower() + text[1:]) if first.islower() else text


def _word_from(text: str, place: int) -> Opening | None:
    """The first word at `place` or after it."""
    match = _WORD.search(text, place)
    if match is None:
        return None
    start, end = match.start(), match.start() + len(match[0].rstrip("_"))
    if not text.isascii():
        start, end = _whole_clusters(text, start, end)
    letter = _UNSPACED.match(text, start) or _UNSPACED.match(text, end)
    return Opening(text, start, end, script_of(letter[0]) if letter else None)


def _whole_clusters(text: str, start: int, end: int) -> tuple[int, int]:
    """The range, grown to whole grapheme clusters."""
    for cluster in _CLUSTER.finditer(text, max(0, start - LOOK_BACK)):
        if cluster.end() <= start:
            continue
        start = min(start, cluster.start())
        if cluster.end() >= end:
            return start, cluster.end()
    return start, end


def _lower(word: str) -> str:
    return unicodedata.normalize("NFC", word.lower())
