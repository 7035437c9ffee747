"""What Unicode says about scripts: which have no spaces between words, and which one a text is written in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

import regex

# Letters of scripts that are written without spaces between words, so that word boundaries need a dictionary (UAX #29,
# section 4; UAX #14, classes SA for Thai, Lao, Khmer and Myanmar, ID and CJ for Han and kana, AK, AP and AS for
# Balinese, Javanese and others). Tibetan marks syllables only. Full-width letters of other scripts are not meant.
UNSPACED = (
    r"[[\p{L}\p{M}]&&[\p{Line_Break=SA}\p{Line_Break=ID}\p{Line_Break=CJ}\p{Line_Break=AK}\p{Line_Break=AP}"
    r"\p{Line_Break=AS}\p{Script=Tibetan}\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]"
    r"--[\p{Script=Latin}\p{Script=Hangul}]]"
)
_UNSPACED = regex.compile(UNSPACED, regex.VERSION1)
LETTER = regex.compile(r"\p{L}")
NAMES = {"CJK": "Han"}  # where the name of a character does not begin with that of its script
SEEN = 400  # letters of a text that decide its script


def unspaced(letter: str) -> bool:
    """Whether the letter is of a script that has no spaces between words."""
    return _UNSPACED.fullmatch(letter) is not None


def script_of(letter: str) -> str:
    """The English name of a letter's script, as its Unicode name gives it; "unknown" for an unnamed one."""
    first = unicodedata.name(unicodedata.normalize("NFKC", letter)[:1], "unknown").split()[0]
    return NAMES.get(first, first.capitalize())


def scripts(texts: Iterable[str]) -> frozenset[str]:
    """The scripts of all letters of these texts."""
    return frozenset(script_of(letter) for text in texts for letter in LETTER.findall(text))


def main_script(text: str) -> str | None:
    """The script of most letters of a text's beginning; None for a text without letters."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else None
    counts = Counter(map(script_of, LETTER.findall(text)[:SEEN]))
    return counts.most_common(1)[0][0] if counts else None
