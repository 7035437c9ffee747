"""FigStep's pictures (Gong et al., AAAI 2025): an instruction and three empty list items, black on white.

The published layout: 760 × 760, lines of 15 characters at 80 pixels with 11 between them, from (20, 10). The published
font is FreeMono Bold; ours is DejaVu Sans Mono Bold, of the same advance, which matplotlib ships. It is taller, so a
text that would not fit is set smaller where the published pictures go on below the edge.
"""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
import uuid
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mirage_dist.data.formats.base import BadRecord
from mirage_dist.schema import ConfigError

SIDE, PLACE, SPACING = 760, (20, 10), 11
CHARACTERS, ITEMS = 15, 3
SIZE, SMALLEST = 80, 16  # pixels
FONT = "DejaVuSansMono-Bold.ttf"


def picture(instruction: str, folder: Path) -> str:
    """The path of the instruction's picture under `folder`, made if it is not there.

    Its name is a hash of all that decides it, and it is renamed into place whole, so that any number of processes may
    ask at once. Raises ConfigError where nothing can be written, and BadRecord for what does not fit at any size.
    """
    file = folder / f"{_digest(instruction)}.png"
    if not file.is_file():
        drawn = draw(instruction)
        beside = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            drawn.save(beside, format="PNG")
            os.replace(beside, file)
        except OSError as error:
            raise ConfigError(f"{folder}: pictures cannot be typeset here ({error}); name another `images`") from error
        finally:
            beside.unlink(missing_ok=True)
    return str(file)


def wrapped(instruction: str) -> str:
    """The text of the picture."""
    items = "".join(f"\n{number}. " for number in range(1, ITEMS + 1))
    return textwrap.fill(instruction.removesuffix("\n"), CHARACTERS) + items


def draw(instruction: str) -> Image.Image:
    """The picture, at the largest size at which all of it is on the page. Raises BadRecord where there is none."""
    text, image = wrapped(instruction), Image.new("RGB", (SIDE, SIDE), "white")
    page = ImageDraw.Draw(image)
    for size in range(SIZE, SMALLEST - 1, -4):
        font = ImageFont.truetype(_font(), size)
        right, bottom = page.multiline_textbbox(PLACE, text, font=font, spacing=SPACING)[2:]
        if max(right, bottom) <= SIDE:
            page.multiline_text(PLACE, text, fill="black", font=font, spacing=SPACING)
            return image
    raise BadRecord(
        f"field 'instruction': {len(instruction)} characters do not fit on a page of {SIDE} × {SIDE} pixels"
    )


def _digest(instruction: str) -> str:
    layout = [SIDE, PLACE, SPACING, SIZE, SMALLEST, _font_digest()]
    return hashlib.sha256(json.dumps([wrapped(instruction), layout]).encode()).hexdigest()[:32]


@cache
def _font_digest() -> str:
    return hashlib.sha256(Path(_font()).read_bytes()).hexdigest()


@cache
def _font() -> str:
    import matplotlib  # for its fonts; it takes a moment to import

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONT)
