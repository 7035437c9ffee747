"""Does an answer refuse? Keyword tests, for catching refusals where an answer should stand and as cheap judges.

The lists and their known errors are in refusals.json. A bare "cannot" is not one of our phrases: an answer such as
"the sign cannot be read" is no refusal. Their errors against labels belong beside any rate they give.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

LISTS = Path(__file__).with_name("refusals.json")
_LISTS = json.loads(LISTS.read_text(encoding="utf-8"))
PHRASES: tuple[str, ...] = tuple(_LISTS["ours"]["phrases"])
PUBLISHED: tuple[str, ...] = tuple(_LISTS["published"]["phrases"])
_PATTERN = re.compile(r"\b(?:" + "|".join(map(re.escape, PHRASES)) + r")\b")


def is_refusal(text: str) -> bool:
    """True when the text holds a phrase of refusal anywhere."""
    return _PATTERN.search(text.lower().replace("’", "'")) is not None


def is_refusal_as_published(text: str) -> bool:
    """The test of VLGuard's and the paper's evaluation, faults and all: substrings of the lower-cased text."""
    lower = text.lower()
    return lower in _LISTS["published"]["exact"] or any(phrase in lower for phrase in PUBLISHED)
