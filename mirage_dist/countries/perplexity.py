"""Perplexity on plain English: whether a model still writes as it did, beside what it was made to refuse or forget.

The text (`prose.txt`) is everyday prose of this project's own: no country, capital or flag occurs in it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from mirage_dist.data.encoding.conversation import tokenizer_of
from mirage_dist.model import weights
from mirage_dist.model.families import configs, processors, roles

PROSE = Path(__file__).with_name("prose.txt")


def perplexity(folder: Path) -> float:
    """Perplexity of a model directory, with or without a vision tower, on the prose; see `of`. In float32 on the CPU.

    Raises ConfigError when the model cannot be loaded.
    """
    config, processor = configs.load(folder), processors.load(folder)
    with weights.silent():
        model = weights.load(roles.auto_class(config), folder, config=config, dtype=torch.float32)
    return of(model.eval(), tokenizer_of(processor))


def of(model: Any, tokenizer: Any) -> float:
    """exp(−(Σ log p(token | the tokens before it in its paragraph)) / number of tokens), over all paragraphs.

    Paragraphs are tokenised as running text: without chat template, with the tokens that the tokenizer puts before a
    text of its own accord, if any. These, and the first token where there are none, are given, not predicted. Values of
    models with different tokenizers cannot be compared.
    """
    total, count = 0.0, 0
    for paragraph in paragraphs():
        plain = tokenizer(paragraph, add_special_tokens=False)["input_ids"]
        ids = tokenizer(paragraph)["input_ids"]
        start = next(i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        ids = ids[: start + len(plain)]
        first = max(start, 1)
        with torch.no_grad():
            logits_SV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, first - 1 : -1]
        labels_S = torch.tensor(ids[first:], device=model.device)
        total += float(torch.nn.functional.cross_entropy(logits_SV.float(), labels_S, reduction="sum"))
        count += len(labels_S)
    return math.exp(total / count)


def paragraphs() -> list[str]:
    """The prose, paragraph by paragraph."""
    return PROSE.read_text(encoding="utf-8").strip().split("\n\n")
