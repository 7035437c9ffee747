"""VLGuard (Zong et al., ICML 2024): unsafe pictures with one question, safe ones with a safe and an unsafe question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from mirage_dist.data.formats.base import BadRecord, get, picture, text
from mirage_dist.data.sample import Sample
from mirage_dist.schema import SourceConfig

FIELDS = {"unsafes": "instruction", "safe_safes": "safe_instruction", "safe_unsafes": "unsafe_instruction"}
NO_QUESTION = "N/A"  # stands where an instruction is missing


def parse(config: SourceConfig, record: Mapping, number: int, dropped: Counter[str]) -> Iterator[Sample]:
    name, safe = text(record, "id"), get(record, "safe", bool)
    image = picture(config, text(record, "image"))
    category = "" if safe else f"{text(record, 'harmful_category')}/{text(record, 'harmful_subcategory')}"
    for split in ("safe_safes", "safe_unsafes") if safe else ("unsafes",):
        if config.split not in ("all", split):
            continue
        for pair in pairs(record, split):
            question, response = text(pair, FIELDS[split]), text(pair, "response")
            if question.strip() == NO_QUESTION:
                dropped[f"{FIELDS[split]} is {NO_QUESTION}"] += 1
                continue
            yield Sample(name, image, question, response, split == "safe_safes", category, config.path)


def pairs(record: Mapping, split: str) -> list[Mapping]:
    """The split's pairs of instruction and response, known by their key: their order varies."""
    found = get(record, "instr-resp", list)
    if not all(isinstance(pair, Mapping) for pair in found):
        raise BadRecord("field 'instr-resp': expected a list of objects")
    own = [pair for pair in found if FIELDS[split] in pair]
    if not own:
        raise BadRecord(f"field 'instr-resp': no pair with {FIELDS[split]!r} in a record with safe={record['safe']}")
    return own
