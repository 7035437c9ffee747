"""The one way in for pictures: model, judge, report and person see the same pixels. No other module opens a picture."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from mirage_dist import disk
from mirage_dist.data.pictures import stored
from mirage_dist.data.pictures.checked import Checked
from mirage_dist.data.pictures.colours import Refused, Size, flat, opacity_of_deep_colour
from mirage_dist.schema import ConfigError
from mirage_dist.schema.limits import CEILING, PIXELS

# Of pictures over 89 million pixels, for each of which `max_pixels` had to be raised.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Raster formats of still pictures. PIL knows more; some start a program (EPS) or hold no pixels (WMF, HDF5).
FORMATS = (
    *("PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM"),
    *("ICO", "TGA", "PCX", "SGI", "QOI", "PSD"),
)
LARGEST = PIXELS.value  # pixels that are decoded unless the caller allows more
LARGEST_PNG = 8 << 20  # bytes in which a photograph is sent without loss
ORIENTATION = 274  # a tag of EXIF
TURNS = {  # the value of `ORIENTATION` -> what it asks for; 1 asks for nothing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GREYS = {"L;2": 85, "L;4": 17}  # how PNG's grey of two and four bits lies in a file -> the step between its shades
SHOWN = 100  # characters of a value in a message

# What base64 of a picture begins with, as bytes: PNG, JPEG, GIF, WebP, BMP, TIFF.
_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# Chunks of a PNG file that may hold an orientation. They may come after the pixels.
_ORIENTING = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


class PictureError(ConfigError):
    """A picture that cannot be used. file: its path, or what its bytes are. cause: why, in a clause."""

    def __init__(self, file: str, cause: str) -> None:
        super().__init__(f"{shortened(file, 300)}: {cause}")
        self.file, self.cause = file, cause

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, str]]:
        return type(self), (self.file, self.cause)


# A picture: the path of its file, a reference to a table's row (see `stored`), or the file's bytes. One that is
# `Checked` must have the bytes that it had then.
Picture = str | Path | bytes


def open_picture(source: Picture, most: int | None = None) -> Image.Image:
    """The picture in RGB, eight bits a channel, as it is meant to be shown.

    It is turned by its EXIF orientation, composed on white where it is transparent, and the first frame of an
    animation or of several pages. Sixteen-bit channels are scaled (65535 is white); channels for which the format names
    no white (32-bit integers, floating point) are refused. The result has no metadata. Decoding takes up to 12 bytes a
    pixel, and nothing is decoded of a picture over `most` pixels (default: the limit of the table in docs/limits.md).
    Raises PictureError for anything that is no whole picture: a missing or damaged file, a folder, a FIFO, a device.
    """
    with _handle(source) as handle:
        return _decoded(handle, _named(source), most)


def examine(path: str, most: int | None = None) -> tuple[str, Size | PictureError]:
    """SHA-256 of a file ("" where there is none to read), and the size of its picture, decoded to the last byte.

    A file that was cut off has a whole header. What `open_picture` would raise is returned. most: see `open_picture`.
    """
    digest = ""
    try:
        with _handle(path) as handle:
            total = hashlib.sha256()
            while part := handle.read(1 << 20):
                total.update(part)
            digest = total.hexdigest()
            handle.seek(0)
            return digest, _decoded(handle, path, most).size
    except PictureError as error:
        return digest, error
    except OSError as error:
        return digest, PictureError(path, f"broken: {error.strerror or error}")


def sha256(name: str) -> str:
    """SHA-256, in hexadecimal, of the bytes of a picture: of its file, or as it is stored in a table.

    Raises OSError where there is no such file, and PictureError where a table does not give it.
    """
    where = _stored(name)
    return disk.sha256(name) if where is None else disk.sha256_text(_content(where, name))


def size_of(source: Picture) -> Size:
    """The size of the picture that `open_picture` gives, from its header alone where the header says it.

    Raises PictureError as `open_picture` does, except for what only decoding shows.
    """
    with _handle(source) as handle, _recognised(handle, _named(source), CEILING.value) as image:
        width, height = image.size
        if image.format == "TIFF":  # whose plugin has turned the size
            return width, height
        if image.format == "PNG":  # whose plugin decodes the whole picture to look for an orientation
            handle.seek(0)
            content = handle.read()
            if not any(mark in content for mark in _ORIENTING):
                return width, height
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def encoded(source: Picture) -> tuple[str, bytes]:
    """Media type and bytes of the picture for an API or a page, which show what `open_picture` gives.

    A JPEG, PNG or WebP file that needs no turning, composing or scaling stays as it is; all else becomes a PNG. A JPEG
    file whose PNG would be over 8 MiB, more than some APIs take, is encoded as JPEG again. Raises PictureError.
    """
    with _handle(source) as handle:
        name = _named(source)
        with _recognised(handle, name, CEILING.value) as image:
            kind, plain = image.format, _plain(image)
        handle.seek(0)
        content = handle.read() if plain else b""
        handle.seek(0)
        picture = _decoded(handle, name, CEILING.value)  # a damaged file is not sent either
    if plain:
        return f"image/{str(kind).lower()}", content
    if len(content := as_png(picture)) <= LARGEST_PNG or kind not in ("JPEG", "MPO"):
        return "image/png", content
    output = BytesIO()
    picture.save(output, format="JPEG", quality=95, subsampling=0)
    return "image/jpeg", output.getvalue()


def as_png(picture: Image.Image) -> bytes:
    """A picture of `open_picture` as a PNG file."""
    output = BytesIO()
    picture.save(output, format="PNG")
    return output.getvalue()


def no_path(value: str) -> str | None:
    """Why a record's value names no picture file, in a clause with the value's first characters; None for a path."""
    if re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]+://", value):
        what = "a data: URL" if value.startswith("data:") else "a URL"
    elif _looks_base64(value):
        what = "base64"
    else:
        return None
    return (
        f"expected the path of a picture file, got {what}, which is not supported: {shortened(value)!r}; save the "
        "picture to a file and name that"
    )


def _looks_base64(value: str) -> bool:
    text = value[:4096].replace("-", "+").replace("_", "/")
    if not re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text):  # the name of a picture file has a dot
        return False
    if len(value) > 1024:
        return True
    try:
        start = base64.b64decode("".join(text.split())[:8])
    except binascii.Error:
        return False
    return len(value) >= 64 and start.startswith(_STARTS)


def shortened(value: str, length: int = SHOWN) -> str:
    """The value, or its first `length` characters and how many it has."""
    return value if len(value) <= length else f"{value[:length]}… ({len(value)} characters)"


# ---------------------------------------------------------------------------------------------------- opening


def _named(source: Picture) -> str:
    return f"a picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextmanager
def _handle(source: Picture) -> Iterator[BinaryIO]:
    """The bytes of a picture as a seekable file. Reads from regular files only, so it never waits."""
    if isinstance(source, Checked):
        with _handle(str(source)) as handle:
            content = handle.read()
        if (now := disk.sha256_text(content)) != source.sha256:
            raise PictureError(str(source), _changed(source.sha256, now))
        yield BytesIO(content)
        return
    if isinstance(source, bytes):
        yield BytesIO(source)
        return
    name = str(source)
    if (where := _stored(name)) is not None:
        yield BytesIO(_content(where, name))
        return
    try:
        regular = stat.S_ISREG(mode := os.stat(source).st_mode)
        # O_NONBLOCK: should a FIFO take the file's place meanwhile, to open it would wait for its writer.
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if regular else -1
    except (FileNotFoundError, NotADirectoryError):
        raise PictureError(name, "no such file (is `images` the folder that paths are relative to?)") from None
    except OSError as error:
        raise PictureError(name, f"broken: {error.strerror or error}") from error
    except ValueError as error:  # a NUL, or what the file system's encoding cannot hold
        raise PictureError(name, f"no file can have this name ({error})") from error
    if not regular:
        what = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise PictureError(name, f"broken: {what}, not a picture file")
    with os.fdopen(descriptor, "rb") as handle:
        yield handle


def _changed(before: str, now: str) -> str:
    return (
        f"has changed since the run's data were checked (SHA-256 {now[:12]}…, then {before[:12]}…); put the file back, "
        "or train on the new one in another run.dir. data.verify=true reads every picture at the start"
    )


def _stored(name: str) -> stored.Place | None:
    """Where in a table a picture is stored; None for the path of a file. Only a path below a file is looked into."""
    try:
        os.stat(name)
    except NotADirectoryError:
        return stored.place(name)
    except (OSError, ValueError):
        pass
    return None


def _content(where: stored.Place, name: str) -> bytes:
    try:
        return stored.content(where)
    except stored.Unreadable as error:
        raise PictureError(name, str(error)) from error


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this PIL reads. JPEG stands for MPO too."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _recognised(handle: BinaryIO, name: str, most: int | None = None) -> Iterator[Image.Image]:
    """The picture by its header, not decoded; whatever a decoder raises becomes a PictureError."""
    try:
        with Image.open(handle, formats=_formats()) as image:
            if image.width * image.height > (LARGEST if most is None else most):
                raise PictureError(name, _too_large(image.width * image.height, most))
            if not image.width or not image.height:
                raise PictureError(name, "broken: its header gives a size of 0 pixels")
            yield image
    except PictureError:
        raise
    except Refused as error:
        raise PictureError(name, str(error)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(name, _too_large(next(iter(re.findall(r"\d+", str(error))), "too many"), most)) from error
    except UnidentifiedImageError:
        raise PictureError(name, f"broken: {_unrecognised(handle)}") from None
    except MemoryError as error:
        raise PictureError(name, "broken: there is not enough memory to decode it") from error
    except Exception as error:  # on damaged bytes a decoder may raise anything
        raise PictureError(name, f"broken: {str(error) or type(error).__name__}") from error


def _too_large(pixels: int | str, most: int | None) -> str:
    return (
        f"{pixels} pixels by its header; at most {LARGEST if most is None else most} are decoded. Scale it down, or "
        f"raise max_pixels of its source in the recipe (up to {CEILING.value}; decoding takes up to 12 bytes a pixel)"
    )


def _unrecognised(handle: BinaryIO) -> str:
    handle.seek(0)
    if not handle.read(1):
        return "the file is empty"
    return f"no picture can be read from it; expected {', '.join(_formats())}"


# --------------------------------------------------------------------------------------------------- decoding


def _decoded(handle: BinaryIO, name: str, most: int | None = None) -> Image.Image:
    with _recognised(handle, name, most) as image:
        raw = _raw(image)
        image.load()
        if image.mode == "RGB" and raw.endswith(";16B") and "transparency" in image.info:
            handle.seek(0)
            with Image.open(handle, formats=_formats()) as low:
                alpha = opacity_of_deep_colour(image, low)
        else:
            if image.mode == "L" and raw in GREYS and "transparency" in image.info:
                image.info["transparency"] *= GREYS[raw]  # PIL has scaled the pixels, and not their colour key
            alpha = None
        method = TURNS.get(_orientation(image))
        picture = flat(image, alpha)
    picture = picture if method is None else picture.transpose(method)
    picture.info = {}
    return picture


def _raw(image: Image.Image) -> str:
    """How the pixels lie in a file that is not decoded yet, in PIL's words: "RGB;16B"."""
    tiles = getattr(image, "tile", None)
    return tiles[0].args if tiles and isinstance(tiles[0].args, str) else ""


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the data hold none, and, as viewers have it, where they are damaged."""
    if image.format == "TIFF":  # which PIL turns while it decodes
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # on damaged bytes the parser may raise anything
        return 1
    return value if value in TURNS else 1


def _plain(image: Image.Image) -> bool:
    """Whether the file, which is not decoded yet, shows everywhere what `open_picture` gives."""
    return (
        image.format in ("JPEG", "PNG", "WEBP")
        and image.mode in ("L", "P", "RGB")
        and "16" not in _raw(image)
        and getattr(image, "n_frames", 1) == 1
        and not image.has_transparency_data
        and _orientation(image) == 1
    )
