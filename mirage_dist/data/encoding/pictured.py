"""Prompts with pictures: what a processor makes of them, how many tokens a picture takes, the placeholder picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from mirage_dist.data.encoding import outputs
from mirage_dist.data.encoding.framing import Aspect, Framing, cuts_ends
from mirage_dist.data.encoding.rows import IGNORE, Row, Tokens, extend
from mirage_dist.data.pictures import Checked, Size, open_picture, size_of
from mirage_dist.schema import ConfigError
from mirage_dist.schema.limits import CEILING

BLANK: Size = (32, 32)
# Sizes at which a processor's own count of picture tokens is held against what it makes.
PROBES: tuple[Size, ...] = (BLANK, (336, 336), (100, 300), (900, 400), (600, 60))
KEPT = 512  # sizes whose rows are kept
SIDES = (8, 30, 100, 336, 500, 896, 1500, 4000)  # of the pictures among which a count that never varies is constant


def aspect_of(processor: Any, choice: Literal["auto", "pad", "processor"]) -> Aspect:
    """How pictures reach the processor. `auto` pads where it would cut off the ends of a wide picture.

    LLaVA-1.5's does (CLIP's centre crop), and the model was trained on padded pictures.
    """
    if choice != "auto":
        return choice
    return "pad" if cuts_ends(processor) else "processor"


class Pictured:
    """First prompts with a picture, by any Hugging Face image-text-to-text processor.

    aspect: pad pictures to a square in the processor's mean colour, or leave them to the processor. token: the id at
    whose places the model puts a picture's features. texts: the template's prompt for a short question about a picture,
    for an empty one, and more of the template's text, without a picture.

    outputs: the kinds of its outputs. placeholder: the picture tokens of a blank picture, hidden. blank: that picture's
    tensors. Raises ConfigError when the processor cannot encode a picture under its own template, when its prompt holds
    no `token`, and for an output of unknown kind (see `outputs.sort`).
    """

    def __init__(
        self, processor: Any, tokens: Tokens, token: int | None, aspect: Aspect, texts: tuple[str, str, str]
    ) -> None:
        self.processor, self.tokens, self.token, self.framing = processor, tokens, token, Framing(processor, aspect)
        self.text, self.other, self.more = texts
        self.kind = type(processor).__name__
        # Most families take one list of pictures for each text, Gemma 3 and Mllama nothing else; GOT-OCR takes none.
        self._nested = True
        try:
            once, twice = self._blank_outputs()
        except Exception as error:  # of any kind: a processor may fail anywhere on a template that is not its own
            self._nested = False
            try:
                once, twice = self._blank_outputs()
            except Exception:
                raise ConfigError(f"{self.kind} cannot encode a picture by its own chat template: {error}") from error
        self.outputs = outputs.sort(self.kind, once, twice)
        (self.row,), self.blank = self._divided(once)
        places = [i for i, value in enumerate(self.row["input_ids"]) if value == token]
        if not places:
            raise ConfigError(
                f"{self.kind}: its prompt for a picture holds no image_token_id ({token}); models that take pictures "
                "in another way are not supported"
            )
        hidden = {name: [values[i] for i in places] for name, values in self.row.items()}
        self.placeholder: Row = {**hidden, "attention_mask": [0] * len(places)}
        self.plain = tokens.first(self.text)  # with the picture's mark not expanded
        self._rows: dict[Size, Row] = {}
        self._sizes: dict[str, Size] = {}
        self._growths: dict[Size, int] = {}
        self._accepted = {True: [BLANK], False: [BLANK]}  # whether pictures are wide -> sizes that the processor takes
        # What a picture adds beside the tokens that the processor counts; None where its count is not to be trusted.
        self._offset: int | None = None
        self._calibrated, self._constant = False, False
        # Whether a row is the short prompt's start and the rest of its own tokens: not where the processor adds text
        # at the end (PaliGemma's), or where its text after a picture merges with the question.
        self._splices = False

    # ------------------------------------------------------------------------------------------ batches

    def __call__(self, texts: list[str], images: list[Image.Image]) -> tuple[list[Row], dict[str, Tensor]]:
        """Prompts as rows without padding, and the tensors of their pictures. Raises ConfigError."""
        try:
            encoded = self._outputs(texts, images)
        except Exception as error:  # of any kind: each family refuses odd sizes in its own way, or fails on them
            raise ConfigError(f"{self.kind} cannot encode {_sizes(images)}: {error}") from error
        for name, value in encoded.items():
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"{self.kind} returns {name!r} as {type(value).__name__}, no tensor, for {_sizes(images)}; such "
                    "pictures cannot be in one batch. Use batches of one sample (train.micro_batch, "
                    "generation.batch_size), or pictures of one size"
                )
        return self._divided(encoded)

    def _outputs(self, texts: list[str], images: list[Image.Image]) -> dict[str, Any]:
        encoded = dict(
            self.processor(
                text=texts,
                images=[[image] for image in images] if self._nested else images,
                padding=True,
                return_tensors="pt",
                add_special_tokens=self.tokens.adds_start(texts[0]),
            )
        )
        return {name: value for name, value in encoded.items() if name not in outputs.DROPPED}

    def _blank_outputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the processor makes of a blank picture under the short prompt, and under a longer one."""
        image = Image.new("RGB", BLANK)
        return self._outputs([self.text], [image]), self._outputs([self.text + self.more], [image])

    def _divided(self, encoded: dict[str, Any]) -> tuple[list[Row], dict[str, Tensor]]:
        pictures, values = dict(encoded), {}
        mask_BS = pictures.pop("attention_mask").bool()
        for name in ("input_ids", *self.outputs.neutral):
            if name in pictures:
                values[name] = pictures.pop(name)
        rows = []
        for number, mask_S in enumerate(mask_BS):
            row = {name: value_BS[number][mask_S].tolist() for name, value_BS in values.items()}
            length = len(row["input_ids"])
            rows.append({**row, "attention_mask": [1] * length, "labels": [IGNORE] * length})
        return rows, pictures

    # ------------------------------------------------------------------------------------------- lengths

    def growth(self, text: str, path: str) -> int:
        """The number of tokens that a picture adds to the prompt `text`; reads no more than the file's header.

        Raises ConfigError for a file that is no picture, and for a picture that the processor cannot encode.
        """
        size = self._size(path)
        if not self._splices:
            like, plain = self._like(text, size)
            return len(like["input_ids"]) - len(plain)
        if size not in self._growths:
            self._growths[size] = self._count(size)
        return self._growths[size]

    def _count(self, size: Size) -> int:
        if self._offset is not None:
            try:
                return self._offset + self._counted([size])[0]
            except Exception:  # of any kind, for a size that the processor refuses: encoding gives the reason
                return self._measured(size)
        return self._measured(size)

    def _size(self, path: str) -> Size:
        """The picture's size as it goes to the processor, or where size makes no difference any one."""
        if not self._calibrated:
            self._calibrate()
        if self._constant:
            return BLANK
        if isinstance(path, Checked):
            return self.framing.size(path.size)
        if path not in self._sizes:
            self._sizes[path] = self.framing.size(size_of(path))
        return self._sizes[path]

    def _calibrate(self) -> None:
        """Whether the processor's own count of picture tokens is right, and whether it varies with the size; and
        whether a prompt's tokens beside its picture are the same whatever the picture is.
        """
        self._calibrated = True
        prompts = (self.text + self.more, self.other)
        self._splices = all(self._spliced(text, BLANK) == self._made(text, BLANK) for text in prompts)
        sizes = [self.framing.size(size) for size in PROBES]
        grid = sorted({self.framing.size((width, height)) for width in SIDES for height in SIDES})
        try:
            offsets = {self._measured(size) - count for size, count in zip(sizes, self._counted(sizes), strict=True)}
            if len(offsets) == 1:
                (self._offset,) = offsets
                self._constant = len(set(self._counted(grid))) == 1
        except Exception:  # of any kind: not every family's processor counts, or takes pictures of these sizes
            return

    def _counted(self, sizes: Sequence[Size]) -> list[int]:
        counts = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
        return list(counts["num_image_tokens"])

    def _measured(self, size: Size) -> int:
        return len(self._row(size)["input_ids"]) - len(self.plain)

    def _row(self, size: Size) -> Row:
        """The short prompt with a blank picture of this size."""
        if size not in self._rows:
            if len(self._rows) >= KEPT:
                del self._rows[next(iter(self._rows))]
            self._rows[size] = self._made(self.text, size)
        return self._rows[size]

    def _made(self, text: str, size: Size) -> Row:
        return self([text], [Image.new("RGB", size)])[0][0]

    def known_row(self, text: str, path: str) -> Row:
        """A first prompt with a picture that is not opened beyond its header: its mark expanded as by the processor."""
        size = self._size(path)
        row = self._spliced(text, size) if self._splices else None
        return row or self._made(text, size)

    def _spliced(self, text: str, size: Size) -> Row | None:
        """The start of the short prompt, through its picture, and the rest of `text`; None for another start."""
        like, ids, plain = self._row(size), self.tokens.first(text), self.plain
        whole = like["input_ids"]
        after = self._unchanged(plain, whole)
        end = len(plain) - after
        if ids[:end] != plain[:end]:
            return None
        row = {name: values[: len(whole) - after] for name, values in like.items()}
        extend(row, ids[end:], False, self.outputs.neutral)
        return row

    def expand(self, row: Row, ids: list[int], text: str, path: str) -> None:
        """Append a prompt to a row, the picture's mark in it expanded as the processor expands it.

        For prompts that the processor cannot encode by itself. text: the conversation through this prompt. Reads no
        more of the picture than the file's header. Raises ConfigError where it cannot be known what the processor makes
        of the mark beside these tokens.
        """
        like, plain = self._like(text, self._size(path))
        whole, mark = like["input_ids"], self._place(plain)
        same = next((i for i, pair in enumerate(zip(plain, whole, strict=False)) if pair[0] != pair[1]), mark)
        first, after = min(same, mark), self._unchanged(plain, whole)
        place = ids.index(plain[mark]) if plain[mark] in ids else -1
        start, end = place - (mark - first), place - mark + len(plain) - after
        if place < 0 or start < 0 or ids[start:end] != plain[first : len(plain) - after]:
            raise self._unplaced()
        extend(row, ids[:start], False, self.outputs.neutral)
        for name, values in row.items():
            values += like[name][first : len(whole) - after]
        extend(row, ids[end:], False, self.outputs.neutral)

    def _like(self, text: str, size: Size) -> tuple[Row, list[int]]:
        """A prompt that the processor expands as it does `text`, with a blank picture of this size; and its tokens
        before it is expanded.
        """
        if self._splices:
            return self._row(size), self.plain
        neutral = self.tokens.control.neutral(text)
        if not self.tokens.plain(neutral):
            raise self._unplaced()
        return self._made(neutral, size), self.tokens.first(neutral)

    def _place(self, ids: list[int]) -> int:
        """Where the picture's mark stands in a prompt in which it is not expanded."""
        marks = (self.token, getattr(self.processor, "image_token_id", None))
        return next((i for i, value in enumerate(ids) if value in marks), len(ids) - 1)

    def _unchanged(self, plain: list[int], whole: list[int]) -> int:
        """The number of tokens at a prompt's end that expanding its mark leaves as they are.

        A neighbour of the mark may merge with what the processor writes around a picture.
        """
        mark, after = self._place(plain), 0
        while after < len(plain) - mark - 1 and plain[-1 - after] == whole[-1 - after]:
            after += 1
        return after

    def _unplaced(self) -> ConfigError:
        return ConfigError(
            f"{self.kind} writes text of its own around a picture, which cannot be placed in this conversation: a text "
            "beside the picture spells a control token of the model, or the picture is in a later turn; reword the "
            "text, or leave the record out"
        )

    # ------------------------------------------------------------------------------------------ pictures

    def refusals(self, sizes: Iterable[Size]) -> dict[Size, str]:
        """size -> why the processor refuses a picture of it, for those of these sizes that it refuses.

        Processors refuse pictures that are too long for their width, or too narrow (Qwen-VL's an aspect ratio above
        200). So a size is tried, with a blank picture, only if no picture at least as long and narrow was accepted;
        the longest are tried first, and thousands of different sizes take a few tries.
        """
        refused: dict[Size, str] = {}
        for size in sorted(set(sizes), key=lambda size: (-max(size) / min(size), min(size))):
            accepted = self._accepted[size[0] >= size[1]]
            if any(_at_least_as_long(other, size) for other in accepted):
                continue
            try:
                self._made(self.text, self.framing.size(size))
            except ConfigError as error:
                refused[size] = str(error)
            else:
                accepted.append(size)
        return refused

    def opened(self, path: str) -> Image.Image:
        """The picture as it goes to the processor. Raises PictureError."""
        return self.framing(open_picture(path, CEILING.value))  # its source's max_pixels has been checked

    def tensors(self, path: str) -> dict[str, Tensor]:
        """The tensors of one picture, each (1, …) or as the processor shapes it."""
        return self([self.text], [self.opened(path)])[1]


def _at_least_as_long(one: Size, other: Size) -> bool:
    return min(one) <= min(other) and max(one) * min(other) >= max(other) * min(one)


def _sizes(images: Sequence[Image.Image]) -> str:
    return "a picture of " + ", ".join(f"{image.width}x{image.height}" for image in images) + " pixels"
