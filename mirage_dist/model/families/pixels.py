"""A family's own preprocessing of pictures as a differentiable function: its value is exact, its gradient straight.

What transformers' PIL image processors do to a picture is reproduced to the bit for those that resize, crop, rescale
and normalise: PIL resizes along one axis and then the other, with weights of 22 binary places, and rounds to whole
values after each (Pillow, src/libImaging/Resample.c: precompute_coeffs, normalize_coeffs_8bpc). A sum of such weights
times bytes is a whole number below 2^53, so that float64 gives it without error. Which axis comes first depends on the
sizes and on the version of Pillow, and is measured. Both roundings count as the identity in the gradient (Bengio et al.
2013, arXiv 1308.3432), and clipping to 0 … 255 stops it.

No list of families: the settings say what should be done, and what the processor makes of noise in several sizes shows
whether it is.

Shapes: B pictures of one size, C = 3 channels, H × W as in the file, Y × X as the tower takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mirage_dist.data.encoding.framing import LONG, Framing
from mirage_dist.data.pictures import Size
from mirage_dist.schema import ConfigError

PRECISION = 22  # binary places of PIL's weights
TOLERANCE = 1e-4  # between this function and the processor, in the tower's units
# Pictures that are tried: larger and smaller than towers', both ways round, long, square.
PROBES: tuple[Size, ...] = ((50, 37), (37, 50), (64, 64), (700, 300), (300, 701), (240, 30), (1400, 1000))
KEPT = 64  # weights of an axis that are kept, by its sizes
COMPARED = 32  # rows and columns by which the order of two passes is known
DRAWS = 64  # pictures of noise, until one tells the two orders apart
BLOCK = 512  # columns that are computed at once
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


class Inexact(ConfigError):
    """A picture, or an image processor, that this module does not reproduce."""


@dataclass(frozen=True)
class Axis:
    """One axis of a picture, from the file to the tower, as whole weights times 2^22.

    weight_OI: of O values of the tower for I of the file. ground_O: of the colour that the picture is padded with.
    """

    weight_OI: Tensor
    ground_O: Tensor


class Preprocessing:
    """What reaches the tower as `pixel_values`, for the pictures of one processor.

    framing: how a picture is laid out before the processor gets it. Raises Inexact when the image processor has a step
    beside resizing, cropping, rescaling and normalising, or resizes otherwise than PIL does.
    """

    def __init__(self, framing: Framing) -> None:
        self.framing = framing
        self.images: Any = framing.images
        self.kind = type(self.images).__name__
        for name in STEPS:
            if not isinstance(getattr(self.images, name, None), bool | None):
                raise self._refusal(f"its setting {name} is {getattr(self.images, name)!r}")
        self.resizes, self.crops, self.rescales, self.normalises = (bool(getattr(self.images, n, None)) for n in STEPS)
        self.resample = _resample(getattr(self.images, "resample", None))
        if self.resizes and self.resample not in FILTERS:
            raise self._refusal(f"it resizes by the filter {self.resample!r}")
        scale = float(getattr(self.images, "rescale_factor", None) or 1.0)
        self.scale = scale if self.rescales else 1.0
        mean, std = (getattr(self.images, name, None) for name in ("image_mean", "image_std"))
        if self.normalises and (mean is None or std is None):
            raise self._refusal("it normalises, and its settings have no image_mean or image_std")
        self.mean_C11, self.std_C11 = (_by_channel(values) for values in (mean, std))

    def __call__(self, picture_BCHW: Tensor) -> Tensor:
        """The tower's input (B, C, Y, X), float32, of pictures of whole values from 0 to 255, in any float type.

        Raises Inexact for a size that the processor treats in another way.
        """
        height, width = picture_BCHW.shape[-2:]
        columns, rows, columns_first = self.axes((width, height))
        x_BCYX = picture_BCHW.double()
        if columns_first:
            x_BCYX = self._applied(x_BCYX, columns)
        x_BCYX = self._applied(x_BCYX.transpose(-1, -2), rows).transpose(-1, -2)
        if not columns_first:
            x_BCYX = self._applied(x_BCYX, columns)
        scaled = (x_BCYX * self.scale).float() if self.rescales else x_BCYX.float()
        if not self.normalises:
            return scaled
        return (scaled - self.mean_C11.to(scaled.device)) / self.std_C11.to(scaled.device)

    def _applied(self, x: Tensor, axis: Axis) -> Tensor:
        """Bytes along the last axis, made of those of the picture and of the ground around it."""
        ground_C1O = torch.tensor(self.framing.colour, dtype=x.dtype, device=x.device)[
            :, None, None
        ] * axis.ground_O.to(x.device)
        total = x @ axis.weight_OI.to(x.device).T + ground_C1O
        one = float(1 << PRECISION)
        exact = ((total.detach() + one / 2) / one).floor().clamp(0, 255)
        straight = (total / one).clamp(0, 255)
        return straight + (exact - straight).detach()

    # ---------------------------------------------------------------------------------------------- geometry

    def axes(self, size: Size) -> tuple[Axis, Axis, bool]:
        """How columns and rows of a picture of this size become the tower's, and whether columns do first."""
        framed, scaled = self.framed(size)
        resized = self._resized(framed)
        crops = self._cropped(resized)
        columns, rows = (
            _axis(own, laid, out, *crop, self.resample if self.resizes else None)
            for own, laid, out, crop in zip(size, framed, resized, crops, strict=True)
        )
        return columns, rows, scaled or not self.resizes or _columns_first(framed, resized, self.resample)

    def framed(self, size: Size) -> tuple[Size, bool]:
        """The size of what is resized, of a picture of this size, and whether it is scaled while it is padded to that.

        Raises Inexact for a picture that is laid out in a way that is not reproduced.
        """
        framed, side = self.framing.size(size), max(size)
        if framed[0] == framed[1] < side and framed == self._resized((side, side)) and framed != size:
            if side > LONG * min(size):
                raise Inexact(f"a picture of {size[0]}x{size[1]} pixels is too long for its width")
            return (side, side), True  # along the columns' axis first, which gives what padding it first gives
        if framed != (side, side) and any(laid > own for laid, own in zip(framed, size, strict=True)):
            raise Inexact(f"a picture of {size[0]}x{size[1]} pixels is scaled before {self.kind} gets it")
        return framed, False

    def _resized(self, size: Size) -> Size:
        """(width, height) after resizing, by transformers' own rules for the settings of `size`."""
        from transformers.image_transforms import get_resize_output_image_size

        if not self.resizes:
            return size
        wanted = {name: value for name, value in dict(self.images.size).items() if value is not None}
        if set(wanted) == {"height", "width"}:
            return wanted["width"], wanted["height"]
        if set(wanted) == {"shortest_edge"}:
            like = np.empty((3, size[1], size[0]), dtype=np.bool_)
            edge = wanted["shortest_edge"]
            height, width = get_resize_output_image_size(
                like, edge, default_to_square=False, input_data_format="channels_first"
            )
            return width, height
        raise self._refusal(f"it resizes to {wanted}")

    def _cropped(self, size: Size) -> tuple[tuple[int, int], tuple[int, int]]:
        """(start, length) of columns and of rows after the centre crop."""
        if not self.crops:
            return (0, size[0]), (0, size[1])
        wanted = dict(self.images.crop_size)
        width, height = (wanted.get(name) for name in ("width", "height"))
        if not isinstance(width, int) or not isinstance(height, int) or width > size[0] or height > size[1]:
            raise self._refusal(f"it crops to {wanted} what is {size[0]}x{size[1]} pixels")
        return ((size[0] - width) // 2, width), ((size[1] - height) // 2, height)

    # ------------------------------------------------------------------------------------------------ checks

    def check(self) -> None:
        """Raise Inexact unless the processor makes the same of noise in several sizes. Loads no weights."""
        for number, (width, height) in enumerate(PROBES):
            drawn = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            self.compare(drawn)

    def compare(self, pixels_HWC: np.ndarray) -> None:
        """Raise Inexact unless the processor makes the same of this picture, given as bytes."""
        framed = self.framing(Image.fromarray(pixels_HWC))
        what = f"a picture of {pixels_HWC.shape[1]}x{pixels_HWC.shape[0]} pixels"
        try:
            made = dict(self.images(images=[framed], return_tensors="pt"))
        except Exception as error:  # of any kind: a family's own code, which may take pictures with their text only
            raise self._refusal(f"it takes no picture by itself ({type(error).__name__})") from error
        own_BCYX = self(torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)[None].double())
        values = made.get("pixel_values")
        if not isinstance(values, Tensor) or values.shape != own_BCYX.shape:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise self._refusal(f"it makes pixel_values {shape} of {what}, expected {tuple(own_BCYX.shape)}")
        difference = float((values - own_BCYX).abs().max())
        if not difference <= TOLERANCE:
            raise self._refusal(f"what it makes of {what} differs by {difference:.2g} from its settings' steps")

    def _refusal(self, cause: str) -> Inexact:
        return Inexact(
            f"{self.kind} cannot be written as a differentiable function that equals it: {cause}; attacks on pixels "
            "are supported for image processors of PIL that resize, crop, rescale and normalise (those of LLaVA-1.5 "
            "and SigLIP, Gemma 3 without pan and scan)"
        )


