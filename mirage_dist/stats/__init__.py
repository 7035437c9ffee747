"""Confidence intervals and tests for counts, all at 95 % and two-sided. Imports nothing of the package."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypedDict, TypeVar

Z95 = 1.959963984540054  # the standard normal's .975 quantile
Interval = tuple[float, float]
K = TypeVar("K", bound=Hashable)


def wilson(k: int, n: int) -> Interval:
    """Wilson's score interval for k successes in n independent trials (Wilson, JASA 1927, eq. 4 solved for p).

    The bounds are the p at which |k/n − p| = z √(p(1 − p)/n). Raises ValueError unless 0 ≤ k ≤ n and n > 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"no interval for {k} of {n}")
    return _score(k / n, n)


def _score(rate: float, n: float) -> Interval:
    """Wilson's interval of a rate with an effective number n of independent trials, not necessarily an integer."""
    square = Z95 * Z95 / n
    centre = (rate + square / 2) / (1 + square)
    half = math.sqrt(square * (rate * (1 - rate) + square / 4)) / (1 + square)
    # At the ends the bound is exactly 0 or 1; the subtraction would leave a rounding error there.
    return (0.0 if rate == 0 else centre - half), (1.0 if rate == 1 else centre + half)


def clustered(clusters: Sequence[tuple[int, int]]) -> Interval:
    """Interval of Σk / Σn over independent clusters (k, n) whose trials may be correlated: Wilson's with `effective`
    trials. Clusters of one trial each give Wilson's interval. Raises ValueError when there are no trials.
    """
    return _score(*effective(clusters))


