"""Comparisons of two samples against their definitions, by trying everything, and against how often they are right."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage_dist.stats.two_samples import auc, kolmogorov_smirnov

VALUES = st.lists(st.integers(0, 9), min_size=1, max_size=5)
SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.5]), min_size=1, max_size=8)


def distance(first, second) -> float:
    """The largest distance of the empirical distribution functions, at every value."""
    return max(abs(np.mean(np.array(first) <= x) - np.mean(np.array(second) <= x)) for x in (*first, *second))


@settings(max_examples=40)
@given(VALUES, VALUES)
def test_a_p_is_the_share_of_all_orders_that_are_as_far_apart(first, second):
    """Oracle: every choice of which of the m + n different values are the first sample's."""
    d, p = kolmogorov_smirnov(first, second)
    assert d == pytest.approx(distance(first, second))
    m, every = len(first), range(len(first) + len(second))
    orders = [distance(own, [x for x in every if x not in own]) for own in combinations(every, m)]
    assert p == pytest.approx(np.mean([order >= d - 1e-9 for order in orders]), rel=1e-12)
    assert kolmogorov_smirnov(second, first) == pytest.approx((d, p), rel=1e-9)


def test_a_p_of_samples_that_do_not_overlap_is_two_of_all_orders_however_small():
    d, p = kolmogorov_smirnov(range(200), range(200, 400))
    assert d == 1.0
    assert p == pytest.approx(2 / math.comb(400, 200), rel=1e-9)
    assert kolmogorov_smirnov([1.0, 2.0], [1.0, 2.0]) == (0.0, 1.0)


def test_a_p_is_below_five_percent_about_as_rarely_as_it_says():
    draw = np.random.default_rng(3)
    below = [kolmogorov_smirnov(draw.normal(size=30), draw.normal(size=45))[1] < 0.05 for _ in range(600)]
    assert 0.02 <= np.mean(below) <= 0.06  # exact tests of so few values stay below their level


@given(SCORES, SCORES)
def test_an_auc_is_the_share_of_pairs_in_order(members, others):
    pairs = [(1.0 if m < o else 0.5 if m == o else 0.0) for m in members for o in others]
    area, (low, high) = auc(members, others)
    assert area == pytest.approx(np.mean(pairs))
    assert 0 <= low <= area <= high <= 1
    assert auc(others, members)[0] == pytest.approx(1 - area)


def test_an_aucs_interval_covers_the_truth_about_as_often_as_it_says():
    """Scores of N(0, 1) and N(1, 1), whose AUC is Φ(1/√2)."""
    truth, draw = 0.5 * (1 + math.erf(0.5)), np.random.default_rng(0)
    held = 0
    for _ in range(400):
        _, (low, high) = auc(draw.normal(0, 1, 40).tolist(), draw.normal(1, 1, 60).tolist())
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.98


def test_an_interval_of_groups_covers_where_one_of_values_does_not():
    """Twelve groups on both sides, each with a shift of its own of the noise's size, shared by both sides."""
    draw, numbers = np.random.default_rng(1), np.arange(12)
    groups = numbers.repeat(5).tolist(), numbers.repeat(4).tolist()
    held = {True: 0, False: 0}
    for _ in range(400):
        below, above = draw.normal(0, 1.5, 12), draw.normal(0, 1.5, 12)
        shared = draw.normal(0, 0.5, 12)
        first = (below + shared).repeat(5) + draw.normal(0, 1, 60)
        second = (above + shared).repeat(4) + draw.normal(0, 1, 48) + 1
        truth = 0.5 * (1 + math.erf(1 / math.sqrt(2 * (2 * 1.5**2 + 2 * 0.25 + 2))))
        for grouped in (True, False):
            _, (low, high) = auc(first.tolist(), second.tolist(), groups if grouped else None)
            held[grouped] += low <= truth <= high
    assert held[True] / 400 >= 0.92
    assert held[False] / 400 < 0.8


@pytest.mark.parametrize("values", [[], [math.nan]])
@pytest.mark.parametrize("function", [auc, kolmogorov_smirnov])
def test_what_has_no_order_is_an_error(function, values):
    for pair in ((values, [1.0]), ([1.0], values)):
        with pytest.raises(ValueError, match="none of them NaN"):
            function(*pair)
