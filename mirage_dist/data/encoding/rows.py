"""Rows, each one sequence's token ids, labels and other values for each token; batches; how text becomes tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mirage_dist.data.encoding.control import Control

IGNORE = -100  # label of a position without loss, as in Hugging Face models
# Token types that a processor may return; 0 is text in both.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# One unpadded sequence. Each list has one value a token (S values): input_ids, vocabulary ids; attention_mask, 1, or 0
# on the placeholder; labels, the token's own id where it is part of an answer, else IGNORE (not yet shifted); and what
# else the processor returns for each token (see `encoding.outputs`): its type, or a nested list of numbers.
Row = dict[str, list[Any]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of rows, all streams in one tensor, right-padded or packed.

    inputs: the model's keyword arguments (input_ids (B, S), attention_mask or position_ids, pixel_values …).
    labels_BS: token ids on answers and their end tokens, IGNORE elsewhere. index_N: flat positions b·S + t of the
    hidden rows that predict a label. labels_N: those labels. segment_N, segment_BS: the sample (from 0) of each of
    them, and of every position. unpadded_BS: 1 on every token but padding and the placeholder. text_BS: the same
    without picture tokens. cut: number of samples whose answer was truncated. edges: the position in the packed row
    where each sample begins, and where the last ends; None without packing.
    """

    inputs: dict[str, Any]
    labels_BS: Tensor
    index_N: Tensor
    labels_N: Tensor
    segment_N: Tensor
    segment_BS: Tensor
    unpadded_BS: Tensor
    text_BS: Tensor
    cut: int
    edges: list[int] | None = None


class Tokens:
    """A tokenizer, for rendered texts that follow each other in a conversation (see `encoding.control`)."""

    def __init__(self, tokenizer: Any, control: Control) -> None:
        self.tokenizer, self.control = tokenizer, control
        self._ready: dict[tuple[str, bool], list[int]] = {}

    def adds_start(self, text: str) -> bool:
        """Whether the tokenizer should add its start token: not if the template has written it."""
        start = self.tokenizer.bos_token
        return not (start and text.startswith(start))

    def unknown(self, ids: Sequence[int]) -> int:
        """How many of these ids stand for text that the tokenizer has no token for; 0 where it has tokens for any.

        An unknown token that is also the start or end token is no sign of one: such tokenizers encode bytes.
        """
        own = self.tokenizer.unk_token_id
        ends = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return 0 if own is None or own in ends else list(ids).count(own)

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

    @contextmanager
    def ahead(self, texts: Collection[tuple[str, bool]]) -> Iterator[None]:
        """In this block these texts are tokenised already, all in one call, which costs a third of a call each.

        texts: each with whether the tokenizer adds its start token.
        """
        self._ready = {}
        for start in (True, False):
            own = list({text for text, with_start in texts if with_start == start})
            self._ready |= {(text, start): ids for text, ids in zip(own, self._batch(own, start), strict=True)}
        try:
            yield
        finally:
            self._ready = {}

    def _batch(self, texts: list[str], start: bool) -> list[list[int]]:
        """`_own` of each text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not texts or not isinstance(backend, Tokenizer):
            return [self._own(text, start) for text in texts]
        first = self._own(texts[0], start)  # which also switches off truncation and padding
        made = [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=start)]
        # A family's class may do more than its backend.
        return made if made[0] == first else [self._own(text, start) for text in texts]

    def _ids(self, text: str, start: bool = False) -> list[int]:
        ids = self._own(text, start)
        return ids if self.control.plain(text, ids, start) else self.control.encoded(text, start)

    def _own(self, text: str, start: bool) -> list[int]:
        if (ids := self._ready.get((text, start))) is not None:
            return ids
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
