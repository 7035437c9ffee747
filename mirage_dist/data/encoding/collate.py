"""From samples to tensors: chat template, label mask, response index, padding or packing, placeholder picture.

The same code makes training batches and generation prompts, so both use one template and one picture transform,
and a training row starts with exactly the tokens that generation continues. A text-only row has no picture
tokens; a batch without any picture ends in a hidden placeholder, so that every batch runs the same modules.

Shapes: B rows, S positions, N predicted tokens. Packed (see `encoding.packing`), B is 1 and S is the length of all rows
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mirage_dist.data.encoding.conversation import Conversation, called, tokenizer_of
from mirage_dist.data.encoding.packing import borders, pack
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

IGNORE = -100  # label of a position without loss, as in Hugging Face models
# Token types that a processor may return; 0 is text in both.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# One unpadded sequence. Each list has one value a token (S values): input_ids, vocabulary ids; attention_mask, 1, or 0
# on the placeholder; labels, the token's own id where it is part of an answer, else IGNORE (not yet shifted); and the
# token types that the processor returns.
Row = dict[str, list[int]]
# Paths (None: the placeholder) -> the tensors that the model takes for these pictures.
Lookup = Callable[[Sequence[str | None]], dict[str, Any]]


class TooLong(ConfigError):
    """A sample that does not fit into `max_length`."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of rows, all streams in one tensor, right-padded or packed.

    inputs: the model's keyword arguments (input_ids (B, S), attention_mask or position_ids, pixel_values …).
    labels_BS: token ids on answers and their end tokens, IGNORE elsewhere. index_N: flat positions b·S + t of the
    hidden rows that predict a label. labels_N: those labels. segment_N: the sample (from 0) of each. unpadded_BS: 1 on
    every token but padding and the placeholder. text_BS: the same without picture tokens. cut: number of samples whose
    answer was truncated. edges: the position in the packed row where each sample begins, and where the last ends; None
    without packing.
    """

    inputs: dict[str, Any]
    labels_BS: Tensor
    index_N: Tensor
    labels_N: Tensor
    segment_N: Tensor
    unpadded_BS: Tensor
    text_BS: Tensor
    cut: int
    edges: list[int] | None = None


class Encoder:
    """Chat template and processor of one model, for any Hugging Face image-text-to-text processor.

    A text-only model's tokenizer serves for prompts without pictures.

    max_length: tokens of a row or a prompt, picture tokens included. on_long: refuse longer training rows, or truncate
    their last answer. image_aspect: pad pictures to a square, or leave them to the processor.
    Raises ConfigError when the tokenizer has no end token, or the processor no picture token; and, naming the sample,
    when a prompt in the template is no prefix of its conversation or the template rewrites the answer.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int = 2048,
        on_long: Literal["error", "truncate"] = "error",
        image_aspect: Literal["pad", "processor"] = "pad",
        system_prompt: str | None = None,
        packing: bool = False,
        picture_token: int | None = None,
    ) -> None:
        self.processor, self.tokenizer = processor, tokenizer_of(processor)
        own = getattr(processor, "image_token_id", None)
        self.picture_token: int | None = own if picture_token is None else picture_token
        self.conversation = Conversation(processor, system_prompt)
        self.text_only = self.conversation.text_only
        self.max_length, self.on_long = max_length, on_long
        self.image_aspect, self.packing = image_aspect, packing
        if self.tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no end token (eos_token); answers would never end")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # never attended to, so any token serves
        self.lookup: Lookup | None = None
        empty: tuple[Row, dict[str, Tensor], int] = ({"input_ids": [], "attention_mask": [], "labels": []}, {}, 0)
        placeholder = empty if self.text_only else self._placeholder()
        self.placeholder, self.placeholder_picture, self.picture_growth = placeholder

    def recall(self, lookup: Lookup) -> None:
        """From now on open no picture: take the model's input for pictures from `lookup`.

        For processors that write every picture as the same number of tokens.
        """
        self.lookup, self.placeholder_picture = lookup, lookup([None])

    @contextmanager
    def recalling(self, lookup: Lookup) -> Iterator[None]:
        """`recall` in this block."""
        before = self.lookup, self.placeholder_picture
        self.recall(lookup)
        try:
            yield
        finally:
            self.lookup, self.placeholder_picture = before

    # ------------------------------------------------------------------------------------------ batches

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Keyword arguments of `generate` for these questions: input_ids and attention_mask (B, S), left-padded, and
        the pictures. A prompt ends with the beginning of the answer if the sample has one. Raises TooLong.
        """
        rows, pictures = self._rows(samples, answered=False)
        for sample, row in zip(samples, rows, strict=True):
            self._check_prompt(sample, len(row["input_ids"]))
        tensors = self._stack(rows, left=True)
        del tensors["labels"]
        return {**tensors, **pictures}

    def prompt(self, sample: Sample) -> tuple[list[int], Image.Image | None]:
        """`prompts` for engines that run the processor themselves: token ids, with the picture's mark not expanded, and
        the picture. Raises TooLong by the length that `sizes` computes.
        """
        pieces = self.conversation.pieces(sample, answered=False)
        ids = self._first_ids(pieces[0])
        for before, piece in pairwise(pieces):
            ids = ids + self._ids_after(before, piece)
        self._check_prompt(sample, len(ids) + (self.picture_growth if sample.image is not None else 0))
        return ids, None if sample.image is None else self._picture(sample.image)

    def _check_prompt(self, sample: Sample, length: int) -> None:
        if length > self.max_length:
            raise TooLong(f"{called(sample)}: the prompt has {length} tokens, max_length is {self.max_length}")

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """One training batch. Raises TooLong for a row over max_length unless `on_long` is truncate."""
        rows, pictures = self._rows(samples, answered=True)
        cut = sum(self._truncate(sample, row) for sample, row in zip(samples, rows, strict=True))
        if not pictures and not self.text_only:
            pictures = dict(self.placeholder_picture)
            self._hide_placeholder(rows)
        if self.packing:
            tensors, edges = pack(rows)
            segment_BS = torch.repeat_interleave(torch.tensor(edges).diff()).unsqueeze(0)
        else:
            tensors, edges = self._stack(rows, left=False), None
            segment_BS = torch.arange(len(rows)).unsqueeze(1).expand_as(tensors["input_ids"])
        labels_BS, unpadded_BS = tensors.pop("labels"), tensors.pop("attention_mask")
        # Where one of several segments ends, the next one's first token is not its to predict.
        predicts_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
        predicts_BS[:, :-1] = (labels_BS[:, 1:] != IGNORE) & (segment_BS[:, 1:] == segment_BS[:, :-1])
        index_N = predicts_BS.flatten().nonzero().squeeze(1)
        attention = {"attention_mask": unpadded_BS} if edges is None else borders(edges)
        return Batch(
            inputs={**tensors, **attention, **pictures},
            labels_BS=labels_BS,
            index_N=index_N,
            labels_N=labels_BS.flatten()[index_N + 1],
            segment_N=segment_BS.flatten()[index_N],
            unpadded_BS=unpadded_BS,
            text_BS=unpadded_BS * (tensors["input_ids"] != (-1 if self.text_only else self.picture_token)),
            cut=cut,
            edges=edges,
        )

    def _hide_placeholder(self, rows: list[Row]) -> None:
        """Append the placeholder's tokens where no other token attends to them and no position shifts."""
        if self.packing:
            rows.append(self.placeholder)
        else:
            for name, values in rows[-1].items():
                values += self.placeholder[name]

    def _stack(self, rows: Sequence[Row], left: bool) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORE}

        def padded(name: str, values: list[int]) -> list[int]:
            gap = [fill.get(name, 0)] * (width - len(values))
            return gap + values if left else values + gap

        return {name: torch.tensor([padded(name, row[name]) for row in rows]) for name in rows[0]}

    def _truncate(self, sample: Sample, row: Row) -> bool:
        """Cut the end of the last answer off a row that is too long, never picture or question. True for a cut row."""
        length = len(row["input_ids"])
        if length <= self.max_length:
            return False
        before = 1 + max(i for i, label in enumerate(row["labels"]) if label == IGNORE)
        if self.on_long != "truncate" or before >= self.max_length:
            raise TooLong(self._too_long(sample, length, before))
        for values in row.values():
            del values[self.max_length :]
        return True

    def length(self, sample: Sample) -> int:
        """Tokens of a training row before it is truncated; opens no picture. Raises TooLong when `encode` would."""
        lengths = self.sizes(sample)
        total, before = sum(lengths), sum(lengths[:-1])
        if total > self.max_length and (self.on_long != "truncate" or before >= self.max_length):
            raise TooLong(self._too_long(sample, total, before))
        return total

    def sizes(self, sample: Sample) -> list[int]:
        """Tokens of a training row's first prompt, its answer, the next prompt, …, before truncation; opens no picture.

        A picture counts as many tokens as a blank one: exact for processors with a fixed size (LLaVA-1.5), an estimate
        for others.
        """
        pieces = self.conversation.pieces(sample, answered=True)
        lengths = [len(self._first_ids(pieces[0])), *(len(self._ids_after(*pair)) for pair in pairwise(pieces))]
        if sample.image is not None:
            lengths[0] += self.picture_growth
        return lengths

    def _too_long(self, sample: Sample, length: int, before: int) -> str:
        return (
            f"{called(sample)}: {length} tokens, {before} of them before the answer; data.max_length is "
            f"{self.max_length} (data.on_long={self.on_long}; truncate cuts answers only)"
        )

    # --------------------------------------------------------------------------------------------- rows

    def _rows(self, samples: Sequence[Sample], answered: bool) -> tuple[list[Row], dict[str, Tensor]]:
        """Unpadded rows, with or without the last answer, and the picture tensors in the order of their rows."""
        conversations = [self.conversation.pieces(sample, answered) for sample in samples]
        shown = [i for i, sample in enumerate(samples) if sample.image is not None]
        seen, pictures = self._see([conversations[i][0] for i in shown], [samples[i].image or "" for i in shown])
        starts = dict(zip(shown, seen, strict=True))
        rows = []
        for i, pieces in enumerate(conversations):
            row = starts[i] if i in starts else self._text_row(pieces[0])
            for number, (before, piece) in enumerate(pairwise(pieces)):
                _extend(row, self._ids_after(before, piece), answer=number % 2 == 0)
            rows.append(row)
        return rows, pictures

    def _see(self, texts: list[str], paths: list[str]) -> tuple[list[Row], dict[str, Tensor]]:
        """First prompts with their pictures: picture tokens expanded, padding removed."""
        if not texts:
            return [], {}
        if self.lookup is not None:
            return [self._row_for_lookup(text) for text in texts], self.lookup(paths)
        return self._process(texts, [self._picture(path) for path in paths])

    def _process(self, texts: list[str], images: list[Image.Image]) -> tuple[list[Row], dict[str, Tensor]]:
        encoded = dict(
            self.processor(
                text=texts,
                images=[[image] for image in images],  # every family takes one list of pictures for each text
                padding=True,
                return_tensors="pt",
                add_special_tokens=self._adds_start(texts[0]),
            )
        )
        mask_BS = encoded.pop("attention_mask").bool()
        tokens = {name: encoded.pop(name) for name in ("input_ids", *TOKEN_TYPES) if name in encoded}
        rows = []
        for number, mask_S in enumerate(mask_BS):
            row = {name: values_BS[number][mask_S].tolist() for name, values_BS in tokens.items()}
            length = len(row["input_ids"])
            rows.append({**row, "attention_mask": [1] * length, "labels": [IGNORE] * length})
        return rows, encoded

    def _text_row(self, text: str) -> Row:
        row: Row = {name: [] for name in self.placeholder}
        _extend(row, self._first_ids(text), answer=False)
        return row

    def _row_for_lookup(self, text: str) -> Row:
        """A first prompt, its picture's mark expanded as the processor expands it."""
        row = self._text_row(text)
        assert self.picture_token is not None  # a processor of pictures has one
        place = row["input_ids"].index(self.picture_token)
        seen = {**self.placeholder, "attention_mask": [1] * len(self.placeholder["input_ids"])}
        for name, values in row.items():
            values[place : place + 1] = seen[name]
        return row

    def _placeholder(self) -> tuple[Row, dict[str, Tensor], int]:
        """A blank picture: its picture tokens, hidden; its tensors; the number of tokens that it adds to a prompt."""
        kind, token = type(self.processor).__name__, self.picture_token
        text = self.conversation.text(True, [], "")
        try:
            (row,), picture = self._process([text], [Image.new("RGB", (32, 32))])
        except ValueError as error:
            raise ConfigError(f"{kind} cannot encode a picture by its own chat template: {error}") from error
        places = [i for i, value in enumerate(row["input_ids"]) if value == token]
        if not places:
            raise ConfigError(
                f"{kind}: its prompt for a picture holds no image_token_id ({token}); models that take pictures in "
                "another way are not supported"
            )
        hidden = {name: [values[i] for i in places] for name, values in row.items()}
        growth = len(row["input_ids"]) - len(self._first_ids(text))
        return {**hidden, "attention_mask": [0] * len(places)}, picture, growth

    # ------------------------------------------------------------------------------------------- tokens

    def _adds_start(self, text: str) -> bool:
        """Whether the tokenizer should add its start token: not if the template has written it."""
        start = self.tokenizer.bos_token
        return not (start and text.startswith(start))

    def _first_ids(self, text: str) -> list[int]:
        """Token ids of a conversation's first prompt, its picture's mark not expanded."""
        return self.tokenizer(text, add_special_tokens=self._adds_start(text))["input_ids"]

    def _ids_after(self, before: str, text: str) -> list[int]:
        """Token ids of `text` as the continuation of `before`, whose own tokens do not change.

        Tokenised alone, a text can get other ids: SentencePiece prepends a space to its input.
        """
        head, whole = self._ids(before), self._ids(before + text)
        return whole[len(head) :] if whole[: len(head)] == head else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # ------------------------------------------------------------------------------------------ pictures

    def picture(self, path: str | None) -> dict[str, Tensor]:
        """The model's inputs for one picture; for the placeholder without a path."""
        return (
            self.placeholder_picture
            if path is None
            else self._process([self.processor.image_token], [self._picture(path)])[1]
        )

    def _picture(self, path: str) -> Image.Image:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if self.image_aspect == "processor" or image.width == image.height:
            return image
        side = max(image.size)
        mean = getattr(self.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        red, green, blue = (int(255 * channel) for channel in mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def _extend(row: Row, ids: list[int], answer: bool) -> None:
    added = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids if answer else [IGNORE] * len(ids)}
    for name, values in row.items():
        values += added.get(name, [0] * len(ids))
