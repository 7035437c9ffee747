"""Many pictures at once: whether they decode, the digests of their files, and those that two sets share."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

AT_ONCE = 512  # pictures handed to the threads before the next look at the clock, so that Ctrl-C ends a long check
LINE_SECONDS = 30.0  # between progress lines where there is no terminal


def faults(paths: Iterable[str], what: str, part: int = 0, parts: int = 1) -> dict[str, str]:
    """path -> what is wrong with it. Decodes each picture once, to its last byte: a cut-off file has a whole header.

    Of `parts` callers with the same paths each does its own `part`, and the first one shows how far it is.
    Threads help: PIL holds no lock while it reads and decodes.
    """
    own = list(dict.fromkeys(paths))[part::parts]
    found: dict[str, str] = {}
    terminal = sys.stderr.isatty()
    told = time.monotonic()
    # No bar for what is over before anybody could read it.
    bar = tqdm(total=len(own), desc=what, unit="picture", leave=False, delay=2.0, disable=part > 0 or not terminal)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(own), AT_ONCE):
            batch = own[start : start + AT_ONCE]
            found.update((path, fault) for path, fault in zip(batch, pool.map(_fault, batch), strict=True) if fault)
            bar.update(len(batch))
            if part == 0 and not terminal and time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                print(f"{what}: {start + len(batch)} of {len(own)} decoded", flush=True)
    return found


def digests(
    paths: Iterable[str | None],
    part: int = 0,
    parts: int = 1,
    exchange: Callable[[dict[str, str]], Iterable[Mapping[str, str]]] = lambda own: [own],
) -> dict[str, str]:
    """Path -> SHA-256 of the picture's file, None left out. Of `parts` callers with the same paths each reads its own.

    exchange: from what this caller found to what every caller found.
    """
    own = list(dict.fromkeys(path for path in paths if path is not None))[part::parts]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(own, pool.map(_digest, own), strict=True))
    return {path: digest for others in exchange(found) for path, digest in others.items()}


def shared(a: Iterable[str | None], b: Iterable[str | None]) -> set[str]:
    """The paths of `a` whose files have the same bytes as one of `b`: VLGuard's splits share pictures, in different
    folders.
    """
    others = set(digests(b).values())
    return {path for path, digest in digests(a).items() if digest in others}


def _digest(path: str) -> str:
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fault(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        return "no such file (is `images` the folder that paths are relative to?)"
    except Exception as error:  # on damaged bytes a decoder may raise anything
        return f"broken: {error}"
    return None
