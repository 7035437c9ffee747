"""Many pictures at once: whether they decode, the digests of their files, and those that two sets share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from mirage_dist import disk
from mirage_dist.progress import Progress

AT_ONCE = 512  # pictures that the threads get before the next progress update, so that Ctrl-C ends a long check
PAUSE_SECONDS = 30.0  # between progress lines when there is no terminal


def faults(paths: Iterable[str], what: str, part: int = 0, parts: int = 1) -> dict[str, str]:
    """path -> fault, for the pictures that cannot be decoded to their last byte: a cut-off file has a whole header.

    Each picture is decoded once. Of `parts` callers with the same paths each checks its own `part`; the first one
    shows the progress, named `what`.
    """
    own = list(dict.fromkeys(paths))[part::parts]
    faulty: dict[str, str] = {}
    bar = Progress(len(own), what, "picture", delay=2.0, pause=PAUSE_SECONDS, leave=False, disable=part > 0)
    with ThreadPoolExecutor() as pool, bar:  # PIL releases the lock while it reads and decodes
        for start in range(0, len(own), AT_ONCE):
            batch = own[start : start + AT_ONCE]
            faulty.update((path, why) for path, why in zip(batch, pool.map(fault, batch), strict=True) if why)
            bar.update(len(batch))
    return faulty


def fault(path: str) -> str | None:
    """Why one picture cannot be decoded, None for a whole one."""
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        return "no such file (is `images` the folder that paths are relative to?)"
    except Exception as error:  # on damaged bytes a decoder may raise anything
        return f"broken: {error}"
    return None


def digests(
    paths: Iterable[str | None],
    part: int = 0,
    parts: int = 1,
    exchange: Callable[[dict[str, str]], Iterable[Mapping[str, str]]] = lambda own: [own],
) -> dict[str, str]:
    """Path -> SHA-256 of the picture's file; None is left out. Of `parts` callers with the same paths each reads its
    own.

    exchange: takes this caller's digests and returns every caller's. Raises OSError.
    """
    own = list(dict.fromkeys(path for path in paths if path is not None))[part::parts]
    with ThreadPoolExecutor() as pool:
        hashed = dict(zip(own, pool.map(disk.sha256, own), strict=True))
    return {path: digest for others in exchange(hashed) for path, digest in others.items()}


def shared(a: Iterable[str | None], b: Iterable[str | None]) -> set[str]:
    """The paths of `a` whose files have the same bytes as one of `b`: VLGuard's splits share pictures, in different
    folders. Raises OSError.
    """
    others = set(digests(b).values())
    return {path for path, digest in digests(a).items() if digest in others}
