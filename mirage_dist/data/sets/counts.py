"""The counts of each set in prepare.json."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from mirage_dist.data.sources import LeftOut


class ForgetCounts(TypedDict):
    """questions: unsafe ones. unmatched: those without an answer. left_out: reason -> answers that were not taken."""

    samples: int
    questions: int
    answers: str
    unmatched: int
    left_out: dict[str, int]
    read: LeftOut


class RetainCounts(TypedDict):
    """unsafe_questions: refusals about safe pictures. fill_skipped: drawn samples without a whole picture or answer."""

    samples: int
    safe_pairs: int
    unsafe_questions: int
    filled: int
    fill_skipped: int
    read: LeftOut


class DiversifiedCounts(TypedDict):
    """samples: what came of the questions. read: of safety data that were read for this; absent of reworded sets."""

    samples: int
    questions: int
    not_reworded: int
    read: NotRequired[LeftOut]


class ConversationCounts(TypedDict):
    """turns: questions, which are more than rows where a record has two."""

    samples: int
    turns: int
    read: LeftOut


class HelpfulCounts(TypedDict):
    """skipped: drawn samples without a whole picture or answer."""

    samples: int
    skipped: int


class Counts(TypedDict, total=False):
    """forget, retain: before they are reworded. pictures_in_both: pictures, by their bytes, that are in both sets."""

    forget: ForgetCounts
    retain: RetainCounts
    pictures_in_both: int
    diversified: DiversifiedCounts
    conversations: ConversationCounts
    helpful: HelpfulCounts
