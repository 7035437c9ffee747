"""A text typeset on a page of fixed size, alone or below a picture (FigStep: Gong et al. 2023, arXiv 2311.05608).

The page has 760 × 760 pixels, as FigStep's pictures have; a picture of the question's own takes the upper half, scaled
to fit. The text is as large as fits, up to FigStep's 80 pixels, at which a line has its 15 characters. The font is the
one of `data.formats.typeset`, whose file comes with a library: the same text gives the same pixels on every machine
with the same versions of Pillow and FreeType.
"""

from __future__ import annotations

import textwrap
import unicodedata
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from PIL import __version__ as pillow

from mirage_dist import disk
from mirage_dist.data import pictures
from mirage_dist.data.formats.typeset import ITEMS, SIDE, SIZE, SMALLEST, SPACING, font_digest, font_file
from mirage_dist.evals.sharing import files
from mirage_dist.schema import RunError

MARGIN = 20  # pixels
STEP = 4  # pixels between two sizes that are tried
REVISION = 1  # of this layout
NO_CHARACTER = "\uffff"  # drawn as a font draws what it has no glyph for


def listed(text: str) -> str:
    """The text and the numbers of empty list items, as on FigStep's pictures."""
    return text + "".join(f"\n{number}. " for number in range(1, ITEMS + 1))


def saved(text: str, image: str | None, folder: Path) -> str | None:
    """The path of the text's page in `folder`, drawn unless it is there whole; None where no page can hold the text.

    image: the picture above the text. The name is a hash of all that decides the page. The file is read again, the way
    in which models get it, and compared with what was drawn. Raises RunError when the two differ, and when the disk is
    full; PictureError for a picture that cannot be used.
    """
    text = unicodedata.normalize("NFC", text)
    page = draw(text, image)
    if page is None:
        return None
    layout = [REVISION, SIDE, MARGIN, SPACING, SIZE, SMALLEST, font_digest(), pillow, features.version("freetype2")]
    own = None if image is None else pictures.sha256(image)
    file = folder / f"{disk.digest([text, own, layout])[:32]}.png"
    if not _shows(file, page):
        files.write(file, pictures.as_png(page))
        if not _shows(file, page):
            raise RunError(f"{file}: does not read back as the picture that was written; check this disk")
    return str(file)


def _shows(file: Path, page: Image.Image) -> bool:
    try:
        shown = pictures.open_picture(file)
    except pictures.PictureError:
        return False
    return shown.size == page.size and shown.tobytes() == page.tobytes()


def draw(text: str, image: str | None) -> Image.Image | None:
    """The page; None when the text fits at no size, or has a character that the font lacks."""
    if not all(map(_drawable, text)):
        return None
    page, top = Image.new("RGB", (SIDE, SIDE), "white"), 0
    if image is not None:
        top = SIDE // 2
        own = ImageOps.contain(pictures.open_picture(image), (SIDE, top))
        page.paste(own, ((SIDE - own.width) // 2, (top - own.height) // 2))
    pen = ImageDraw.Draw(page)
    for size in range(SIZE, SMALLEST - 1, -STEP):
        font = ImageFont.truetype(font_file(), size)
        wrapped = _wrapped(text, int((SIDE - 2 * MARGIN) / font.getlength("0")))
        if wrapped is None:
            continue
        place = (MARGIN, top + MARGIN // 2)
        right, bottom = pen.multiline_textbbox(place, wrapped, font=font, spacing=SPACING)[2:]
        if right <= SIDE and bottom <= SIDE:
            pen.multiline_text(place, wrapped, fill="black", font=font, spacing=SPACING)
            return page
    return None


def _wrapped(text: str, columns: int) -> str | None:
    """The text in lines of so many characters; None where a word is longer."""
    lines = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, columns, break_long_words=False, break_on_hyphens=False) or [""]
    ]
    return None if any(len(line) > columns for line in lines) else "\n".join(lines)


@cache
def _drawable(character: str) -> bool:
    """Whether the font has a glyph for this character; white space needs none."""
    return character.isspace() or _glyph(character) != _glyph(NO_CHARACTER)


@cache
def _glyph(character: str) -> bytes:
    """How the font draws a character: the same for all that it has no glyph for."""
    drawn = Image.new("L", (2 * SIZE, 2 * SIZE))
    ImageDraw.Draw(drawn).text((0, 0), character, fill=255, font=ImageFont.truetype(font_file(), SIZE))
    return drawn.tobytes()
