"""Many pictures at once: whether they decode, the digests of their files, and those that two sets share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mirage_dist.data.pictures.opening import PictureError, Size, examine, sha256
from mirage_dist.progress import Progress

AT_ONCE = 512  # pictures that the threads get before the next progress update, so that Ctrl-C ends a long check
PAUSE_SECONDS = 30.0  # between progress lines when there is no terminal


class Inspection(NamedTuple):
    """One picture: why it cannot be used (None for a whole one), the SHA-256 of its file ("" without a file), its size
    as it is shown (None for one that cannot be used).
    """

    fault: str | None
    sha256: str
    size: Size | None


def inspect(path: str, most: int | None = None) -> Inspection:
    """Hash the file, and decode it to its last byte: a file that was cut off has a whole header.

    most: pixels that are decoded (see `open_picture`).
    """
    digest, size = examine(path, most)
    if isinstance(size, PictureError):
        return Inspection(size.cause, digest, None)
    return Inspection(None, digest, size)


def inspections(
    paths: Iterable[str],
    what: str,
    part: int = 0,
    parts: int = 1,
    most: Mapping[str, int] | None = None,
    quiet: bool = False,
) -> dict[str, Inspection]:
    """path -> inspection, each picture once. most: path -> pixels that are decoded (see `open_picture`).

    Of `parts` callers with the same paths each inspects its own `part`; the first one shows the progress, named `what`,
    unless it is to be quiet.
    """
    own = list(dict.fromkeys(paths))[part::parts]
    inspected: dict[str, Inspection] = {}
    bar = Progress(len(own), what, "picture", delay=2.0, pause=PAUSE_SECONDS, leave=False, disable=quiet or part > 0)
    with ThreadPoolExecutor() as pool, bar:  # PIL releases the lock while it decodes
        for start in range(0, len(own), AT_ONCE):
            batch = own[start : start + AT_ONCE]
            inspected.update(
                zip(batch, pool.map(inspect, batch, [(most or {}).get(path) for path in batch]), strict=True)
            )
            bar.update(len(batch))
    return inspected


def faults(
    paths: Iterable[str], what: str, part: int = 0, parts: int = 1, most: Mapping[str, int] | None = None
) -> dict[str, str]:
    """path -> fault, for the pictures that cannot be decoded. Parameters are those of `inspections`."""
    return {path: one.fault for path, one in inspections(paths, what, part, parts, most).items() if one.fault}


def digests(
    paths: Iterable[str | None],
    part: int = 0,
    parts: int = 1,
    exchange: Callable[[dict[str, str]], Iterable[Mapping[str, str]]] = lambda own: [own],
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Path -> SHA-256 of the picture's bytes; None is left out.

    Of `parts` callers with the same paths each reads its own. exchange: takes this caller's digests and returns every
    caller's. known: digests that need no reading, the same for every caller. Raises OSError.
    """
    known = known or {}
    every = list(dict.fromkeys(path for path in paths if path is not None))
    own = [path for path in every if path not in known][part::parts]
    with ThreadPoolExecutor() as pool:
        hashed = dict(zip(own, pool.map(sha256, own), strict=True))
    hashed = {path: digest for others in exchange(hashed) for path, digest in others.items()}
    return {path: known[path] if path in known else hashed[path] for path in every}


def shared(a: Iterable[str | None], b: Iterable[str | None]) -> set[str]:
    """The paths of `a` whose files have the same bytes as one of `b`: VLGuard's splits share pictures, in different
    folders. Raises OSError.
    """
    others = set(digests(b).values())
    return {path for path, digest in digests(a).items() if digest in others}
