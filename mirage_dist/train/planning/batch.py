"""The micro-batch that keeps `train.global_batch` on a given number of ranks."""

from __future__ import annotations

from mirage_dist.schema import ConfigError


def choose(global_batch: int, ranks: int, largest_that_fits: int) -> int:
    """The largest micro-batch up to `largest_that_fits` whose multiples make up every rank's share of a global batch.

    The accumulation is then global_batch / (ranks × micro-batch). Raises ConfigError when the global batch does not
    divide by the ranks, with the numbers of ranks that do, and when not even one row fits.
    """
    if ranks < 1 or global_batch % ranks:
        raise ConfigError(
            f"train.global_batch={global_batch}: does not divide by {ranks} ranks; take "
            f"{_nearest(global_batch, ranks)} ranks, or another global batch (which is another run: its learning rate "
            "may have to change)"
        )
    if largest_that_fits < 1:
        raise ConfigError(f"train.micro_batch: not even one row fits on one of {ranks} ranks")
    share = global_batch // ranks
    return max(size for size in divisors(share) if size <= largest_that_fits)


def rounded(global_batch: int, ranks: int) -> int:
    """The least global batch from this one on that divides by the ranks."""
    return -(-global_batch // ranks) * ranks


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in order."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _nearest(global_batch: int, ranks: int) -> str:
    """The nearest numbers of ranks that divide the global batch, in words."""
    fit = divisors(global_batch)
    below, above = [n for n in fit if n < ranks], [n for n in fit if n > ranks]
    return " or ".join(str(n) for n in [*below[-1:], *above[:1]])
