"""From samples to tensors: chat template, label mask, response index, padding or packing, placeholder picture.

The same code makes training batches and generation prompts, so both use one template and one picture transform,
and a training row starts with exactly the tokens that generation continues. A text-only row has no picture
tokens; a batch without any picture ends in a hidden placeholder, so that every batch runs the same modules.

Shapes: B rows, S positions, N predicted tokens. Packed (see `encoding.packing`), B is 1 and S is the length of all rows
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from mirage_dist.data.encoding.control import SpelledControl
from mirage_dist.data.encoding.conversation import Conversation, called, tokenizer_of
from mirage_dist.data.encoding.framing import Aspect
from mirage_dist.data.encoding.packing import borders, pack
from mirage_dist.data.encoding.pictured import Pictured, aspect_of
from mirage_dist.data.encoding.rows import IGNORE, TOKEN_TYPES, Batch, Row, Tokens, extend, stack
from mirage_dist.data.pictures import Size
from mirage_dist.data.sample import Sample
from mirage_dist.schema import ConfigError

__all__ = ["IGNORE", "TOKEN_TYPES", "Batch", "Encoder", "Lookup", "Row", "TooLong"]

# Paths (None: the placeholder) -> the tensors that the model takes for these pictures.
Lookup = Callable[[Sequence[str | None]], dict[str, Any]]


class TooLong(ConfigError):
    """A sample that does not fit into `max_length`."""


@dataclass(frozen=True)
class Turns:
    """A conversation as token ids of prompts and answers in turn, with the picture's mark not expanded.

    place: the index of the prompt that shows the picture. shown: the text through that prompt. plain: whether the
    processor can encode that text by itself: no text in it spells a control token.
    """

    ids: list[list[int]]
    place: int
    shown: str
    plain: bool


class Encoder:
    """Chat template and processor of one model, for any Hugging Face image-text-to-text processor.

    A text-only model's tokenizer serves for prompts without pictures.

    max_length: tokens of a row or a prompt, picture tokens included. on_long: refuse longer training rows, truncate
    their last answer, or all that follows the picture's question (`truncate_turns`). image_aspect: see
    `pictured.aspect_of`; the attribute is what it comes to. picture_token: the id at whose places the model puts a
    picture's features (`roles.picture_token`); the processor's own where it is not given. template_options: variables
    of the chat template. conversation: how samples become text.
    Raises ConfigError when the tokenizer has no end token, when the template does not have an option, or when the
    processor is not supported (see `Pictured`); and, naming the sample, when the template rewrites earlier turns or the
    answer.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int = 2048,
        on_long: Literal["error", "truncate", "truncate_turns"] = "error",
        image_aspect: Literal["auto", "pad", "processor"] = "auto",
        system_prompt: str | None = None,
        packing: bool = False,
        picture_token: int | None = None,
        template_options: Mapping[str, Any] | None = None,
        conversation: type[Conversation] = Conversation,
    ) -> None:
        self.processor, self.tokenizer = processor, tokenizer_of(processor)
        own = getattr(processor, "image_token_id", None)
        self.picture_token: int | None = own if picture_token is None else picture_token
        self.conversation = conversation(processor, system_prompt, template_options, self.picture_token)
        self.text_only = self.conversation.text_only
        self.max_length, self.on_long = max_length, on_long
        self.image_aspect: Aspect = aspect_of(processor, image_aspect)
        self.packing = packing
        if self.tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no end token (eos_token); answers would never end")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # never attended to, so any token serves
        self.lookup: Lookup | None = None
        self.tokens = Tokens(self.tokenizer, self.conversation.control)
        self.pictured = None if self.text_only else self._pictured()
        self.placeholder: Row = {"input_ids": [], "attention_mask": [], "labels": []}
        self.placeholder_picture: dict[str, Tensor] = {}
        self.neutral: dict[str, Any] = {}
        if self.pictured is not None:
            self.placeholder, self.placeholder_picture = self.pictured.placeholder, dict(self.pictured.blank)
            self.neutral = self.pictured.outputs.neutral
        self.empty: Row = {name: [] for name in self.placeholder}
        self.by_row = self.pictured is not None and self.pictured.outputs.by_row
        if self.by_row and packing:
            raise ConfigError(
                f"data.packing: {type(processor).__name__} gives each row the pictures that its tokens attend to, so "
                "sequences with pictures cannot be in one row; set it to false"
            )

    def _pictured(self) -> Pictured:
        try:
            probes = ((True, "What is this?"), (True, ""), (False, "What is this?"))
            text, other, more = (self.conversation.text(picture, [], words) for picture, words in probes)
        except (TemplateError, ValueError) as error:
            raise ConfigError(f"the chat template takes no question about a picture: {error}") from error
        more += self.tokenizer.eos_token  # a token at least
        return Pictured(self.processor, self.tokens, self.picture_token, self.image_aspect, (text, other, more))

    def recall(self, lookup: Lookup) -> None:
        """From now on open no picture beyond its header: take the model's input for pictures from `lookup`."""
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
        if self.by_row and pictures:
            pictures = self._for_each_row(samples, pictures)
        elif self.by_row:  # a model that is shown nothing takes no relation to it either
            rows = [{name: values for name, values in row.items() if name not in self.neutral} for row in rows]
        tensors = stack(rows, left=True, fill=self._fill)
        del tensors["labels"]
        return {**tensors, **pictures}

    def prompt(self, sample: Sample) -> tuple[list[int], Image.Image | None]:
        """`prompts` for engines that run the processor themselves: token ids, with the picture's mark not expanded, and
        the picture. Raises TooLong by the length that `sizes` computes.
        """
        turns = self._turns(sample, answered=False)
        ids = [i for piece in turns.ids for i in piece]
        self._check_prompt(sample, len(ids) + self._growth(sample, turns))
        if sample.image is None or self.pictured is None:
            return ids, None
        return ids, self.pictured.opened(sample.image)

    def _check_prompt(self, sample: Sample, length: int) -> None:
        if length > self.max_length:
            raise TooLong(f"{called(sample)}: the prompt has {length} tokens, max_length is {self.max_length}")

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """One training batch. Raises TooLong for a row over max_length unless `on_long` is truncate."""
        rows, pictures = self._rows(samples, answered=True)
        cut = sum(self._truncate(sample, row) for sample, row in zip(samples, rows, strict=True))
        if self.by_row:
            pictures = self._for_each_row(samples, pictures)
        elif not pictures and not self.text_only:
            pictures = dict(self.placeholder_picture)
            self._hide_placeholder(rows)
        if self.packing:
            tensors, edges = pack(rows)
            segment_BS = torch.repeat_interleave(torch.tensor(edges).diff()).unsqueeze(0)
        else:
            tensors, edges = stack(rows, left=False, fill=self._fill), None
            segment_BS = torch.arange(len(rows)).unsqueeze(1).expand_as(tensors["input_ids"]).contiguous()
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
            segment_BS=segment_BS,
            unpadded_BS=unpadded_BS,
            text_BS=unpadded_BS * (tensors["input_ids"] != (-1 if self.text_only else self.picture_token)),
            cut=cut,
            edges=edges,
        )

    def _for_each_row(self, samples: Sequence[Sample], pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Picture tensors with one entry for each row: the blank picture, which its row does not attend to, where it
        has none.
        """
        shown = torch.tensor([sample.image is not None for sample in samples])
        every = {}
        for name, blank in self.placeholder_picture.items():
            every[name] = blank.repeat(len(samples), *[1] * (blank.ndim - 1))
            if name in pictures:
                every[name][shown] = pictures[name]
        return every

    def _hide_placeholder(self, rows: list[Row]) -> None:
        """Append the placeholder's tokens where no other token attends to them and no position shifts."""
        if self.packing:
            rows.append(self.placeholder)
        else:
            for name, values in rows[-1].items():
                values += self.placeholder[name]

    @property
    def _fill(self) -> dict[str, Any]:
        return {**self.neutral, "input_ids": self.tokenizer.pad_token_id, "labels": IGNORE}

    def _truncate(self, sample: Sample, row: Row) -> bool:
        """Cut the end off a row that is too long, as far as `on_long` allows. True for a cut row."""
        length = len(row["input_ids"])
        if length <= self.max_length:
            return False
        self.check_cut(sample, self.sizes(sample))
        for values in row.values():
            del values[self.max_length :]
        return True

    def length(self, sample: Sample) -> int:
        """Tokens of a training row before it is truncated; reads no more of a picture than its header.

        Raises TooLong when `encode` would, and ConfigError for a picture that cannot be encoded.
        """
        lengths = self.sizes(sample)
        self.check_cut(sample, lengths)
        return sum(lengths)

    def check_cut(self, sample: Sample, lengths: Sequence[int]) -> None:
        """Raise TooLong unless a row of these `sizes` fits or may be cut. An answer's first token always stays."""
        if sum(lengths) <= self.max_length:
            return
        kept = lengths[: 2 * sample.shown + 1] if self.on_long == "truncate_turns" else lengths[:-1]
        if self.on_long == "error" or sum(kept) >= self.max_length:
            raise TooLong(self._too_long(sample, sum(lengths), sum(kept)))

    def sizes(self, sample: Sample) -> list[int]:
        """Tokens of a training row's first prompt, its answer, the next prompt, …, before truncation.

        They are those of `encode`, picture tokens included, which follow from the size in the picture's header.
        Raises ConfigError for a picture that cannot be encoded.
        """
        return next(self.sizes_of([sample], [self.conversation.pieces(sample, answered=True)]))[0]

    def sizes_of(self, samples: Sequence[Sample], pieces: Sequence[list[str]]) -> Iterator[tuple[list[int], int]]:
        """`sizes` of each sample, of whose conversations these are the pieces, and the number of tokens in its answers
        that stand for text without a token (see `Tokens.unknown`). Raises as `sizes`, at its turn.
        """
        for sample, own in zip(samples, pieces, strict=True):
            turns = self._encoded(sample, own)
            lengths = [len(ids) for ids in turns.ids]
            lengths[2 * sample.shown] += self._growth(sample, turns)
            yield lengths, sum(map(self.tokens.unknown, turns.ids[1::2]))

    def _growth(self, sample: Sample, turns: Turns) -> int:
        """The number of tokens that the sample's picture adds."""
        if sample.image is None or self.pictured is None:
            return 0
        if turns.place or not turns.plain:
            row = self._placed(turns, sample, self._known(turns, sample))
            return len(row["input_ids"]) - sum(map(len, turns.ids[: turns.place + 1]))
        try:
            return self.pictured.growth(turns.shown, sample.image)
        except ConfigError as error:
            raise ConfigError(f"{called(sample)}: {error}") from error

    def _too_long(self, sample: Sample, length: int, before: int) -> str:
        return (
            f"{called(sample)}: {length} tokens, {before} of them before the answer; data.max_length is "
            f"{self.max_length} (data.on_long={self.on_long}; truncate cuts answers only, truncate_turns later turns)"
        )

    # --------------------------------------------------------------------------------------------- rows

    def _turns(self, sample: Sample, answered: bool) -> Turns:
        """A sample's conversation as text and tokens. Raises ConfigError, naming the sample."""
        return self._encoded(sample, self.conversation.pieces(sample, answered))

    def _encoded(self, sample: Sample, pieces: list[str]) -> Turns:
        try:
            ids = [self.tokens.first(pieces[0]), *(self.tokens.after(*pair) for pair in pairwise(pieces))]
        except SpelledControl as error:
            raise SpelledControl(f"{called(sample)}: {error}") from error
        shown = "".join(pieces[: 2 * sample.shown + 1])
        return Turns(ids, 2 * sample.shown, shown, sample.image is None or self.tokens.plain(shown))

    def _rows(self, samples: Sequence[Sample], answered: bool) -> tuple[list[Row], dict[str, Tensor]]:
        """Unpadded rows, with or without the last answer, and the picture tensors in the order of their rows."""
        conversations = [self._turns(sample, answered) for sample in samples]
        shown = [i for i, sample in enumerate(samples) if sample.image is not None]
        seen, pictures = self._see([conversations[i] for i in shown], [samples[i] for i in shown])
        starts = dict(zip(shown, seen, strict=True))
        rows = []
        for i, turns in enumerate(conversations):
            row = starts.get(i) or {name: [] for name in self.empty}
            first = turns.place + 1 if i in starts else 0
            for number, ids in enumerate(turns.ids[first:], start=first):
                extend(row, ids, number % 2 == 1, self.neutral)
            rows.append(row)
        return rows, pictures

    def _see(self, several: list[Turns], samples: list[Sample]) -> tuple[list[Row], dict[str, Tensor]]:
        """Conversations through their pictures: picture tokens expanded, padding removed, earlier answers labelled."""
        pictured, paths = self.pictured, [sample.image or "" for sample in samples]
        if not several or pictured is None:
            return [], {}
        if self.lookup is not None:
            made, pictures = [self._known(*pair) for pair in zip(several, samples, strict=True)], self.lookup(paths)
        else:
            # What the processor cannot encode by itself is put together here; it then sees another text.
            made, pictures = self._made([t.shown if t.plain else pictured.text for t in several], samples)
        return [self._placed(*parts) for parts in zip(several, samples, made, strict=True)], pictures

    def _known(self, turns: Turns, sample: Sample) -> Row | None:
        """What the processor makes of a picture that is not opened; None where it cannot encode the text."""
        assert self.pictured is not None
        return self.pictured.known_row(turns.shown, sample.image or "") if turns.plain else None

    def _made(self, texts: list[str], samples: list[Sample]) -> tuple[list[Row], dict[str, Tensor]]:
        """What the processor makes of texts with their pictures. Raises ConfigError, naming the sample."""
        assert self.pictured is not None
        images = [self.pictured.opened(sample.image or "") for sample in samples]
        try:
            return self.pictured(texts, images)
        except ConfigError:
            for text, image, sample in zip(texts, images, samples, strict=True):
                try:
                    self.pictured([text], [image])
                except ConfigError as error:
                    raise ConfigError(f"{called(sample)}: {error}") from error
            raise

    def refusals(self, sizes: Iterable[Size]) -> dict[Size, str]:
        """size -> why the model's processor refuses a picture of it, for those of these sizes that it refuses."""
        return {} if self.pictured is None else self.pictured.refusals(sizes)

    def _placed(self, turns: Turns, sample: Sample, made: Row | None) -> Row:
        """The row through the picture, with the labels of earlier answers. made: the processor's."""
        assert self.pictured is not None
        before = [i for ids in turns.ids[: turns.place] for i in ids]
        if turns.plain and made is not None and made["input_ids"][: len(before)] == before:
            start = 0
            for number, ids in enumerate(turns.ids[: turns.place]):
                if number % 2:
                    made["labels"][start : start + len(ids)] = ids
                start += len(ids)
            return made
        row: Row = {name: [] for name in self.empty}
        for number, ids in enumerate(turns.ids[: turns.place]):
            extend(row, ids, number % 2 == 1, self.neutral)
        try:
            self.pictured.expand(row, turns.ids[turns.place], turns.shown, sample.image or "")
        except ConfigError as error:
            raise ConfigError(f"{called(sample)}: {error}") from error
        return row

    def picture(self, path: str | None) -> dict[str, Tensor]:
        """The model's inputs for one picture; for the placeholder without a path."""
        assert self.pictured is not None  # a text-only model has none
        return self.placeholder_picture if path is None else self.pictured.tensors(path)
