"""The uniform-call guard: what each rank says it is about to do, in numbers that one collective carries.

Ranks that say different things would hang in a later collective. What they said reaches a GPU's host without a wait for
the device, so that it is compared when it is there: by the next call, or by a thread that watches.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BYTES_A_NUMBER = 6  # of the text; a float64 holds whole numbers of 53 bits
TEXT_BYTES = 192
HEAD = 1 + TEXT_BYTES // BYTES_A_NUMBER  # numbers of one call

_last: list[Any] = [0, "the start"]  # number of calls so far, and the name of the last
# Of calls that were not compared yet: when their heads are on the host (None: they are), the heads, this rank's own.
_unchecked: deque[tuple[Any, torch.Tensor, float]] = deque()


def head(call: str, count: int) -> list[float]:
    """A call that sends `count` values: a checksum of its whole text, and the beginning of the text."""
    ending = f" with {count} values"
    text = (call.encode()[: TEXT_BYTES - len(ending)].decode(errors="ignore") + ending).encode().ljust(TEXT_BYTES)
    parts = [text[at : at + BYTES_A_NUMBER] for at in range(0, TEXT_BYTES, BYTES_A_NUMBER)]
    return [zlib.crc32(f"{call}:{count}".encode()), *(int.from_bytes(part, "little") for part in parts)]


def text_of(numbers: Sequence[float]) -> str:
    """The beginning of the text of a call from its `head`."""
    parts = (int(part).to_bytes(BYTES_A_NUMBER, "little") for part in numbers[1:])
    return b"".join(parts).decode(errors="replace").strip()


def begin(call: str) -> None:
    """Record that this process enters a collective."""
    _last[:] = [_last[0] + 1, call.partition(":")[0]]


def last() -> tuple[int, str]:
    """The number of calls of this process so far, and the name of the last one."""
    return _last[0], _last[1]


def compare(heads: torch.Tensor, own: float) -> None:
    """Have every rank's head (size, HEAD), which may be on a GPU, compared with this rank's checksum.

    Raises RuntimeError as `check`; from a CPU's heads at once.
    """
    copied = None
    if heads.is_cuda:
        import torch

        heads, copied = heads.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()
    _unchecked.append((copied, heads, own))
    check()


def different() -> str | None:
    """A sentence that names what the ranks were about to do, where they said different things and that is known."""
    for copied, heads, own in list(_unchecked):
        if (copied is None or copied.query()) and bool((heads[:, 0] != own).any()):
            points = "; ".join(f"rank {rank}: {text_of(numbers)}" for rank, numbers in enumerate(heads.tolist()))
            return f"ranks are not at the same point ({points})"
    return None


def check() -> None:
    """Raise RuntimeError when ranks said different things, as far as that is known; never waits."""
    if (fault := different()) is not None:
        _unchecked.clear()
        raise RuntimeError(fault)
    while _unchecked and (_unchecked[0][0] is None or _unchecked[0][0].query()):
        _unchecked.popleft()