def _resample(value: Any) -> Any:
    return int(value) if isinstance(value, int) else value


def _by_channel(values: Any) -> Tensor:
    """(C, 1, 1) in float32, as the processors round them."""
    listed = [0.0] * 3 if values is None else list(values) if isinstance(values, list | tuple) else [values] * 3
    return torch.tensor(listed, dtype=torch.float32)[:, None, None]


# ----------------------------------------------------------------------------------------------- PIL's filters


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.clip(1.0 - np.abs(x), 0.0, None)


def _cubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


FILTERS = {
    int(Image.Resampling.BILINEAR): (1.0, _triangle),
    int(Image.Resampling.BICUBIC): (2.0, _cubic),
}


def weights(inside: int, outside: int, resample: int) -> np.ndarray:
    """PIL's weights (outside, inside) by which one axis is resized, times 2^22, as whole numbers in float64."""
    support, function = FILTERS[resample]
    scale = inside / outside
    stretch = max(scale, 1.0)
    reach = support * stretch
    table = np.zeros((outside, inside))
    for place in range(outside):
        centre = (place + 0.5) * scale
        first, last = max(0, int(centre - reach + 0.5)), min(inside, int(centre + reach + 0.5))
        own = function((np.arange(first, last) - centre + 0.5) * (1.0 / stretch))
        own = own / own.sum()
        table[place, first:last] = np.trunc(own * (1 << PRECISION) + np.where(own < 0, -0.5, 0.5))
    return table


