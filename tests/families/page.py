"""The matrix as a table of docs/models.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from families.models import FAMILIES
from mirage_dist.config import REPOSITORY

FILE = REPOSITORY / "docs/models.md"
WRITE = "MIRAGE_WRITE_MODELS_PAGE"  # environment variable: write the page instead of comparing
BEGIN, END = "<!-- matrix: made by tests/families -->", "<!-- matrix: end -->"
TITLES = {
    "llava_llama": "LLaVA-1.5 (Llama)",
    "llava_mistral": "LLaVA (Mistral)",
    "llava_qwen2": "LLaVA (Qwen2, SigLIP)",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL (2.5, 3)",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma, as published",
    "paligemma_templated": "PaliGemma, a template added",
    "mllama": "Llama 3.2 Vision (Mllama)",
    "mistral3": "Mistral Small 3.1 (Mistral3)",
    "llama_text": "Llama, text only",
    "qwen3_text": "Qwen3, text only",
}


def table(cells: Mapping[tuple[str, str], str | None], columns: Sequence[str]) -> str:
    """The table and its notes. cells: (family, column) -> None where it works, else the message of the refusal."""
    notes: dict[str, int] = {}
    rows = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in FAMILIES:
        marks = []
        for column in columns:
            message = cells[name, column]
            marks.append("yes" if message is None else f"no {notes.setdefault(_steady(message), len(notes) + 1)}")
        rows.append(f"| {TITLES[name]} | {' | '.join(marks)} |")
    listed = [f"{number}. `{message}`" for message, number in notes.items()]
    return "\n".join([*rows, "", *listed]).rstrip() + "\n"


def _steady(message: str) -> str:
    """A message in one line, without what differs between machines: measured numbers, and the family's folder."""
    message = re.sub(r"MODELS/\w+", "MODEL", " ".join(message.split()))
    return re.sub(r"\d(\.\d+)?e[+-]\d+", "x", message).replace("`", "'")


def current() -> str:
    """The table that docs/models.md holds."""
    text = FILE.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].lstrip("\n")


def write(made: str) -> None:
    """Put a table in the place of the page's."""
    text = FILE.read_text()
    FILE.write_text(text[: text.index(BEGIN)] + f"{BEGIN}\n{made}" + text[text.index(END) :])
