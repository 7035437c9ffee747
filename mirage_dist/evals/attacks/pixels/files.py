"""Attacked pictures on disk: PNG files in the folder of a suite, each under the hash of its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mirage_dist import disk
from mirage_dist.data import pictures
from mirage_dist.data.encoding.collate import Encoder
from mirage_dist.data.sample import Sample
from mirage_dist.evals.attacks.pictured.typographic import FOLDER
from mirage_dist.evals.sharing import files
from mirage_dist.schema import ConfigError, RunError

NO_PICTURE = "it has no picture"  # why a sample has no rewrite
DIGITS = 32  # of a hash, in a file's name


def saved(pixels_HWC: np.ndarray, home: Path) -> str:
    """The name of a PNG file with these pixels, uint8, in the folder of pictures; written unless it is there whole.

    The file is read again, the way in which models get it. Raises RunError when it does not hold the pixels that were
    written, and when the disk is full.
    """
    content = pictures.as_png(Image.fromarray(pixels_HWC))
    name = f"{disk.sha256_text(content)[:DIGITS]}.png"
    file = home / FOLDER / name
    if not _holds(file, pixels_HWC):
        files.write(file, content)
        if not _holds(file, pixels_HWC):
            raise RunError(f"{file}: does not read back as the picture that was written; check this disk")
    return name


def _holds(file: Path, pixels_HWC: np.ndarray) -> bool:
    try:
        return np.array_equal(np.asarray(pictures.open_picture(file)), pixels_HWC)
    except pictures.PictureError:
        return False


def whole(name: str, home: Path) -> str:
    """The path of a saved picture. Raises RunError unless its bytes are those that were written."""
    file = home / FOLDER / name
    try:
        if disk.sha256(file)[:DIGITS] == file.stem:
            return str(file)
        cause = "is not as it was written"
    except OSError as error:
        cause = f"cannot be read ({error.strerror})"
    raise RunError(
        f"{file}: {cause}; put it back, or remove this attack's file in {home / 'rewrites'}, and its pictures are made "
        "again"
    )


def attacked(sample: Sample, name: str, home: Path) -> Sample:
    """The sample with a saved picture in place of its own. Raises RunError as `whole`."""
    return replace(sample, image=whole(name, home), original_image=sample.original_image or sample.image)


def check_pictured(samples: Sequence[Sample], name: str, encoder: Encoder | None) -> None:
    """Raise ConfigError when the model under test is text-only, or no sample has a picture. name: of set and attack."""
    if encoder is not None and encoder.text_only:
        raise ConfigError(
            f"{name}: attacks the pixels of pictures, and the model under test is text-only; leave the attack out, or "
            "choose a vision-language model"
        )
    if samples and all(sample.image is None for sample in samples):
        raise ConfigError(
            f"{name}: attacks the pixels of pictures, and none of the {len(samples)} samples has a picture; leave the "
            "attack out, or put one that makes pictures before it (typographic, in combine)"
        )
