"""Whether an answer refuses, by keywords: to keep refusals out of the answers to forget, and as cheap judges.

Our list and the published one, with their known errors, are in refusals.json; a recipe can name a list of its own
(`PhraseList.read`). A bare "cannot" is not one of our phrases, because an answer such as "the sign cannot be read" does
not refuse. Report their error against labels beside any rate that rests on them.
"""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import regex

from mirage_dist import disk
from mirage_dist.data import records
from mirage_dist.data.sample import Sample
from mirage_dist.data.scripts import UNSPACED, main_script, scripts
from mirage_dist.schema import ConfigError

LISTS = Path(__file__).with_name("refusals.json")
_LISTS = json.loads(LISTS.read_text(encoding="utf-8"))
PHRASES: tuple[str, ...] = tuple(_LISTS["ours"]["phrases"])
PUBLISHED: tuple[str, ...] = tuple(_LISTS["published"]["phrases"])
FEW = 0.01  # a corpus of which the list finds less to refuse may refuse in words that the list does not have
OPTIONAL = ("language", "about")  # of a list's file, beside `phrases`

_APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼʻʽʾʿˈˊˋʹ‛′‵´`＇՚ꞌ᾽᾿῾"), "'")
_HIDDEN = "\u200b"  # stands for every character that is not shown, such as a soft hyphen or a joiner
_EMPHASIS = regex.compile(r"(?<!\w)_+|_+(?!\w)")
_NOT_SHOWN = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cf}]")


def normalised(text: str) -> str:
    """A text as phrases are compared: NFKC, case folded, plain apostrophes, single spaces, without emphasis.

    Entities of HTML are characters; characters that are not shown are all the same one.
    """
    text = html.unescape(text).translate(_APOSTROPHES)
    if not text.isascii():
        text = _NOT_SHOWN.sub(_HIDDEN, unicodedata.normalize("NFKC", text))
    # Turkish distinguishes i with and without a dot; case folding cannot, without knowing the language.
    text = text.casefold().replace("i\u0307", "i").replace("ı", "i").replace("*", "")
    if "_" in text:
        text = _EMPHASIS.sub("", text)
    return " ".join(unicodedata.normalize("NFC", text).translate(_APOSTROPHES).split())


@dataclass(frozen=True)
class PhraseList:
    """A list of phrases that mark an answer as a refusal; call it with an answer.

    path: the file that names the phrases, None for our own list. A phrase is found anywhere in the normalised answer
    (see `normalised`), as whole words where its script has spaces between words; an apostrophe of it may be missing.
    """

    phrases: tuple[str, ...]
    path: str | None = None

    @classmethod
    def read(cls, path: str | None) -> PhraseList:
        """The list in a file, a JSON object {"phrases": […]} that may also have `language` and `about`; None: ours.

        Raises ConfigError naming file, field and phrase for anything else.
        """
        return OURS if path is None else _read(path)

    @property
    def sha256(self) -> str | None:
        """Of the file; None for our own list."""
        return None if self.path is None else disk.sha256(self.path)

    def __call__(self, text: str) -> bool:
        text = normalised(text)
        return (self._hidden if _HIDDEN in text else self._pattern).search(text) is not None

    def reads(self, text: str) -> bool:
        """Whether the list has phrases in the script of this answer; a text without letters is no refusal."""
        script = main_script(text)
        return script is None or script in self._scripts

    @cached_property
    def _scripts(self) -> frozenset[str]:
        return scripts(self.phrases)

    @cached_property
    def _pattern(self) -> regex.Pattern[str]:
        return _compiled(self.phrases, "", " ")

    @cached_property
    def _hidden(self) -> regex.Pattern[str]:
        """Of texts with characters that are not shown, which may stand within words and in place of spaces."""
        return _compiled(self.phrases, f"{_HIDDEN}*", f"[ {_HIDDEN}]+")


def _compiled(phrases: Sequence[str], between: str, space: str) -> regex.Pattern[str]:
    """between: what may stand between two letters."""
    parts = {"'": " ?'? ?", " ": space}
    letter, unspaced = r"[\p{L}\p{M}\p{N}_]", regex.compile(UNSPACED, regex.VERSION1)
    options = []
    for phrase in map(normalised, phrases):
        body = between.join(parts.get(c) or regex.escape(c) for c in phrase)
        before = "" if unspaced.match(phrase[0]) else f"(?<!{letter})"
        after = "" if unspaced.match(phrase[-1]) else f"(?!{letter})"
        options.append(f"{before}{body}{after}")
    return regex.compile("|".join(options))


def _read(path: str) -> PhraseList:
    content: Any = records.value(Path(path))
    form = 'expected an object such as {"language": "French", "phrases": ["je ne peux pas"]}'
    if not isinstance(content, dict) or "phrases" not in content:
        raise ConfigError(f"{path}: no list of refusal phrases; {form}")
    if unknown := sorted(content.keys() - {"phrases", *OPTIONAL}):
        raise ConfigError(f"{path}: field {unknown[0]!r} is unknown; {form}")
    for name in OPTIONAL:
        if not isinstance(content.get(name, ""), str):
            raise ConfigError(f"{path}: field {name!r}: expected text, got {content[name]!r:.80}")
    phrases = content["phrases"]
    if not isinstance(phrases, list) or not phrases:
        raise ConfigError(f"{path}: field 'phrases': expected a list of one phrase or more, got {phrases!r:.80}")
    seen: dict[str, int] = {}
    for number, phrase in enumerate(phrases):
        place = f"{path}: field 'phrases[{number}]'"
        if not isinstance(phrase, str):
            raise ConfigError(f"{place}: expected text, got {phrase!r:.80}")
        if main_script(phrase) is None:
            raise ConfigError(f"{place}: {phrase!r:.80} has no letter, so that it would match almost every answer")
        if (first := seen.setdefault(normalised(phrase), number)) != number:
            raise ConfigError(f"{place}: {phrase!r:.80} is phrases[{first}] again; leave one of them out")
    return PhraseList(tuple(phrases), path)


OURS = PhraseList(PHRASES)


def is_refusal(text: str) -> bool:
    """True when the text contains one of our phrases of refusal anywhere."""
    return OURS(text)


def is_refusal_as_published(text: str) -> bool:
    """The test of VLGuard's and the paper's evaluation with its faults: substrings of the lower-cased text."""
    lower = text.lower()
    return lower in _LISTS["published"]["exact"] or any(phrase in lower for phrase in PUBLISHED)


def check_forget(samples: Sequence[Sample], stream: str = "forget", refuses: PhraseList = OURS) -> None:
    """Raise ConfigError for a stream of answers to unlearn that is empty or contains refusals.

    It contains refusals when the harvested answers were joined wrongly and the data's own answers stayed.
    """
    if not samples:
        raise ConfigError(f"data.streams.{stream}: no sample; nothing would be unlearned")
    refused = [sample.id for sample in samples if refuses(sample.answer)]
    if refused:
        raise ConfigError(
            f"data.streams.{stream}: {len(refused)} of {len(samples)} answers look like refusals (first ids: "
            f"{', '.join(refused[:3])}); the model would unlearn refusing. Harvest the answers to forget first "
            "(`mirage prepare`), or set data.refusals_in_forget=allow"
        )
