"""How a picture is laid out for the processor: padded to a square, or as it is, in memory that its own size bounds.

What a processor does is measured on small pictures, not looked up by its name: whether it cuts off the ends of a wide
picture, whether it pads to a square itself, and to which size it scales a square. A picture is then scaled to that size
while it is padded, which gives what padding it at full size gives, bit for bit, without a square of the longer side.
"""

from __future__ import annotations

from functools import cached_property
from math import ceil, floor, isqrt
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from mirage_dist.data.pictures import Size

Aspect = Literal["pad", "processor"]
LONG = 8  # a picture is long when its sides are to each other as 8:1, or more
ROOM = 1344  # pixels: side of a square that is small beside a model's input
STRIP = 1 << 20  # pixels that are padded at once


def cuts_ends(processor: Any) -> bool:
    """Whether the processor cuts off the ends of a wide picture, as CLIP's centre crop does."""
    plain = Image.new("RGB", (96, 32))
    ends = Image.new("RGB", (96, 32), "white")
    ends.paste(plain.crop((0, 0, 80, 32)), (8, 0))
    return _same(getattr(processor, "image_processor", None), plain, ends)


class Framing:
    """The picture that goes to a processor in place of another one, and its size."""

    def __init__(self, processor: Any, aspect: Aspect) -> None:
        self.processor, self.aspect = processor, aspect
        self.images = getattr(processor, "image_processor", None)
        mean = getattr(self.images, "image_mean", None) or (0.5, 0.5, 0.5)
        self.colour = (int(255 * mean[0]), int(255 * mean[1]), int(255 * mean[2]))
        self.resample = getattr(self.images, "resample", None)

    def size(self, size: Size) -> Size:
        """The size of the picture that goes to the processor for one of this size."""
        longer, shorter = max(size), min(size)
        if longer == shorter:
            return size
        if self._pads(size):
            side = self._side(size)
            return side, side
        if longer > LONG * shorter and self._cuts:
            width, height = size
            # An even number of pixels less: the centre stays where it is.
            longer -= (longer - LONG * shorter) // 2 * 2
            return (longer, height) if width > height else (width, longer)
        return size

    def __call__(self, picture: Image.Image) -> Image.Image:
        """The picture that goes to the processor."""
        size = self.size(picture.size)
        if size == picture.size:
            return picture
        if not self._pads(picture.size):
            left, top = (picture.width - size[0]) // 2, (picture.height - size[1]) // 2
            return picture.crop((left, top, left + size[0], top + size[1]))
        if size[0] == max(picture.size):
            return _square(picture, self.colour)
        if size[0] == self._target:
            return scaled_square(picture, size[0], self.colour, Image.Resampling(self.resample))
        scale = size[0] / max(picture.size)
        width, height = (max(1, round(length * scale)) for length in picture.size)
        return _square(picture.resize((width, height), Image.Resampling.BICUBIC), self.colour)

    def _pads(self, size: Size) -> bool:
        longer, shorter = max(size), min(size)
        # For a processor that pads, the result is the same; its own square of the full size would take more memory.
        costly = longer > LONG * shorter or (longer > ROOM and longer > 2 * shorter)
        return self.aspect == "pad" or (costly and self._pads_itself)

    def _side(self, size: Size) -> int:
        """The side of the square: the picture's longer one, or what that is scaled to."""
        side, room = max(size), max(4 * size[0] * size[1], ROOM**2)
        if self._target is not None and side > self._target:
            return self._target
        return side if side**2 <= room else isqrt(room)

    @cached_property
    def _target(self) -> int | None:
        """The side to which the processor scales every square, None where that is not sure.

        It is sure when it makes the same of a picture that `scaled_square` has scaled and of one that is only padded.
        """
        if not isinstance(self.resample, int):
            return None
        try:
            made = _made(self.images, _noise((64, 64)))
            side = int(made["pixel_values"].shape[-1])
            if made["pixel_values"].shape[-2] != side:
                return None
            method = Image.Resampling(self.resample)
            for noise in map(_noise, ((2 * side + 37, side // 2 + 5), (side // 2 + 3, 3 * side + 11))):
                if not _same(self.images, _square(noise, self.colour), scaled_square(noise, side, self.colour, method)):
                    return None
        except Exception:  # of any kind: a family's own code
            return None
        return side

    @cached_property
    def _pads_itself(self) -> bool:
        noise = _noise((150, 40))
        return self._target is not None and _same(self.images, noise, _square(noise, self.colour))

    @cached_property
    def _cuts(self) -> bool:
        return cuts_ends(self.processor)


def _noise(size: Size) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _made(images: Any, picture: Image.Image) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value) for name, value in images(images=[picture], return_tensors="pt").items()}


def _same(images: Any, one: Image.Image, other: Image.Image) -> bool:
    """Whether an image processor makes the same of two pictures. False where it fails on them, or is None."""
    try:
        first, second = _made(images, one), _made(images, other)
        return all(torch.equal(value, second[name]) for name, value in first.items())
    except Exception:  # of any kind: a family's own code, which may take pictures with their text only
        return False


def _square(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longer side."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def scaled_square(
    picture: Image.Image, side: int, colour: tuple[int, int, int], resample: Image.Resampling
) -> Image.Image:
    """`_square`, scaled to a smaller `side`, in memory of about `side` × the picture's longer side.

    PIL scales rows first and columns then, and of rows or columns of one colour it makes the same colour. So rows are
    scaled before those of the ground are added. Long pictures take less: see `_scaled_long`.
    """
    width, height = picture.size
    longer = max(width, height)
    if longer > LONG * min(width, height):
        if width > height:
            return _scaled_long(picture, side, colour, resample)
        turned = _scaled_long(picture.transpose(Image.Transpose.TRANSPOSE), side, colour, resample)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    rows = Image.new("RGB", (side, longer), colour)
    if width > height:
        rows.paste(picture.resize((side, height), resample), (0, (longer - height) // 2))
    else:
        step = max(1, STRIP // longer)
        for top in range(0, longer, step):
            strip = Image.new("RGB", (longer, min(step, longer - top)), colour)
            strip.paste(picture.crop((0, top, width, top + strip.height)), ((longer - width) // 2, 0))
            rows.paste(strip.resize((side, strip.height), resample), (0, top))
    return rows.resize((side, side), resample)


def _scaled_long(
    picture: Image.Image, side: int, colour: tuple[int, int, int], resample: Image.Resampling
) -> Image.Image:
    """`scaled_square` of a picture that is much wider than high: only rows near the picture are computed."""
    width, height = picture.size
    scale, top = width / side, (width - height) // 2
    reach = 3 * scale + 1  # no filter of PIL reaches farther
    first, last = max(0, floor((top - reach) / scale)), min(side, ceil((top + height + reach) / scale))
    above, below = max(0, floor(first * scale - reach)), min(width, ceil(last * scale + reach))
    band = Image.new("RGB", (side, below - above), colour)
    band.paste(picture.resize((side, height), resample), (0, top - above))
    box = (0, first * scale - above, side, min(last * scale - above, below - above))
    square = Image.new("RGB", (side, side), colour)
    square.paste(band.resize((side, last - first), resample, box=box), (0, first))
    return square