@lru_cache(maxsize=1024)
def _columns_first(before: Size, after: Size, resample: int) -> bool:
    """Whether PIL resizes along the columns' axis first, from one (width, height) to another."""
    if before[0] == after[0] or before[1] == after[1]:
        return True  # one pass at most
    places = [np.unique(np.linspace(0, length - 1, COMPARED).astype(int)) for length in after]
    across, down = (
        weights(inside, outside, resample)[own] for inside, outside, own in zip(before, after, places, strict=True)
    )
    for seed in range(DRAWS):  # both orders may give the same few values of a small picture
        noise = np.random.default_rng(seed).integers(0, 256, (before[1], before[0]), dtype=np.uint8)
        resized = np.asarray(Image.fromarray(noise).resize(after, Image.Resampling(resample)))
        expected = resized[np.ix_(places[1], places[0])]
        blocks = [down @ noise[:, start : start + BLOCK] for start in range(0, before[0], BLOCK)]
        rows_first = _rounded(_rounded(np.concatenate(blocks, axis=1)) @ across.T)
        if not np.array_equal(rows_first, expected):
            return True
        if not np.array_equal(_rounded(down @ _rounded(noise @ across.T)), expected):
            return False
    return True


def _rounded(total: np.ndarray) -> np.ndarray:
    return np.floor(total / (1 << PRECISION) + 0.5).clip(0, 255)


@lru_cache(maxsize=KEPT)
def _axis(own: int, laid: int, out: int, start: int, length: int, resample: int | None) -> Axis:
    """An axis of `own` values, laid out in the middle of `laid`, resized to `out`, of which `length` from `start`."""
    whole = np.eye(laid) * (1 << PRECISION) if resample is None or laid == out else weights(laid, out, resample)
    kept = whole[start : start + length]
    if laid >= own:
        before = (laid - own) // 2
        inside, ground = kept[:, before : before + own], np.delete(kept, np.s_[before : before + own], 1).sum(1)
    else:
        inside, ground = np.zeros((length, own)), np.zeros(length)
        cut = (own - laid) // 2
        inside[:, cut : cut + laid] = kept
    return Axis(torch.from_numpy(np.ascontiguousarray(inside)), torch.from_numpy(ground))
