"""The power of the tests that reports make, computed exactly, and what follows from it before anything is measured.

Power is the probability that the test finds a difference which is there. Paired: McNemar's exact test (`stats.mcnemar`)
of two measurements of the same questions. Unpaired: Fisher's exact test (`stats.fisher`) of two groups of different
questions. Both are two-sided. Power is a sum over all outcomes, so that no approximation is left but the tails of
probability `LEFT_OUT` that the sums leave out.

N questions: pairs, or the questions of each of the two groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

LEFT_OUT = 1e-12  # of the probability of all outcomes, at most, at each end of a sum
TIE = 1 + 1e-9  # a p that is the level but for rounding counts as at it
MOST = 10_000_000  # questions
AHEAD = 100  # larger numbers of questions that are looked at: exact power falls a little before it rises again
FINEST = 1e-4  # of a difference of rates


@dataclass(frozen=True)
class Paired:
    """Two rates of the same questions. discordance: the share of questions on which the two measurements differ.

    Raises ValueError for rates outside [0, 1], and for a discordance that two such rates cannot have.
    """

    before: float
    after: float
    discordance: float

    def __post_init__(self) -> None:
        _check_rates(self.before, self.after)
        least, most = abs(self.after - self.before), min(self.before + self.after, 2 - self.before - self.after)
        if not least - 1e-9 <= self.discordance <= most + 1e-9:
            raise ValueError(
                f"a discordance of {self.discordance:g}: rates of {self.before:g} and {self.after:g} differ on "
                f"{least:g} to {most:g} of the questions"
            )

    def power(self, n: int, level: float) -> float:
        """Of McNemar's exact test on n pairs: Σ over the number m of discordant pairs of P(m) · P(rejected | m).

        Given m, the pairs that only the second measurement has are binomial with q = (d + δ) / 2d.
        """
        discordance = min(self.discordance, 1.0)
        if discordance <= 0:
            return 0.0
        q = min(1.0, max(0.0, (discordance + self.after - self.before) / (2 * discordance)))
        level *= TIE
        low, pairs = _window(n, discordance)
        # So far below the fair mean that the test rejects; from there on c rises to the bound.
        c = max(-1, math.floor(low / 2 - 10 * math.sqrt(low)) - 1)
        fair, one, other = (_Lower(low, p, c) for p in (0.5, q, 1 - q))
        total = 0.0
        for weight in pairs:
            # The largest number of pairs of the rarer kind with which the test rejects.
            while 2 * fair.next_below <= level and 2 * (fair.c + 1) < fair.m:
                for lower in (fair, one, other):
                    lower.include()
            total += weight * min(1.0, one.below + other.below)
            for lower in (fair, one, other):
                lower.add_trial()
        return min(1.0, total)


@dataclass(frozen=True)
class Unpaired:
    """Two rates of different questions, as many of each. Raises ValueError for rates outside [0, 1]."""

    before: float
    after: float

    def __post_init__(self) -> None:
        _check_rates(self.before, self.after)

    def power(self, n: int, level: float) -> float:
        """Of Fisher's exact test on n questions of each kind: Σ over the hits b of one group of P(b) · P(rejected | b).

        Given b, the test rejects when the other group's hits are at most a bound below b, or at least one above it;
        both bounds rise with b.
        """
        level *= TIE
        start, first = _window(n, self.before)
        low, second = _window(n, self.after)
        below = [0.0]  # P(the first group has fewer than `start` + i hits)
        for weight in first:
            below.append(below[-1] + weight)

        def fewer(hits: int) -> float:
            """P(the first group has fewer hits)."""
            return below[min(max(hits - start, 0), len(first))]

        # The test rejects below `under`, at (hits of the first group, b), and from `over`, at (b, hits of it).
        under, over = _Table.least_tail(low, n, level), _Table.largest_tail(low, n, level)
        total = 0.0
        for weight in second:
            total += weight * (fewer(under.few) + max(0.0, below[-1] - fewer(over.many)))
            under.add_many()
            while under.many <= n and 2 * under.tail <= level:
                under.add_few()
            over.add_few()
            while over.many <= n and 2 * over.tail > level:
                over.add_many()
        return min(1.0, total)


Design = Paired | Unpaired


def questions(design: Design, level: float, power: float) -> tuple[int, float] | None:
    """The fewest questions from which on the power stays at or above `power`, and the power that they have.

    The next `AHEAD` numbers are looked at. None where `MOST` do not suffice, as for two equal rates.
    """
    if design.before == design.after:
        return None
    most = 1
    while design.power(most, level) < power:
        most *= 2
        if most > MOST:
            return None
    low, high = most // 2, most  # the power is below, and is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if design.power(middle, level) >= power else (middle, high)
    fewest = low = high
    while low < fewest + AHEAD:
        low += 1
        if design.power(low, level) < power:
            fewest = low + 1
    return fewest, design.power(fewest, level)


def detectable(
    design: Callable[[float], Design | None], n: int, level: float, power: float, most: float
) -> tuple[float, float] | None:
    """The smallest difference that n questions show with this power, in steps of `FINEST`, and the power that it has.

    design: of a difference above 0; None where there is no such one. most: the largest difference. None where n
    questions show none.
    """

    def shown(steps: int) -> float:
        own = design(min(steps * FINEST, most))
        return 0.0 if own is None else own.power(n, level)

    low, high = 0, math.floor(most / FINEST + 1e-9)
    while high > 0 and design(high * FINEST) is None:
        high -= 1
    if high == 0 or shown(high) < power:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) >= power else (middle, high)
    return round(high * FINEST, 6), shown(high)


def independent(before: float, after: float) -> float:
    """The discordance of two measurements that have nothing but the questions in common."""
    return before * (1 - after) + after * (1 - before)


def _check_rates(*rates: float) -> None:
    for rate in rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"a rate of {rate:g}: expected a share from 0 to 1")


def _window(n: int, p: float) -> tuple[int, list[float]]:
    """The first number of successes in n trials, and the probabilities from it on, without tails of LEFT_OUT each."""
    if p <= 0 or p >= 1:
        return (0 if p <= 0 else n), [1.0]
    mode = min(n, math.floor((n + 1) * p))
    at_mode = math.exp(_log_choose(n, mode) + mode * math.log(p) + (n - mode) * math.log1p(-p))
    odds = p / (1 - p)
    least = LEFT_OUT / (n + 1)
    upper, k = [at_mode], mode
    while k < n and upper[-1] > least:
        upper.append(upper[-1] * (n - k) / (k + 1) * odds)
        k += 1
    lower, k = [at_mode], mode
    while k > 0 and lower[-1] > least:
        lower.append(lower[-1] * k / (n - k + 1) / odds)
        k -= 1
    return k, [*reversed(lower[1:]), *upper]


class _Lower:
    """P(at most c successes in m trials), brought along as m and c rise by one each."""

    def __init__(self, m: int, p: float, c: int) -> None:
        start, weights = _window(m, p)
        self.m, self.p, self.c = m, p, c
        self.below = math.fsum(weights[: max(0, c + 1 - start)])
        # Of c + 1 successes; its logarithm, because (1 - p)^m is too small for a float.
        if 0 < p < 1:
            self.log_next = _log_choose(m, c + 1) + (c + 1) * math.log(p) + (m - c - 1) * math.log1p(-p)
        else:
            self.log_next = 0.0 if c + 1 == m * p else -math.inf

    @property
    def next_below(self) -> float:
        """P(at most c + 1 successes)."""
        return self.below + math.exp(self.log_next)

    def include(self) -> None:
        """Let c rise by one."""
        self.below = self.next_below
        self.c += 1
        k = self.c  # the probability of k + 1 from that of k
        if self.p <= 0 or self.p >= 1 or k >= self.m:
            hit = self.p >= 1 and k + 1 == self.m
            self.log_next = 0.0 if hit else -math.inf
        else:
            self.log_next += math.log((self.m - k) / (k + 1)) + math.log(self.p) - math.log1p(-self.p)

    def add_trial(self) -> None:
        """Let m rise by one: of at most c successes, those with c in m trials and one more are lost."""
        m, k = self.m, self.c + 1
        if self.p <= 0 or self.p >= 1:
            self.below = self.below if self.p <= 0 else float(self.c >= m + 1)
            self.log_next = 0.0 if (k == 0 if self.p <= 0 else k == m + 1) else -math.inf
            self.m += 1
            return
        if self.c >= 0:
            log_c = self.log_next - math.log((m - self.c) / k) - math.log(self.p) + math.log1p(-self.p)
            self.below = max(0.0, self.below - self.p * math.exp(log_c))
        self.log_next += math.log((m + 1) / (m + 1 - k)) + math.log1p(-self.p)
        self.m += 1


class _Table:
    """Fisher's tail of two groups of n with `few` and `many` hits: P(the first has at most `few` | both have so many
    hits together). It is brought along as either number rises by one.
    """

    def __init__(self, few: int, many: int, n: int) -> None:
        self.few, self.many, self.n = few, many, n
        self.at, self.tail = self._sum()

    def _sum(self) -> tuple[float, float]:
        """The probability of this table, and with those of fewer hits of the first group."""
        n, few, total = self.n, self.few, self.few + self.many
        if self.many > n:
            return 0.0, 0.0
        at = math.exp(_log_choose(n, few) + _log_choose(n, self.many) - _log_choose(2 * n, total))
        term = tail = at
        for k in range(few, max(0, total - n), -1):
            term *= k / (n - k + 1) * (n - total + k) / (total - k + 1)
            tail += term
            if term <= tail * 1e-17:
                break
        return at, tail

    @classmethod
    def least_tail(cls, b: int, n: int, level: float) -> _Table:
        """The table with b hits of one group and the fewest of the other with which the test does not reject."""
        low, high = -1, b  # rejected, or below all; not rejected, since its tail is at least a half
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if 2 * cls(middle, b, n).tail <= level else (low, middle)
        return cls(high, b, n)

    @classmethod
    def largest_tail(cls, b: int, n: int, level: float) -> _Table:
        """The table with b hits of one group and the fewest above b of the other with which the test rejects; n + 1
        hits where there is none.
        """
        low, high = b, n + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if 2 * cls(b, middle, n).tail <= level else (middle, high)
        return cls(b, high, n)

    def add_many(self) -> None:
        """One more hit of the second group: of the tables before, those are lost whose first group would have it."""
        n, total = self.n, self.few + self.many
        if self.many >= n:
            self.many, self.at, self.tail = self.many + 1, 0.0, 0.0
            return
        self.tail = max(0.0, self.tail - self.at * (n - self.few) / (2 * n - total))
        self.at *= (n - self.many) / (self.many + 1) * (total + 1) / (2 * n - total)
        self.many += 1

    def add_few(self) -> None:
        """One more hit of the first group."""
        n, total = self.n, self.few + self.many
        if self.many > n or self.few >= n:
            self.few += 1
            return
        self.tail = max(0.0, self.tail - self.at * (n - self.few) / (2 * n - total))
        self.at *= (n - self.few) / (self.few + 1) * (total + 1) / (2 * n - total)
        self.tail += self.at
        self.few += 1


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
