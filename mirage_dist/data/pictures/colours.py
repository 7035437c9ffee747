"""A decoded picture of any mode as RGB of eight bits: transparency on white, deep channels scaled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile

Size = tuple[int, int]  # width, height in pixels, as the picture is shown
Box = tuple[int, int, int, int]
GROUND = "white"  # on which transparent pictures are composed
BAND = 1 << 20  # pixels that are scaled to eight bits at once
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF
KINDS = {"I": "32-bit integers", "F": "floating-point numbers"}


class Refused(ValueError):
    """A whole picture that has no one rendering in eight bits."""


def flat(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """A decoded picture of any mode as RGB on the ground; closes it. alpha: its opacity where no channel is."""
    white = _white(image)
    if image.mode in ("I", "F") and white is None:
        raise Refused(f"its channels have {KINDS[image.mode]}, for which no white is defined; save it in 8 or 16 bits")
    if white is not None:
        return _of_deep_grey(image, white)
    if alpha is None and image.has_transparency_data:
        if image.mode != "RGBA":
            decoded, image = image, image.convert("RGBA")
            decoded.close()
        alpha = image.getchannel("A")
    picture = image.convert("RGB")
    image.close()  # its pixels are not kept beside those of the result
    return picture if alpha is None else _composed(picture, alpha)


def _composed(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    ground = Image.new("RGB", picture.size, GROUND)
    ground.paste(picture, mask=alpha)
    return ground


def _white(image: Image.Image) -> int | None:
    """The value of white in a picture of one deep channel; None for other pictures, and where it is not known."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITS)  # TIFF has grey of 12 bits too
        return (1 << (bits[0] if isinstance(bits, tuple) else bits or 16)) - 1
    return 0xFFFF if image.mode == "I" and image.format == "PPM" else None  # PIL scales these to 16 bits


def _of_deep_grey(image: Image.Image, white: int) -> Image.Image:
    key, inverted = image.info.get("transparency"), getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0

    def shades(box: Box) -> np.ndarray:
        values = np.asarray(image.crop(box)).astype(np.uint32)
        scaled = (values * 255 + white // 2) // white
        if key is not None:
            scaled[values == key] = 255  # the ground
        return np.minimum(255 - scaled if inverted else scaled, 255).astype(np.uint8)

    return _by_bands(image.size, shades).convert("RGB")


def opacity_of_deep_colour(image: Image.Image, low: ImageFile.ImageFile) -> Image.Image:
    """The opacity of a 16-bit RGB picture with a colour key. PIL keeps the high bytes; the low ones are read again.

    low: the same file, opened anew and not decoded.
    """
    low.tile = [tile._replace(args="RGB;16L") for tile in getattr(low, "tile", [])]
    low.load()
    key = np.array(image.info["transparency"])

    def opacity(box: Box) -> np.ndarray:
        values = np.asarray(image.crop(box)).astype(np.uint32) << 8 | np.asarray(low.crop(box))
        return np.where((values == key).all(-1), 0, 255).astype(np.uint8)

    return _by_bands(image.size, opacity)


def _by_bands(size: Size, values: Callable[[Box], np.ndarray]) -> Image.Image:
    """A picture of one channel, computed some rows at a time so that wide numbers take little memory."""
    (width, height), picture = size, Image.new("L", size)
    rows = max(1, BAND // width)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        picture.paste(Image.fromarray(values(box)), box)
    return picture
