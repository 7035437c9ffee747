"""The garbage collector does not run while libraries are imported, and is as it was afterwards."""

import gc
from contextlib import suppress

import pytest

from mirage_dist.imports import loading


def collections() -> int:
    """How often the collector ran while many objects were made that stay."""
    runs = []

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            runs.append(info["generation"])

    gc.callbacks.append(count)
    try:
        kept = [[number] for number in range(100_000)]
    finally:
        gc.callbacks.remove(count)
    assert len(kept) == 100_000
    return len(runs)


def test_nothing_is_collected_within_the_block_and_again_behind_it():
    assert collections() > 0
    with loading():
        assert collections() == 0
        with loading():  # blocks may lie in one another
            pass
        assert collections() == 0
    assert collections() > 0


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before_also_behind_an_error(enabled: bool):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(ImportError), loading():
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