def effective(clusters: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Σk / Σn over independent clusters (k, n), and the number of independent trials that tell as much about it.

    (Dean and Pagano, J. Surv. Stat. Methodol. 2015, with Korn and Graubard's correction for few clusters): n* = n /
    deff · (z / t)². deff, at least 1, is the linearised variance over clusters divided by the variance of n independent
    trials; t is Student's quantile with one degree of freedom fewer than clusters. When all trials agree, deff cannot
    be estimated and each cluster counts as one trial. Raises ValueError when there are no trials.
    """
    clusters = [(k, n) for k, n in clusters if n]
    hits, trials, groups = sum(k for k, _ in clusters), sum(n for _, n in clusters), len(clusters)
    if not trials or not all(0 <= k <= n for k, n in clusters):
        raise ValueError(f"no interval for {hits} of {trials}")
    rate = hits / trials
    if trials == groups or hits in (0, trials) or groups == 1:
        return rate, float(groups)
    deff = max(1.0, _spread(clusters, rate) * trials / (rate * (1 - rate)))
    return rate, trials / deff * (Z95 / student(groups - 1)) ** 2


def rogan_gladen(
    apparent: tuple[float, float], recall: tuple[float, float], specificity: tuple[float, float]
) -> tuple[float, Interval] | None:
    """A rate corrected for the errors of the classifier that measured it, and its interval, both within [0, 1].

    apparent: the rate by the classifier, and its number of trials. recall, specificity: the classifier's, each with the
    number of labelled trials that it was estimated from; the three are taken as independent.

    rate = (apparent + specificity − 1) / (recall + specificity − 1) (Rogan and Gladen, Am. J. Epidemiol. 1978, 107:71).
    The interval is Lang and Reiczigel's (Prev. Vet. Med. 2014, 113:13), which adds one success and one failure to the
    labels of each kind and z² / 2 of each to the trials, and shifts the centre; it is widened to hold the rate.
    None when recall + specificity ≤ 1: the classifier is then no better than chance, and any rate is compatible with
    what it says. Raises ValueError when one of the three has no trials.
    """
    (rate, n), (true_positive, positives), (true_negative, negatives) = apparent, recall, specificity
    if min(n, positives, negatives) <= 0:
        raise ValueError("no correction without trials, and labels of both kinds")
    youden = true_positive + true_negative - 1
    square = Z95 * Z95
    p = (n * rate + square / 2) / (n + square)
    se, sp = (positives * true_positive + 1) / (positives + 2), (negatives * true_negative + 1) / (negatives + 2)
    if youden <= 0 or se + sp <= 1:
        return None
    point = min(1.0, max(0.0, (rate + true_negative - 1) / youden))
    centre = (p + sp - 1) / (se + sp - 1)
    missed, false = se * (1 - se) / (positives + 2), sp * (1 - sp) / (negatives + 2)
    variance = p * (1 - p) / (n + square) + centre**2 * missed + (1 - centre) ** 2 * false
    half = Z95 * math.sqrt(variance) / (se + sp - 1)
    centre += 2 * square * (centre * missed - (1 - centre) * false)
    return point, (max(0.0, min(point, centre - half)), min(1.0, max(point, centre + half)))


def scored(clusters: Sequence[tuple[float, int]]) -> Interval:
    """Interval of Σk / Σn over independent clusters (k, n) where k sums n scores in [0, 1], such as VQA accuracies.

    As `clustered`, with the number of binary trials whose rate has the variance of the mean: scores between 0 and 1
    vary less than binary outcomes, so deff may be below 1. Scores of only 0 and 1 give `clustered`.
    """
    clusters = [(k, n) for k, n in clusters if n]
    if all(k == int(k) for k, _ in clusters):
        return clustered([(int(k), n) for k, n in clusters])
    rate, groups = sum(k for k, _ in clusters) / sum(n for _, n in clusters), len(clusters)
    return rate_of_variance(rate, _spread(clusters, rate) if groups > 1 else 0.0, groups)


def _spread(clusters: Sequence[tuple[float, int]], rate: float) -> float:
    """The linearised variance of Σk / Σn over clusters."""
    groups, trials = len(clusters), sum(n for _, n in clusters)
    return groups / (groups - 1) * sum((k - rate * n) ** 2 for k, n in clusters) / trials**2


def student(freedom: int) -> float:
    """Student's .975 quantile: exact up to 2, above expanded around the normal one (Abramowitz and Stegun 26.7.5)."""
    z = Z95
    if freedom <= 2:  # tan(.475 π), and .95 / √(2 · .975 · .025)
        return 12.706204736432095 if freedom == 1 else 4.302652729749464
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def mean_of_clusters(clusters: Sequence[tuple[float, int]]) -> tuple[float, Interval | None]:
    """Mean Σs / Σn of n values each of independent clusters, of which s is the sum, and its interval.

    Student's t with one degree of freedom fewer than clusters, around the linearised variance over clusters; clusters
    of one value each give `mean`. None for the interval of a single cluster. Raises ValueError when there is no value.
    """
    clusters = [(s, n) for s, n in clusters if n]
    if not clusters:
        raise ValueError("no mean without values")
    middle, groups = math.fsum(s for s, _ in clusters) / sum(n for _, n in clusters), len(clusters)
    if groups == 1:
        return middle, None
    half = student(groups - 1) * math.sqrt(_spread(clusters, middle))
    return middle, (middle - half, middle + half)


def rate_of_variance(rate: float, variance: float, clusters: int) -> Interval:
    """Wilson's interval of a rate that was estimated with this variance from so many independent clusters.

    It is that of as many binary trials as have this variance, with Student's quantile for few clusters (see
    `effective`); where the variance is 0 it cannot be estimated, and each cluster counts as one trial.
    """
    if variance <= 0 or clusters < 2:
        return _score(rate, clusters)
    return _score(rate, rate * (1 - rate) / variance * (Z95 / student(clusters - 1)) ** 2)


def mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, lower and upper bound (Student's t; Biometrika 1908) of at least two independent values."""
    n = len(values)
    middle = math.fsum(values) / n
    half = student(n - 1) * math.sqrt(math.fsum((x - middle) ** 2 for x in values) / (n - 1) / n)
    return middle, middle - half, middle + half


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test of the hypothesis that both kinds of discordant pairs are equally likely.

    Twice the smaller tail of Binomial(only_first + only_second, ½), at most 1 (McNemar 1947; exact: Mosteller 1952).
    """
    pairs, fewer = only_first + only_second, min(only_first, only_second)
    tail = ways = 1  # the number of ways to get no head in `pairs` tosses, then one head more in each turn
    for heads in range(fewer):
        ways = ways * (pairs - heads) // (heads + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**pairs)


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for multiple tests: controls the family-wise error rate (Holm, 1979)."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = largest
    return corrected


class Paired(TypedDict):
    """The result of `paired`. n: number of pairs. before, after: numbers of positive outcomes.

    only_before, only_after: numbers of discordant pairs. unpaired: number of subjects measured once only.
    difference: of the rates, after − before, with its interval ci95 = [low, high]. p: of McNemar's test.
    """

    n: int
    before: int
    after: int
    only_before: int
    only_after: int
    unpaired: int
    difference: float
    ci95: list[float]
    p: float


def paired(before: Mapping[K, bool], after: Mapping[K, bool]) -> Paired | None:
    """Two binary measurements of the same subjects: McNemar's test and the difference of the rates.

    Subjects measured only once are left out and counted as unpaired; None when no subject was measured twice.
    The interval is Newcombe's (Stat. Med. 1998, 17:2635, method 10), which is accurate near 0 and 1, as Wilson's is.
    """
    shared = before.keys() & after.keys()
    if not shared:
        return None
    table = [[sum(before[i] == b and after[i] == a for i in shared) for a in (False, True)] for b in (False, True)]
    (_, only_after), (only_before, both) = table
    n = len(shared)
    first, second = both + only_before, both + only_after
    return {
        "n": n,
        "before": first,
        "after": second,
        "only_before": only_before,
        "only_after": only_after,
        "unpaired": len(before.keys() ^ after.keys()),
        "difference": (second - first) / n,
        "ci95": list(newcombe(both, only_after, only_before, n)),
        "p": mcnemar(only_before, only_after),
    }


def newcombe(both: int, only_after: int, only_before: int, n: int) -> Interval:
    """Interval of the difference of two paired rates (see `paired`); n: the number of pairs."""
    neither = n - both - only_after - only_before
    after, before = both + only_after, both + only_before
    low_a, high_a = (abs(bound - after / n) for bound in wilson(after, n))
    low_b, high_b = (abs(bound - before / n) for bound in wilson(before, n))
    size = math.sqrt(after * (n - after) * before * (n - before))
    product = both * neither - only_after * only_before
    # Newcombe's correction for continuity: a correlation above 0 is taken n/2 smaller, not below 0.
    phi = (max(product - n / 2, 0) if product > 0 else product) / size if size else 0.0
    difference = (only_after - only_before) / n
    below = math.sqrt(max(0.0, low_a**2 - 2 * phi * low_a * high_b + high_b**2))
    above = math.sqrt(max(0.0, high_a**2 - 2 * phi * high_a * low_b + low_b**2))
    return max(-1.0, difference - below), min(1.0, difference + above)


def kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Cohen's κ of two raters' classes: (agreement − chance agreement) / (1 − chance agreement).

    (Cohen, Educ. Psychol. Meas. 1960.) None without pairs, or when both raters used one and the same class throughout.
    """
    n = len(pairs)
    classes = {c for pair in pairs for c in pair}
    left = {c: sum(a == c for a, _ in pairs) for c in classes}
    right = {c: sum(b == c for _, b in pairs) for c in classes}
    chance = sum(left[c] * right[c] for c in classes)  # times n²: an integer, so that full agreement is exact
    if n == 0 or chance == n * n:
        return None
    agreed = sum(a == b for a, b in pairs)
    return (agreed * n - chance) / (n * n - chance)


# ------------------------------------------------------------------------------- association of a cue with a class


def log_odds(a: int, b: int, c: int, d: int) -> tuple[float, Interval]:
    """Log odds ratio log(a d / (b c)) of a 2 × 2 table, and its interval (Woolf, Ann. Hum. Genet. 1955).

    Half a count is added to each cell (Haldane 1956; Anscombe 1956; Gart and Zweifel, Biometrika 1967), so that the
    estimate is finite for an empty cell, and biased towards 0. The coverage is 95 % when every expected count is at
    least four, 92 % when one is one, and lower below (computed for 20 to 200 trials against 300 and 2000).
    """
    cells = [count + 0.5 for count in (a, b, c, d)]
    estimate = math.log(cells[0] * cells[3] / (cells[1] * cells[2]))
    half = Z95 * math.sqrt(sum(1 / cell for cell in cells))
    return estimate, (estimate - half, estimate + half)


def fisher(a: int, b: int, c: int, d: int) -> float:
    """Two-sided p of Fisher's exact test that rows (a, b) and (c, d) have equal rates: twice the smaller tail, ≤ 1.

    Under that hypothesis and given the margins, a is hypergeometric (the central version of Fay, Biostatistics 2010).
    """
    total, row, column = a + b + c + d, a + b, a + c
    if a * total < row * column:
        a, b, c, d = b, a, d, c  # the tail on the far side of the expected count is smaller; sum upwards
        column = total - column
    log_choose = _log_choose(row, a) + _log_choose(total - row, c) - _log_choose(total, column)
    term = tail = 1.0  # relative to the probability of this table
    while b and c and term > tail * 1e-17:
        term *= b * c / ((a + 1) * (d + 1))
        tail += term
        a, b, c, d = a + 1, b - 1, c - 1, d + 1
    return min(1.0, 2 * math.exp(min(log_choose + math.log(tail), 0.0)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjusted p-values (q): rejecting those ≤ α controls the false-discovery rate at α.

    (Benjamini and Hochberg, J. R. Stat. Soc. B 1995; for independent or positively dependent tests.)
    """
    order = sorted(range(len(p)), key=lambda i: -p[i])
    q, least = [0.0] * len(p), 1.0
    for rank, i in zip(range(len(p), 0, -1), order, strict=True):
        least = min(least, p[i] * len(p) / rank)
        q[i] = least
    return q


def balanced_accuracy(first: tuple[float, int], second: tuple[float, int]) -> tuple[float, Interval]:
    """Mean of the fractions k / n of correct predictions in two classes; .5 by chance, however unequal the classes are.

    (Brodersen et al., ICPR 2010.) A prediction at random counts as half a correct one, so k may end in .5. The interval
    combines Wilson's intervals of the classes (MOVER: Newcombe 1998; Zou and Donner, Stat. Med. 2008).
    Raises ValueError when a class is empty.
    """
    if not (first[1] and second[1]):
        raise ValueError("no balanced accuracy without both classes")
    rates = [k / n for k, n in (first, second)]
    bounds = [_score(rate, n) for rate, (_, n) in zip(rates, (first, second), strict=True)]
    below, above = (math.hypot(*(b[i] - rate for b, rate in zip(bounds, rates, strict=True))) for i in (0, 1))
    mean = sum(rates) / 2
    return mean, (mean - below / 2, mean + above / 2)
