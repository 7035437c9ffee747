"""Intervals cover what they say, in simulation; exact tests equal their definition by enumeration."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import stats

small = st.integers(0, 7)


def enumerated_mcnemar(b, c):
    """Definition: the share of all ways to toss b + c fair coins that are at least as uneven."""
    coins = itertools.product((0, 1), repeat=b + c)
    uneven = [abs(2 * sum(way) - (b + c)) >= abs(b - c) for way in coins]
    return Fraction(sum(uneven), len(uneven))


@given(small, small)
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven(b, c):
    assert stats.mcnemar(b, c) == pytest.approx(float(enumerated_mcnemar(b, c)), rel=1e-12)


def test_mcnemar_holds_for_counts_that_no_float_could():
    assert stats.mcnemar(3000, 3000) == 1
    assert 0 < stats.mcnemar(900, 100) < 1e-100


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_clusters_of_one_give_wilsons_interval(counts):
    k, n = counts
    assert stats.clustered([(1, 1)] * k + [(0, 1)] * (n - k)) == stats.wilson(k, n)


@given(st.integers(2, 60).flatmap(lambda g: st.tuples(st.integers(1, g - 1), st.just(g))), st.integers(2, 5))
def test_answers_that_always_agree_are_worth_one_each(counts, size):
    k, groups = counts
    low, high = stats.clustered([(size, size)] * k + [(0, size)] * (groups - k))
    alone = stats.wilson(k, groups)
    assert low <= alone[0] + 1e-12
    assert high >= alone[1] - 1e-12
    assert high - low < 1.6 * (alone[1] - alone[0]) or groups < 8  # and not worth much less


@given(st.lists(st.tuples(st.integers(0, 3), st.just(3)), min_size=1, max_size=40))
def test_the_clustered_interval_holds_the_rate_and_is_never_narrower_than_wilsons(clusters):
    k, n = sum(c[0] for c in clusters), sum(c[1] for c in clusters)
    low, high = stats.clustered(clusters)
    assert 0 <= low <= k / n <= high <= 1
    plain = stats.wilson(k, n)
    assert high - low >= plain[1] - plain[0] - 1e-12


def test_nothing_tried_has_no_interval():
    with pytest.raises(ValueError, match="no interval"):
        stats.clustered([(0, 0)])


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (441, 1.9654)])
def test_students_quantile_against_the_tables(freedom, quantile):
    assert stats._student(freedom) == pytest.approx(quantile, rel=0.012 if freedom < 5 else 0.002)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("correlation", [0.0, 0.4, 0.9])
def test_the_clustered_interval_covers_in_simulation(rate, correlation):
    """Beta-binomial answers, 60 questions of 3 rewrites; Wilson's plain interval falls to .78 at correlation .9."""
    generator = np.random.default_rng(0)
    repeats, questions, shots = 1500, 60, 3
    if correlation:
        scale = 1 / correlation - 1
        chance = generator.beta(rate * scale, (1 - rate) * scale, (repeats, questions))
    else:
        chance = np.full((repeats, questions), rate)
    hits = generator.binomial(shots, chance)
    intervals = [stats.clustered([(int(k), shots) for k in row]) for row in hits]
    covered = np.mean([low <= rate <= high for low, high in intervals])
    assert 0.93 <= covered <= 0.985
    if correlation == 0.9:
        plain = [stats.wilson(int(row.sum()), questions * shots) for row in hits]
        assert np.mean([low <= rate <= high for low, high in plain]) < 0.85


@pytest.mark.parametrize(("before", "after", "shared"), [(0.5, 0.6, 0.2), (0.05, 0.5, 0.04), (0.9, 0.85, 0.8)])
def test_newcombes_interval_covers_in_simulation(before, after, shared):
    """shared: the probability that both are so."""
    generator = np.random.default_rng(1)
    chances = [1 - before - after + shared, after - shared, before - shared, shared]
    covered = []
    for neither, only_after, only_before, both in generator.multinomial(80, chances, 2000):
        assert neither >= 0
        low, high = stats._newcombe(int(both), int(only_after), int(only_before), 80)
        covered.append(low <= after - before <= high)
    assert 0.93 <= np.mean(covered) <= 0.985


outcomes = st.dictionaries(st.integers(0, 30), st.booleans())


@given(outcomes, outcomes)
def test_pairing_counts_shared_things_and_turns_round_with_its_arguments(before, after):
    found, turned = stats.paired(before, after), stats.paired(after, before)
    shared = before.keys() & after.keys()
    if not shared:
        assert found is turned is None
        return
    assert found is not None
    assert turned is not None
    assert (found["n"], found["unpaired"]) == (len(shared), len(before) + len(after) - 2 * len(shared))
    assert (found["before"], found["after"]) == (sum(before[i] for i in shared), sum(after[i] for i in shared))
    assert found["difference"] == pytest.approx((found["only_after"] - found["only_before"]) / found["n"])
    low, high = found["ci95"]
    assert low <= found["difference"] <= high
    assert turned["p"] == found["p"]
    assert turned["ci95"] == pytest.approx([-high, -low])


def test_kappa_of_cohens_own_kind_of_table():
    pairs = [("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15
    assert stats.kappa(pairs) == pytest.approx(0.4)  # agreement .7, by chance .5


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), max_size=30))
def test_kappa_is_symmetric_at_most_one_and_one_only_in_agreement(pairs):
    found = stats.kappa(pairs)
    assert found == stats.kappa([(b, a) for a, b in pairs])
    if found is None:
        assert len({c for pair in pairs for c in pair}) <= 1
    else:
        assert found <= 1
        assert math.isclose(found, 1) == all(a == b for a, b in pairs)


def test_holm_of_a_worked_example():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_corrects_upwards_and_no_more_than_bonferroni(ps):
    found = stats.holm(ps)
    assert all(p <= q <= min(1, len(ps) * p) + 1e-12 for p, q in zip(ps, found, strict=True))
    ranked = [found[i] for i in sorted(range(len(ps)), key=lambda i: ps[i])]
    assert ranked == sorted(ranked)


@given(*[st.integers(0, 50)] * 4)
def test_log_odds_change_sign_with_the_sides_and_shrink_with_the_counts(k, rest, other_k, other_rest):
    ratio, low, high = stats.log_odds(k, k + rest, other_k, other_k + other_rest)
    assert low < ratio < high
    assert stats.log_odds(other_k, other_k + other_rest, k, k + rest) == pytest.approx((-ratio, -high, -low))
    wide = high - low
    _, low, high = stats.log_odds(10 * k, 10 * (k + rest), 10 * other_k, 10 * (other_k + other_rest))
    assert high - low <= wide


def test_log_odds_of_a_worked_example():
    # (9.5 · 8.5) / (1.5 · 2.5), standard error √(1/9.5 + 1/1.5 + 1/2.5 + 1/8.5)
    ratio, low, high = stats.log_odds(9, 10, 2, 10)
    assert ratio == pytest.approx(math.log(9.5 * 8.5 / (1.5 * 2.5)))
    assert (high - low) / 2 == pytest.approx(1.959964 * math.sqrt(1 / 9.5 + 1 / 1.5 + 1 / 2.5 + 1 / 8.5), rel=1e-6)


def test_the_means_interval_is_students():
    half = 2.776 * math.sqrt(2.5 / 5)  # t of 4 degrees of freedom, variance 2.5, five values
    assert stats.mean([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - half, 3 + half), rel=0.01)
