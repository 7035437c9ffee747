"""Rows: one sequence's token ids, labels and further values for each token; how text becomes token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mirage_dist.data.encoding.control import Control

IGNORE = -100  # label of a position without loss, as in Hugging Face models
# Token types that a processor may return; 0 is text in both.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# One unpadded sequence. Each list has one value a token (S values): input_ids, vocabulary ids; attention_mask, 1, or 0
# on the placeholder; labels, the token's own id where it is part of an answer, else IGNORE (not yet shifted); and what
# else the processor returns for each token (see `encoding.outputs`): its type, or a nested list of numbers.
Row = dict[str, list[Any]]


class Tokens:
    """A tokenizer, for rendered texts that follow each other in a conversation (see `encoding.control`)."""

    def __init__(self, tokenizer: Any, control: Control) -> None:
        self.tokenizer, self.control = tokenizer, control

    def adds_start(self, text: str) -> bool:
        """Whether the tokenizer should add its start token: not if the template has written it."""
        start = self.tokenizer.bos_token
        return not (start and text.startswith(start))

    def first(self, text: str) -> list[int]:
        """Token ids of a conversation's first prompt, its picture's mark not expanded. Raises SpelledControl."""
        return self._ids(text, self.adds_start(text))

    def plain(self, text: str) -> bool:
        """Whether the tokenizer alone encodes a conversation's beginning, so that a processor may."""
        start = self.adds_start(text)
        return self.control.plain(text, self._own(text, start), start)

    def after(self, before: str, text: str) -> list[int]:
        """Token ids of `text` as the continuation of `before`, whose own tokens do not change.

        Tokenised alone, a text can get other ids: SentencePiece prepends a space to its input. Raises SpelledControl.
        """
        head, whole = self._ids(before), self._ids(before + text)
        return whole[len(head) :] if whole[: len(head)] == head else self._ids(text)

    def _ids(self, text: str, start: bool = False) -> list[int]:
        ids = self._own(text, start)
        return ids if self.control.plain(text, ids, start) else self.control.encoded(text, start)

    def _own(self, text: str, start: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=start)["input_ids"]


def extend(row: Row, ids: list[int], answer: bool, neutral: dict[str, Any]) -> None:
    """Append tokens of text; an answer's are labelled.

    neutral: name -> value of a token that has nothing to do with any picture. A token's relation to pictures (a nested
    value) goes on as that of the last token.
    """
    added = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids if answer else [IGNORE] * len(ids)}
    for name, values in row.items():
        value = neutral.get(name, 0)
        if isinstance(value, list) and values:
            value = values[-1]
        values += added.get(name, [value] * len(ids))


def stack(rows: Sequence[Row], left: bool, fill: dict[str, Any]) -> dict[str, Tensor]:
    """Rows as tensors (B, S, …), padded on one side. fill: name -> value of padding; default 0."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, values: list[Any]) -> list[Any]:
        gap = [fill.get(name, 0)] * (width - len(values))
        return gap + values if left else values + gap

    return {name: torch.tensor([padded(name, row[name]) for row in rows]) for name in rows[0]}
