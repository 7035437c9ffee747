"""VLGuard (Zong et al., ICML 2024): unsafe pictures with one question, safe ones with a safe and an unsafe question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mirage_dist.data.formats.base import BadRecord, Format, Split, get, image, text
from mirage_dist.data.sample import Sample

# Split -> the field of its questions.
FIELDS: dict[Split, str] = {
    "unsafes": "instruction",
    "safe_safes": "safe_instruction",
    "safe_unsafes": "unsafe_instruction",
}
NO_QUESTION = "N/A"  # in place of an instruction that is missing
REFERENCE = frozenset({"instruction", "response", "output"})  # of gpt4_safe_safes.json, in place of instr-resp


@dataclass(frozen=True)
class VLGuard(Format):
    """split: which pairs. keep_na: questions that are "N/A" are kept, as the paper's scripts keep them, not left out.

    table: the split of a dataset of the hub, whose key in other formats is `split`.
    """

    split: Literal["all", "unsafes", "safe_safes", "safe_unsafes"] = "all"
    keep_na: bool = False
    table: str | None = None

    signature = frozenset({"instr-resp"})
    labelled = True
    split_key = "table"

    def parse(self, record: Mapping[str, Any], number: int, dropped: Counter[str]) -> Iterator[Sample]:
        name, safe = text(record, "id"), get(record, "safe", bool)
        picture = self.picture(image(record))
        category = "" if safe else f"{text(record, 'harmful_category')}/{text(record, 'harmful_subcategory')}"
        for split in splits(safe):
            if self.split not in ("all", split):
                continue
            for pair in pairs(record, split):
                question, response = text(pair, FIELDS[split]), text(pair, "response")
                if question.strip() == NO_QUESTION and not self.keep_na:
                    dropped[f"{FIELDS[split]} is {NO_QUESTION}"] += 1
                    continue
                yield Sample(name, picture, question, response, split == "safe_safes", category, self.path)

    def of_split(self, split: Split) -> Format | None:
        return replace(self, split=split) if self.split in ("all", split) else None


def splits(safe: bool) -> tuple[Split, ...]:
    """The splits that a record with this value of `safe` has pairs of."""
    return ("safe_safes", "safe_unsafes") if safe else ("unsafes",)


def pairs(record: Mapping[str, Any], split: Split) -> list[Mapping[str, Any]]:
    """The split's pairs of instruction and response, identified by their key, since the order of keys varies.

    A record of gpt4_safe_safes.json is one safe pair, with GPT-4V's answer.
    """
    if "instr-resp" not in record and record.keys() >= REFERENCE:
        if split == "unsafes":
            raise BadRecord("field 'safe': expected true in a record with 'output', of gpt4_safe_safes.json")
        return [{FIELDS[split]: record["instruction"], "response": record["response"]}] if split == "safe_safes" else []
    listed = get(record, "instr-resp", list)
    if not all(isinstance(pair, Mapping) for pair in listed):
        raise BadRecord("field 'instr-resp': expected a list of objects")
    own = [pair for pair in listed if FIELDS[split] in pair]
    if not own:
        raise BadRecord(f"field 'instr-resp': no pair with {FIELDS[split]!r} in a record with safe={record['safe']}")
    return own
