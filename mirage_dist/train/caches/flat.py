"""One flat file of arrays that every rank maps into memory, so that a rank reads only what it needs.

It is a safetensors file. The metadata hold a CRC-32 of each block of 1 MiB of every array; a block is compared with its
own when a process first reads from it. At a start the ranks share the comparison of all blocks (`opened`), so that
damage is known before the first step.
"""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mirage_dist import disk, ranks
from mirage_dist.disk.headers import header
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.ranks import Group
from mirage_dist.schema import RunError

BLOCK = 1 << 20  # bytes
DTYPES = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "U8": np.uint8}  # by their names in safetensors files
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one


class Flat:
    """The arrays of a file, by title, and its text. Raises ValueError when the file is damaged or is no such file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as handle:
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self._map[:8], "little")
            content: dict[str, Any] = json.loads(self._map[8 : 8 + min(length, LONGEST_HEADER)])
            metadata = content.pop("__metadata__")
            self.text: str = metadata["text"]
            self._checks: dict[str, list[int]] = json.loads(metadata["checks"])
            if self._checks.pop("text") != [_check(self.text.encode())]:
                raise ValueError("its text does not have its checksum")
            self._bytes: dict[str, np.ndarray] = {}
            self._arrays: dict[str, np.ndarray] = {}
            end = 8 + length
            for title, entry in content.items():
                start, stop = (8 + length + place for place in entry["data_offsets"])
                dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(map(int, entry["shape"]))
                if start != end or stop - start != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                    raise ValueError(f"{title} does not fit its place")
                if len(self._checks[title]) != -(-(stop - start) // BLOCK):
                    raise ValueError(f"{title} lacks checksums")
                end = stop
                self._bytes[title] = np.frombuffer(self._map, np.uint8, stop - start, start)
                self._arrays[title] = self._bytes[title].view(dtype).reshape(shape)
            if end != len(self._map):
                raise ValueError(f"{len(self._map)} bytes, but its header describes {end}")
        except Exception as error:  # of json, mmap, NumPy …: whatever a damaged byte leads to
            raise ValueError(f"{error}" or type(error).__name__) from error
        self._whole = {title: np.zeros(len(self._checks[title]), bool) for title in self._arrays}

    @property
    def titles(self) -> set[str]:
        return set(self._arrays)

    def shape(self, title: str) -> tuple[int, ...]:
        """The shape of an array; () where there is none of this title."""
        return self._arrays[title].shape if title in self._arrays else ()

    def read(self, title: str, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) along the first dimension, copied. Raises RunError when they are damaged."""
        array = self._arrays[title]
        each = array.nbytes // max(1, len(array))
        if start < stop and (broken := self._first_broken(title, start * each // BLOCK, -(-stop * each // BLOCK))):
            raise RunError(f"{self.file}: {broken}; remove this file and start again: it is made anew")
        return array[start:stop].copy()

    def mapped(self, title: str) -> np.ndarray:
        """An array as it lies in the file; what is taken from it has to be compared with what `read` gives."""
        return self._arrays[title]

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is damaged of the share of caller `part` of `parts`; None when nothing is."""
        for title, checks in self._checks.items():
            first, last = (len(checks) * (part + n) // parts for n in (0, 1))
            if broken := self._first_broken(title, first, last):
                return broken
        return None

    def _first_broken(self, title: str, first: int, last: int) -> str | None:
        whole, content = self._whole[title], self._bytes[title]
        for number in range(first, last):
            if not whole[number]:
                if _check(content[number * BLOCK : (number + 1) * BLOCK].data) != self._checks[title][number]:
                    return f"block {number} of {title} does not have its checksum"
                whole[number] = True
        return None


def write(file: Path, arrays: Mapping[str, np.ndarray], text: str, workspace: Path) -> None:
    """Write arrays of the dtypes in `DTYPES` as `Flat` reads them, whole or not at all. Raises OSError."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    # By falling size of an element, so that each array is aligned in the file.
    ordered = {title: np.ascontiguousarray(a) for title, a in sorted(arrays.items(), key=lambda e: -e[1].itemsize)}
    contents = {title: array.reshape(-1).view(np.uint8).data for title, array in ordered.items()}
    checks = {
        title: [_check(content[start : start + BLOCK]) for start in range(0, len(content), BLOCK)]
        for title, content in contents.items()
    }
    metadata = {"text": text, "checks": json.dumps({**checks, "text": [_check(text.encode())]})}
    entries = {title: (names[array.dtype], array.shape, array.nbytes) for title, array in ordered.items()}
    disk.write(file, (header(entries, metadata), *contents.values()), workspace=workspace)


def opened(file: Path, group: Group) -> Flat | None:
    """The file, mapped, after the ranks together have compared all of it; None where it is missing or damaged.

    Every rank calls this and gets the same. A damaged file is named in the log.
    """
    flat: Flat | None = None
    fault: str | None = None
    if ranks.from_main(group, file.is_file() if group.main else False):
        try:
            flat = Flat(file)
            fault = flat.damage(group.rank, group.size)
        except ValueError as error:
            fault = str(error)
        if fault:
            log.warning(f"{file}: damaged ({fault}), made again", extra=EVERY_RANK)
            flat = None
    faults = ranks.gather(group, [flat is None], f"check of {file.name}")
    return None if faults.any() else flat


def _check(content: bytes | memoryview) -> int:
    return zlib.crc32(content)
