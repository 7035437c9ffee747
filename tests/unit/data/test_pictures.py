"""Every picture that anything here looks at goes through `open_picture`: what it gives, against pixels made by hand."""

import base64
import os
import pickle
import struct
import time
import zlib
from functools import cache
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mirage_dist.data import pictures
from mirage_dist.data.encoding.framing import Framing
from mirage_dist.data.pictures import PictureError, open_picture, opening, size_of
from mirage_dist.schema import ConfigError

RAMP = np.linspace(0, 65535, 8).round().astype(np.uint16)
SCALED = [0, 36, 73, 109, 146, 182, 219, 255]
TURNED = {  # EXIF orientation -> what it does to rows and columns
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def png(rows, bits, colour, chunks=(), after=(), size=None):
    """A PNG file of samples (height, width, channels), as the specification has it: what PIL writes is a part of it.

    size: width and height in the header where they are not the samples' own.
    """

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = b""
    for row in rows.reshape(len(rows), -1):
        if bits == 16:
            line = row.astype(">u2").tobytes()
        else:
            spread = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
            line = np.packbits(spread.ravel()).tobytes()
        lines += b"\0" + line
    header = struct.pack(">IIBBBBB", *(size or rows.shape[1::-1]), bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def saved(picture, form, **options):
    output = BytesIO()
    picture.save(output, form, **options)
    return output.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def on_white(rgb, alpha):
    """Composed by hand: alpha from 0 to 255."""
    alpha = alpha[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


def grey(values):
    return np.repeat(values[..., None], 3, axis=-1).astype(float)


class Draw:
    """Random samples of a picture of some size."""

    def __init__(self, seed, width, height):
        self.random, self.shape = np.random.default_rng(seed), (height, width)

    def __call__(self, channels=1, top=256):
        return self.random.integers(0, top, (*self.shape, channels), dtype=np.uint32)


def deep_grey(draw, key=False):
    values = draw(top=65536)
    white = values[0, 0, 0]
    rgb = grey(np.round(values[..., 0] / 257))
    if key:
        rgb[values[..., 0] == white] = 255
    return png(values, 16, 0, [(b"tRNS", struct.pack(">H", white))] if key else []), rgb


def grey_png(draw, bits, key=False):
    values = draw(top=1 << bits)
    rgb, white = grey(values[..., 0] * 255 / ((1 << bits) - 1)), values[0, 0, 0]
    if key:
        rgb[values[..., 0] == white] = 255
    return png(values, bits, 0, [(b"tRNS", struct.pack(">H", white))] if key else []), rgb


def colour_png(draw, bits, key=False):
    # Samples that differ from the key's in their low byte only are of another colour.
    values = draw(3, top=1 << bits) if bits == 8 else 0x4200 + draw(3, top=3)
    rgb = (values >> (bits - 8)).astype(float)
    white = values[0, 0]
    if key:
        rgb[(values == white).all(-1)] = 255
    return png(values, bits, 2, [(b"tRNS", struct.pack(">HHH", *white))] if key else []), rgb


def alpha_png(draw, bits, colour):
    values = draw(2 if colour == 4 else 4, top=1 << bits)
    short = (values >> (bits - 8)).astype(float)
    rgb = grey(short[..., 0]) if colour == 4 else short[..., :3]
    return png(values, bits, colour), on_white(rgb, short[..., -1])


def palette_png(draw, alphas):
    colours, values = draw.random.integers(0, 256, (16, 3)), draw(top=16)
    opacity = {
        "opaque": np.full(16, 255),
        "one": np.where(np.arange(16) == 5, 0, 255),
        "bytes": draw.random.integers(0, 256, 16),
    }[alphas]
    chunks = [(b"PLTE", colours.astype(np.uint8).tobytes())]
    if alphas != "opaque":
        chunks.append((b"tRNS", opacity.astype(np.uint8).tobytes()))
    index = values[..., 0]
    return png(values, 4, 3, chunks), on_white(colours[index].astype(float), opacity[index])


def by_pil(draw, mode, form, **options):
    """A picture of a mode with its own channels, in a format without loss."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = draw(channels).astype(np.uint8)
    source = Image.fromarray(values if channels > 1 else values[..., 0], mode if channels > 1 else "L")
    data, values = saved(source, form, **options), values.astype(float)
    if mode == "CMYK":
        return data, (255 - values[..., :3]) * (255 - values[..., 3:]) / 255
    if mode in ("RGBA", "LA"):
        rgb = values[..., :3] if mode == "RGBA" else grey(values[..., 0])
        return data, on_white(rgb, values[..., -1])
    return data, values if channels == 3 else grey(values[..., 0])


def deep_tiff(draw, order):
    values = draw(top=65536)[..., 0]
    mode = "I;16" if order == "<" else "I;16B"
    picture = Image.frombytes(mode, values.shape[::-1], values.astype(f"{order}u2").tobytes())
    return saved(picture, "TIFF"), grey(np.round(values / 257))


def gif(draw, animated):
    colours, index = draw.random.integers(0, 256, (8, 3)), draw(top=8)[..., 0].astype(np.uint8)
    index[0, :] = np.resize(np.arange(8), index.shape[1])
    frame = Image.fromarray(index, "P")
    frame.putpalette(colours.astype(np.uint8).tobytes())
    rgb = colours[index].astype(float)
    rgb[index == 3] = 255
    others = [Image.new("P", frame.size, 1)] if animated else []
    for other in others:
        other.putpalette(colours.astype(np.uint8).tobytes())
    return saved(frame, "GIF", transparency=3, save_all=animated, append_images=others), rgb


def animated(draw, form):
    values = draw(3).astype(np.uint8)
    others = [Image.new("RGB", draw.shape[::-1], "red")]
    options = {"lossless": True} if form == "WEBP" else {}
    return saved(Image.fromarray(values), form, save_all=True, append_images=others, **options), values.astype(float)


KINDS = {
    **{f"grey PNG, {b} bits": lambda d, b=b: grey_png(d, b) for b in (1, 2, 4, 8)},
    **{f"grey PNG, {b} bits, colour key": lambda d, b=b: grey_png(d, b, True) for b in (1, 2, 4, 8)},
    "grey PNG, 16 bits": deep_grey,
    "grey PNG, 16 bits, colour key": lambda d: deep_grey(d, True),
    **{f"RGB PNG, {b} bits": lambda d, b=b: colour_png(d, b) for b in (8, 16)},
    **{f"RGB PNG, {b} bits, colour key": lambda d, b=b: colour_png(d, b, True) for b in (8, 16)},
    **{f"LA PNG, {b} bits": lambda d, b=b: alpha_png(d, b, 4) for b in (8, 16)},
    **{f"RGBA PNG, {b} bits": lambda d, b=b: alpha_png(d, b, 6) for b in (8, 16)},
    **{f"palette PNG, {a}": lambda d, a=a: palette_png(d, a) for a in ("opaque", "one", "bytes")},
    "16-bit TIFF": lambda d: deep_tiff(d, "<"),
    "16-bit big-endian TIFF": lambda d: deep_tiff(d, ">"),
    "16-bit PGM": lambda d: (
        (b"P5 %d %d 65535\n" % d.shape[::-1]) + (v := d(top=65536)).astype(">u2").tobytes(),
        grey(np.round(v[..., 0] / 257)),
    ),
    **{f"{m} TIFF": lambda d, m=m: by_pil(d, m, "TIFF") for m in ("L", "LA", "RGB", "RGBA", "CMYK")},
    "compressed RGBA TIFF": lambda d: by_pil(d, "RGBA", "TIFF", compression="tiff_lzw"),
    "RGB BMP": lambda d: by_pil(d, "RGB", "BMP"),
    "RGBA WebP": lambda d: by_pil(d, "RGBA", "WEBP", lossless=True, exact=True),
    "RGB WebP": lambda d: by_pil(d, "RGB", "WEBP", lossless=True),
    "RGBA JPEG 2000": lambda d: by_pil(d, "RGBA", "JPEG2000"),
    "RGBA TGA": lambda d: by_pil(d, "RGBA", "TGA"),
    "GIF with transparency": lambda d: gif(d, False),
    "animated GIF": lambda d: gif(d, True),
    "animated PNG": lambda d: animated(d, "PNG"),
    "animated WebP": lambda d: animated(d, "WEBP"),
    "TIFF of two pages": lambda d: animated(d, "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, database=None)
@given(seed=st.integers(0, 1 << 20), width=st.integers(8, 40), height=st.integers(1, 40))
def test_a_picture_is_what_its_file_shows(kind, seed, width, height):
    data, expected = KINDS[kind](Draw(seed, width, height))
    picture = open_picture(data)
    assert picture.mode == "RGB"
    assert picture.size == size_of(data) == (width, height)
    assert not picture.info
    assert np.abs(np.asarray(picture) - expected).max() <= 1


FORMS = [
    "PNG",
    "PNG, after the pixels",
    "PNG, in XMP",
    "TIFF",
    "WEBP",
    "JPEG",
    *(["AVIF"] if features.check("avif") else []),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", [*TURNED, 0, 9])
def test_a_picture_stands_as_its_orientation_says(form, orientation):
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8], stored[8:, 8:16], stored[:8, 16:] = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    if form == "PNG, after the pixels":
        data = png(stored, 8, 2, after=[(b"eXIf", exif(orientation).tobytes()[6:])])
    elif form == "PNG, in XMP":
        text = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="%d"/>' % orientation
        data = png(stored, 8, 2, [(b"iTXt", text)])
    else:
        options = {
            "WEBP": {"lossless": True},
            "JPEG": {"quality": 100, "subsampling": 0},
            "AVIF": {"subsampling": "4:4:4"},
        }
        data = saved(Image.fromarray(stored), form, exif=exif(orientation), **options.get(form, {}))
    expected = TURNED.get(orientation, TURNED[1])(stored)
    picture = open_picture(data)
    assert picture.size == size_of(data) == expected.shape[1::-1]
    assert not picture.getexif()
    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= (8 if form in ("JPEG", "AVIF") else 0)


def test_a_damaged_orientation_turns_nothing():
    data = saved(Image.new("RGB", (6, 3), "red"), "PNG", exif=b"Exif\0\0MM\0*garbage")
    assert open_picture(data).size == size_of(data) == (6, 3)


def test_the_ramp_of_sixteen_bits_is_scaled():
    for values in (RAMP, RAMP.astype(">u2")):
        for form in ("PNG", "TIFF"):
            mode = "I;16" if values.dtype == RAMP.dtype else "I;16B"
            picture = Image.frombytes(mode, (8, 1), values.tobytes())
            if form == "PNG" and mode == "I;16B":
                continue  # PIL does not write it
            assert np.asarray(open_picture(saved(picture, form)))[0, :, 1].tolist() == SCALED


def test_deep_grey_of_other_kinds_is_scaled_by_its_own_white():
    inverted = Image.frombytes("I;16", (8, 1), RAMP.tobytes())
    data = saved(inverted, "TIFF", tiffinfo={262: 0})
    assert np.asarray(open_picture(data))[0, :, 0].tolist() == SCALED[::-1]
    data = saved(inverted, "JPEG2000", irreversible=False)
    assert np.asarray(open_picture(data))[0, :, 0].tolist() == SCALED


@pytest.mark.parametrize("mode", ["I", "F"])
def test_channels_without_a_white_are_refused(mode):
    with pytest.raises(PictureError, match=r"no white is defined; save it in 8 or 16 bits"):
        open_picture(saved(Image.new(mode, (4, 4), 7), "TIFF"))


def test_lab_and_ycc_are_converted():
    colours = Image.new("RGB", (32, 16), (200, 60, 40))
    lab = saved(colours.convert("LAB"), "TIFF")
    ycc = saved(colours.convert("YCbCr"), "JPEG", quality=100)
    cmyk = saved(colours.convert("CMYK"), "JPEG", quality=100)
    for data in (lab, ycc, cmyk):
        assert np.abs(np.asarray(open_picture(data)).astype(int) - (200, 60, 40)).max() <= 6


def test_black_text_on_a_transparent_ground_stays_black_on_white():
    drawn = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    drawn.paste((0, 0, 0, 255), (5, 2, 15, 8))
    for form in ("PNG", "WEBP", "TIFF"):
        pixels = np.asarray(open_picture(saved(drawn, form)))
        assert (pixels[0, 0] == 255).all()
        assert (pixels[5, 10] <= 2).all()


# ------------------------------------------------------------------------------------------- what is refused


def bad_files(folder):
    whole = saved(Image.effect_noise((64, 64), 80).convert("RGB"), "PNG")
    jpeg = saved(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
    one = np.zeros((1, 1, 1), np.uint32)
    yield "empty", b"", "the file is empty"
    yield "text", b"hello", "no picture can be read from it"
    yield "a script", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture can be read from it"
    yield "a cut PNG", whole[: len(whole) // 2], "broken: "
    yield "a cut JPEG", jpeg[: len(jpeg) // 2], "broken: "
    yield "damaged", whole[:60] + bytes(200) + whole[260:], "broken: "
    yield "of a size by its header", png(one, 8, 0, size=(12_000, 12_000)), "pixels by its header"
    yield "of no size", png(one, 8, 0, size=(0, 5)), "broken: "


@pytest.mark.parametrize("name", [name for name, _, _ in bad_files(None)])
def test_what_is_no_whole_picture_is_refused_by_name_and_cause(name, tmp_path):
    content, cause = next((content, cause) for own, content, cause in bad_files(tmp_path) if own == name)
    file = tmp_path / "bad.png"
    file.write_bytes(content)
    for source in (str(file), file, content):
        with pytest.raises(PictureError) as error:
            open_picture(source)
        assert cause in error.value.cause
        assert str(error.value) == f"{error.value.file}: {error.value.cause}"
        assert error.value.file == (f"a picture of {len(content)} bytes" if isinstance(source, bytes) else str(file))
    assert isinstance(error.value, ConfigError)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # as ranks send it
    assert pictures.faults([str(file)], "test") == {str(file): error.value.cause}


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    cases = {
        tmp_path: "a folder",
        tmp_path / "fifo.png": "a FIFO",
        tmp_path / "loop.png": "broken: ",
        tmp_path / "none.png": "no such file",
        "/dev/zero": "a device",
        "a\0b.png": "no file can have this name",
        "\ud83d.png": "no file can have this name",
        "x" * 5000: "too long",
    }
    start = time.monotonic()
    for source, cause in cases.items():
        with pytest.raises(PictureError, match=cause) as error:
            open_picture(source)
        assert len(str(error.value)) < 500
        assert pictures.inspections([str(source)], "test")[str(source)].fault == error.value.cause
    assert time.monotonic() - start < 5


def test_nothing_is_decoded_of_a_picture_over_the_limit(monkeypatch):
    data = png(np.zeros((1, 1, 1), np.uint32), 8, 0, size=(10_000, 9_000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="90000000 pixels by its header; at most 64000000 are decoded"):
        open_picture(data)
    assert size_of(data) == (10_000, 9_000)  # of the header
    with pytest.raises(PictureError, match="at most 178956970 are decoded"):
        size_of(png(np.zeros((1, 1, 1), np.uint32), 8, 0, size=(20_000, 9_000)))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("data:image/png;base64,iVBORw0KGgo=", "a data: URL"),
        ("http://example.org/a.png", "a URL"),
        ("s3://bucket/a.png", "a URL"),
        (base64.b64encode(saved(Image.new("RGB", (1, 1)), "PNG")).decode(), "base64"),
        (base64.urlsafe_b64encode(saved(Image.effect_noise((300, 300), 80), "JPEG")).decode(), "base64"),
        (base64.encodebytes(saved(Image.effect_noise((64, 64), 80), "WEBP")).decode(), "base64"),
    ],
)
def test_a_url_or_base64_is_no_path(value, what):
    message = pictures.no_path(value)
    assert f"got {what}, which is not supported" in message
    assert len(message) < 350


@pytest.mark.parametrize(
    "path", ["a.png", "/9j/4AAQSkZJRgABAQ/a.jpg", "data/a:b.png", "train/" + "x" * 200, "é ü/1.jpg"]
)
def test_a_path_is_a_path(path):
    assert pictures.no_path(path) is None


# ------------------------------------------------------------------------------------------------ encoding anew


def test_what_an_api_takes_stays_as_it_is_and_all_else_shows_what_the_model_sees():
    picture = Image.effect_noise((40, 20), 80).convert("RGB")
    kept = {
        "image/jpeg": saved(picture, "JPEG"),
        "image/png": saved(picture, "PNG"),
        "image/webp": saved(picture, "WEBP"),
    }
    for kind, data in kept.items():
        assert pictures.encoded(data) == (kind, data)
    draw = Draw(0, 20, 10)
    changed = [
        saved(picture, "JPEG", exif=exif(6)),
        saved(picture, "PNG", exif=exif(8)),
        saved(picture.convert("CMYK"), "JPEG"),
        saved(picture, "TIFF"),
        saved(picture, "BMP"),
        *(
            KINDS[kind](draw)[0]
            for kind in KINDS
            if "alpha" in kind or "16" in kind or "nimated" in kind or "A " in kind
        ),
        *(
            KINDS[kind](draw)[0]
            for kind in ("GIF with transparency", "palette PNG, bytes", "RGB PNG, 8 bits, colour key")
        ),
    ]
    for data in changed:
        kind, content = pictures.encoded(data)
        assert kind == "image/png"
        with Image.open(BytesIO(content)) as again:
            assert (again.format, again.mode) == ("PNG", "RGB")
            assert not again.getexif()
            assert np.array_equal(np.asarray(again), np.asarray(open_picture(data)))


def test_a_large_turned_photograph_is_sent_as_jpeg(monkeypatch):
    monkeypatch.setattr(opening, "LARGEST_PNG", 1000)
    data = saved(Image.effect_noise((260, 210), 90).convert("RGB"), "JPEG", quality=80, exif=exif(6))
    kind, content = pictures.encoded(data)
    assert kind == "image/jpeg"
    again = open_picture(content)
    assert again.size == (210, 260)
    assert np.abs(np.asarray(again).astype(int) - np.asarray(open_picture(data))).mean() < 3


# ------------------------------------------------------------------------------------------------------ memory


def peak(action):
    """Bytes by which memory grew at most while `action` ran, beside what was free before."""
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")  # the highest value begins anew

    def status(name):
        with open("/proc/self/status") as handle:
            return 1024 * next(int(line.split()[1]) for line in handle if line.startswith(name))

    before = status("VmRSS")
    action()
    return status("VmHWM") - before


@pytest.mark.parametrize("form", ["RGBA", "P", "I;16", "CMYK", "turned"])
def test_decoding_takes_up_to_twelve_bytes_a_pixel(form, tmp_path):
    picture, file = Image.new("RGB", (2500, 2000), "red"), tmp_path / "large"
    if form == "I;16":
        picture = Image.new("I;16", picture.size, 9)
    elif form != "turned":
        picture = picture.convert(form)
    options = {"transparency": bytes(range(256))} if form == "P" else {"exif": exif(6)} if form == "turned" else {}
    picture.save(file, "TIFF" if form == "CMYK" else "PNG", **options)
    del picture
    open_picture(file)  # whatever is loaded once
    assert peak(lambda: open_picture(file)) <= 12 * 2500 * 2000 + (12 << 20)


PROCESSORS = {
    "CLIP": lambda: CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
    "LLaVA, which pads itself": lambda: LlavaImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_pad=True
    ),
    "LLaVA-NeXT": LlavaNextImageProcessorPil,
    "SigLIP": lambda: SiglipImageProcessorPil(size={"height": 384, "width": 384}),
}


@cache
def framed(name, aspect):
    images = PROCESSORS[name]()
    return images, Framing(SimpleNamespace(image_processor=images), aspect)


@pytest.mark.parametrize("aspect", ["pad", "processor"])
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(30_000, 4), (4, 30_000), (60_000, 1)])
def test_a_long_picture_takes_little_memory(name, aspect, size, tmp_path):
    images, framing = framed(name, aspect)
    file = tmp_path / "long.png"
    Image.new("RGB", size, "red").save(file)

    def prepare(size=size):
        picture = framing(open_picture(file))
        assert picture.size == framing.size(size)
        images(images=[picture], return_tensors="pt")

    images(images=[framing(Image.new("RGB", (400, 10)))], return_tensors="pt")  # measures the processor
    assert peak(prepare) < 64 << 20


def made(images, picture):
    return images(images=[picture], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", ["CLIP", "LLaVA, which pads itself", "SigLIP"])
def test_scaling_first_gives_what_padding_at_full_size_gives(name):
    images, framing = framed(name, "pad")
    for size in [(640, 480), (337, 336), (300, 1000), (1999, 1001), (1201, 160), (200, 150), (500, 500)]:
        pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        picture, side = Image.fromarray(pixels), max(size)
        square = Image.new("RGB", (side, side), framing.colour)
        square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
        assert torch.equal(made(images, framing(picture)), made(images, square)), size
        if name == "LLaVA, which pads itself":
            assert torch.equal(made(images, framed(name, "processor")[1](picture)), made(images, picture))


def test_a_long_picture_is_scaled_as_its_square_would_be():
    images, framing = framed("CLIP", "pad")
    for size in [(3000, 40), (40, 3000), (3000, 3)]:
        picture, side = Image.new("RGB", size, "red"), max(size)
        square = Image.new("RGB", (side, side), framing.colour)
        square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
        assert (made(images, framing(picture)) - made(images, square)).abs().max() < 0.05  # of about four


def test_of_a_long_picture_a_centre_crop_sees_the_centre():
    images, framing = framed("CLIP", "processor")
    picture = Image.new("RGB", (2000, 40), "red")
    picture.paste("blue", (980, 0, 1020, 40))
    assert framing.size((640, 480)) == (640, 480)
    assert framing(picture).size == framing.size(picture.size) == (320, 40)
    assert (made(images, framing(picture)) - made(images, picture)).abs().max() < 0.05
