"""Whether an answer refuses, by keywords: to keep refusals out of the answers to forget, and as cheap judges.

The lists and their known errors are in refusals.json. A bare "cannot" is not one of our phrases, because an answer
such as "the sign cannot be read" does not refuse. Report their error against labels beside any rate that rests on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

LISTS = Path(__file__).with_name("refusals.json")
_LISTS = json.loads(LISTS.read_text(encoding="utf-8"))
PHRASES: tuple[str, ...] = tuple(_LISTS["ours"]["phrases"])
PUBLISHED: tuple[str, ...] = tuple(_LISTS["published"]["phrases"])
_PATTERN = re.compile(r"\b(?:" + "|".join(map(re.escape, PHRASES)) + r")\b")


def is_refusal(text: str) -> bool:
    """True when the text contains one of our phrases of refusal anywhere."""
    return _PATTERN.search(text.lower().replace("’", "'")) is not None


def is_refusal_as_published(text: str) -> bool:
    """The test of VLGuard's and the paper's evaluation with its faults: substrings of the lower-cased text."""
    lower = text.lower()
    return lower in _LISTS["published"]["exact"] or any(phrase in lower for phrase in PUBLISHED)


def check_forget(samples: Sequence[Sample], stream: str = "forget") -> None:
    """Raise ConfigError for a stream of answers to unlearn that is empty or contains refusals.

    It contains refusals when the harvested answers were joined wrongly and the data's own answers stayed.
    """
    if not samples:
        raise ConfigError(f"data.streams.{stream}: no sample; nothing would be unlearned")
    refused = [sample.id for sample in samples if is_refusal(sample.answer)]
    if refused:
        raise ConfigError(
            f"data.streams.{stream}: {len(refused)} of {len(samples)} answers look like refusals (first ids: "
            f"{', '.join(refused[:3])}); the model would unlearn refusing. Harvest the answers to forget first "
            "(`mirage prepare`), or set data.refusals_in_forget=allow"
        )
