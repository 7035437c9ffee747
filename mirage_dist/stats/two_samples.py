"""Two samples compared: the Kolmogorov-Smirnov test, and how often a value of one is below one of the other."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from mirage_dist import stats


def kolmogorov_smirnov(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """D, the largest distance of the two empirical distribution functions, and the two-sided exact p of equal ones.

    Under that hypothesis every order of the m + n values is equally likely, so p is the share of the lattice paths from
    (0, 0) to (m, n) that somewhere are D or more away from the diagonal (Hodges, Ark. Mat. 1958, 3:469). It is summed
    over paths that are away, so that a tiny p is exact too. With ties between the samples, p is too large rather than
    too small. Takes m · n steps. Raises ValueError where a sample is empty or a value is NaN.
    """
    m, n = len(first), len(second)
    if not m or not n or any(map(math.isnan, (*first, *second))):
        raise ValueError("a comparison of two distributions needs values of both, none of them NaN")
    one, two = np.sort(np.asarray(first, dtype=float)), np.sort(np.asarray(second, dtype=float))
    every = np.concatenate([one, two])
    # In units of 1 / (m n), so that distances are whole numbers.
    apart = np.searchsorted(one, every, side="right") * n - np.searchsorted(two, every, side="right") * m
    distance = int(np.abs(apart).max())
    return distance / (m * n), 1.0 if distance == 0 else _share_of_paths(m, n, distance)


def _share_of_paths(m: int, n: int, distance: int) -> float:
    """The share of the paths from (0, 0) to (m, n) that reach a point (i, j) with |i n − j m| ≥ distance."""
    i = np.arange(m + 1)
    away = np.zeros(m + 1)  # for points (i, k − i): the share of the paths to it that were away
    for k in range(1, m + n + 1):
        j = k - i
        # Of the paths to (i, j) a share i / k comes from (i − 1, j), the others from (i, j − 1).
        before = np.concatenate([[0.0], away[:-1]])
        away = before * i / k + away * j / k
        inside = (j >= 0) & (j <= n)
        away = np.where(inside, np.where(np.abs(i * n - j * m) >= distance, 1.0, away), 0.0)
    return min(1.0, float(away[m]))


def auc(
    below: Sequence[float],
    above: Sequence[float],
    groups: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> tuple[float, stats.Interval]:
    """P(a value of `below` is below one of `above`), ties half, with its 95 % interval.

    groups: of each value, in both; values of one group may be correlated, also across the two. Without them every value
    is independent. The variance is Obuchowski's of clustered data (Biometrics 1997, 53:567), without groups that of
    DeLong et al. (Biometrics 1988, 44:837); the interval is Wilson's for it (see `stats.rate_of_variance`), counted by
    the smaller number of groups. Raises ValueError where one of them is empty or a value is NaN.
    """
    m, n = len(below), len(above)
    if not m or not n or any(map(math.isnan, (*below, *above))):
        raise ValueError("the order of two samples needs values of both, none of them NaN")
    low, high = (np.asarray(values, dtype=float) for values in (below, above))
    placed_M = 1 - _rank(high, low) / n  # the share of `above` that is above each value of `below`
    placed_N = _rank(low, high) / m  # the share of `below` that is below each value of `above`
    area = float(placed_M.mean())
    own = groups or ([("below", i) for i in range(m)], [("above", j) for j in range(n)])
    sums = [_sums(part, (placed - area).tolist()) for part, placed in zip(own, (placed_M, placed_N), strict=True)]
    counts = [len(part) for part in sums]
    parts = [_corrected(len(part)) * math.fsum(x * x for x in part.values()) / size**2
             for part, size in zip(sums, (m, n), strict=True)]  # fmt: skip
    shared = sums[0].keys() & sums[1].keys()
    together = math.fsum(sums[0][name] * sums[1][name] for name in shared) / (m * n)
    variance = sum(parts) + 2 * _corrected(len(sums[0].keys() | sums[1].keys())) * together
    return area, stats.rate_of_variance(area, variance if min(counts) > 1 else 0.0, min(counts))


def _rank(of: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How many of `of` are below each value, equal ones half."""
    ordered = np.sort(of)
    return (np.searchsorted(ordered, values, side="left") + np.searchsorted(ordered, values, side="right")) / 2


def _sums(groups: Sequence[Hashable], values: Sequence[float]) -> dict[Hashable, float]:
    sums: dict[Hashable, float] = {}
    for own, value in zip(groups, values, strict=True):
        sums[own] = sums.get(own, 0.0) + value
    return sums


def _corrected(groups: int) -> float:
    return groups / (groups - 1) if groups > 1 else 1.0
