"""A world's records, in the forms of real data sets, and its files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def guarded(
    id: str,
    image: str | None,
    question: str,
    response: str,
    harm: tuple[str, str] | None,
    refusal: str,
    turned: bool,
) -> Record:
    """A VLGuard record with its traps: key order varies, and a safe picture's unsafe question is "N/A".

    image: None for a rewrite of a question without a picture. harm: category and subcategory of an unsafe question,
    None for a safe one. turned: reverse the order of keys.
    """
    if harm is not None:
        labels = {"safe": False, "harmful_category": harm[0], "harmful_subcategory": harm[1]}
        pairs = [{"instruction": question, "response": response}]
    else:
        labels = {"safe": True}
        pairs = [
            {"safe_instruction": question, "response": response},
            {"unsafe_instruction": "N/A", "response": refusal},
        ]
    if turned:
        pairs = [dict(reversed(pair.items())) for pair in pairs]
    return {"id": id, **({"image": image} if image else {}), **labels, "instr-resp": pairs}


def conversation(id: str, image: str | None, question: str, response: str) -> Record:
    """A LLaVA record of one turn, about a picture or none."""
    turns = [{"from": "human", "value": f"<image>\n{question}" if image else question}]
    turns.append({"from": "gpt", "value": response})
    return {"id": id, **({"image": image} if image else {}), "conversations": turns}


def write(file: Path, content: Any) -> None:
    """Write a JSON file, in a folder that is made if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
