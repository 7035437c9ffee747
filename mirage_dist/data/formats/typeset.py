"""FigStep's pictures (Gong et al., AAAI 2025): an instruction and three empty list items, black on white.

The published layout: 760 × 760, lines of 15 characters at 80 pixels with 11 between them, from (20, 10). The published
font is FreeMono Bold; ours is DejaVu Sans Mono Bold, of the same advance, which matplotlib ships. It is taller, so a
text that would not fit is set smaller, whereas the published pictures are cut at the lower edge.
"""

from __future__ import annotations

import json
import textwrap
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mirage_dist import disk
from mirage_dist.data.formats.base import BadRecord
from mirage_dist.schema import ConfigError

SIDE, PLACE, SPACING = 760, (20, 10), 11
CHARACTERS, ITEMS = 15, 3
SIZE, SMALLEST = 80, 16  # pixels
FONT = "DejaVuSansMono-Bold.ttf"


def picture(instruction: str, folder: Path) -> str:
    """The path of the instruction's picture under `folder`, made if it does not exist.

    Its name is a hash of everything that determines it, and it appears whole, so that any number of processes may make
    it at once. Raises ConfigError when it cannot be written, and BadRecord when the text fits at no size.
    """
    file = folder / f"{_digest(instruction)}.png"
    if not file.is_file():
        drawn = draw(instruction)
        try:
            with disk.writing(file, durable=False) as handle:
                drawn.save(handle, format="PNG")
        except OSError as error:
            raise ConfigError(f"{folder}: pictures cannot be typeset here ({error}); name another `images`") from error
    return str(file)


def wrapped(instruction: str) -> str:
    """The text of the picture."""
    items = "".join(f"\n{number}. " for number in range(1, ITEMS + 1))
    return textwrap.fill(instruction.removesuffix("\n"), CHARACTERS) + items


def draw(instruction: str) -> Image.Image:
    """The picture, at the largest size at which the whole text fits on the page. Raises BadRecord when none does."""
    text, image = wrapped(instruction), Image.new("RGB", (SIDE, SIDE), "white")
    page = ImageDraw.Draw(image)
    for size in range(SIZE, SMALLEST - 1, -4):
        font = ImageFont.truetype(font_file(), size)
        right, bottom = page.multiline_textbbox(PLACE, text, font=font, spacing=SPACING)[2:]
        if max(right, bottom) <= SIDE:
            page.multiline_text(PLACE, text, fill="black", font=font, spacing=SPACING)
            return image
    raise BadRecord(
        f"field 'instruction': {len(instruction)} characters do not fit on a page of {SIDE} × {SIDE} pixels"
    )


def _digest(instruction: str) -> str:
    layout = [SIDE, PLACE, SPACING, SIZE, SMALLEST, font_digest()]
    return disk.sha256_text(json.dumps([wrapped(instruction), layout]))[:32]


@cache
def font_digest() -> str:
    """SHA-256, in hexadecimal, of the font."""
    return disk.sha256(font_file())


@cache
def font_file() -> str:
    """The path of the font, which comes with matplotlib: no system has to have it."""
    import matplotlib  # for its fonts; it takes a moment to import

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONT)
