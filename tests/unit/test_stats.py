"""Intervals cover what they say, in simulation; exact tests equal their definition by enumeration."""

import itertools
import math
import random
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
    assert stats.student(freedom) == pytest.approx(quantile, rel=0.012 if freedom < 5 else 0.002)


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
        low, high = stats.newcombe(int(both), int(only_after), int(only_before), 80)
        covered.append(low <= after - before <= high)
    assert 0.93 <= np.mean(covered) <= 0.985


outcomes = st.dictionaries(st.integers(0, 30), st.booleans())


@given(outcomes, outcomes)
def test_pairing_counts_shared_things_and_turns_round_with_its_arguments(before, after):
    result, turned = stats.paired(before, after), stats.paired(after, before)
    shared = before.keys() & after.keys()
    if not shared:
        assert result is turned is None
        return
    assert result is not None
    assert turned is not None
    assert (result["n"], result["unpaired"]) == (len(shared), len(before) + len(after) - 2 * len(shared))
    assert (result["before"], result["after"]) == (sum(before[i] for i in shared), sum(after[i] for i in shared))
    assert result["difference"] == pytest.approx((result["only_after"] - result["only_before"]) / result["n"])
    low, high = result["ci95"]
    assert low <= result["difference"] <= high
    assert turned["p"] == result["p"]
    assert turned["ci95"] == pytest.approx([-high, -low])


def test_kappa_of_cohens_own_kind_of_table():
    pairs = [("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15
    assert stats.kappa(pairs) == pytest.approx(0.4)  # agreement .7, by chance .5


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), max_size=30))
def test_kappa_is_symmetric_at_most_one_and_one_only_in_agreement(pairs):
    result = stats.kappa(pairs)
    assert result == stats.kappa([(b, a) for a, b in pairs])
    if result is None:
        assert len({c for pair in pairs for c in pair}) <= 1
    else:
        assert result <= 1
        assert math.isclose(result, 1) == all(a == b for a, b in pairs)


def test_holm_of_a_worked_example():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_corrects_upwards_and_no_more_than_bonferroni(ps):
    corrected = stats.holm(ps)
    assert all(p <= q <= min(1, len(ps) * p) + 1e-12 for p, q in zip(ps, corrected, strict=True))
    ranked = [corrected[i] for i in sorted(range(len(ps)), key=lambda i: ps[i])]
    assert ranked == sorted(ranked)


def test_the_means_interval_is_students():
    half = 2.776 * math.sqrt(2.5 / 5)  # t of 4 degrees of freedom, variance 2.5, five values
    assert stats.mean([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - half, 3 + half), rel=0.01)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=9), st.integers(1, 5))
def test_a_mean_of_clusters_is_that_of_their_means_where_each_says_one_thing_however_often(values, times):
    """Clusters of one value are independent values; repeating each in its cluster adds nothing."""
    middle, low, high = stats.mean(values)
    mean, bounds = stats.mean_of_clusters([(times * value, times) for value in values])
    assert mean == pytest.approx(middle, abs=1e-9)
    assert bounds == pytest.approx((low, high), abs=1e-6)


def test_a_mean_of_one_cluster_has_no_interval_and_one_of_none_is_an_error():
    assert stats.mean_of_clusters([(6.0, 3), (0.0, 0)]) == (2.0, None)
    with pytest.raises(ValueError, match="no mean"):
        stats.mean_of_clusters([(0.0, 0)])


cell = st.integers(0, 12)


@given(cell, cell, cell, cell)
def test_fishers_p_is_twice_the_smaller_tail_of_all_tables_with_these_margins(a, b, c, d):
    row, column, total = a + b, a + c, a + b + c + d
    ways = {
        x: math.comb(row, x) * math.comb(total - row, column - x)
        for x in range(max(0, column - c - d), min(row, column) + 1)
    }
    tails = [sum(w for x, w in ways.items() if side * x >= side * a) for side in (-1, 1)]
    exact = min(1.0, float(Fraction(2 * min(tails), sum(ways.values()))))
    assert stats.fisher(a, b, c, d) == pytest.approx(exact, rel=1e-9)
    assert stats.fisher(c, d, a, b) == pytest.approx(exact, rel=1e-9)


def test_fishers_p_holds_for_tables_of_a_million():
    assert stats.fisher(50_000, 450_000, 50_000, 450_000) == 1
    assert stats.fisher(60_000, 440_000, 40_000, 460_000) < 1e-300
    assert 0.01 < stats.fisher(50_200, 449_800, 49_700, 450_300) < 0.2


@given(cell, cell, cell, cell)
def test_log_odds_turn_round_with_the_rows_and_with_the_columns(a, b, c, d):
    estimate, (low, high) = stats.log_odds(a, b, c, d)
    assert low < estimate < high
    for turned in (stats.log_odds(c, d, a, b), stats.log_odds(b, a, d, c)):
        assert (-turned[0], -turned[1][1], -turned[1][0]) == pytest.approx((estimate, low, high))


@pytest.mark.parametrize(("first", "second", "least"), [(0.5, 0.5, 0.94), (0.9, 0.2, 0.94), (0.97, 0.6, 0.91)])
def test_the_log_odds_interval_covers_in_simulation(first, second, least):
    """Of 40 and 300 trials; in the last case a cell is expected to hold 1.2."""
    generator = np.random.default_rng(2)
    true = math.log(first * (1 - second) / (second * (1 - first)))
    a, c = generator.binomial(40, first, 2000), generator.binomial(300, second, 2000)
    intervals = [stats.log_odds(int(x), int(40 - x), int(y), int(300 - y))[1] for x, y in zip(a, c, strict=True)]
    assert least <= np.mean([low <= true <= high for low, high in intervals]) <= 0.99


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.5))
def test_benjamini_and_hochberg_reject_what_their_procedure_rejects(p, alpha):
    """Definition: the k smallest, k being the greatest rank whose p-value is at most α k / m."""
    ranked = sorted(p)
    k = max((rank for rank, value in enumerate(ranked, 1) if value * len(p) / rank <= alpha), default=0)
    threshold = ranked[k - 1] if k else -1.0
    assert [q <= alpha for q in stats.benjamini_hochberg(p)] == [value <= threshold for value in p]


@given(st.integers(1, 200), st.integers(1, 200), st.data())
def test_balanced_accuracy_is_the_mean_of_two_rates_within_its_interval_whichever_class_is_first(n, m, data):
    k, j = data.draw(st.integers(0, 2 * n)) / 2, data.draw(st.integers(0, 2 * m)) / 2
    value, (low, high) = stats.balanced_accuracy((k, n), (j, m))
    assert value == pytest.approx((k / n + j / m) / 2)
    assert -1e-9 <= low <= value <= high <= 1 + 1e-9
    turned, interval = stats.balanced_accuracy((j, m), (k, n))
    assert (turned, *interval) == pytest.approx((value, low, high))


@pytest.mark.parametrize(("first", "second", "n", "m"), [(0.5, 0.5, 40, 400), (0.9, 0.7, 60, 60), (0.98, 0.9, 50, 500)])
def test_the_interval_of_balanced_accuracy_covers_in_simulation(first, second, n, m):
    generator = np.random.default_rng(3)
    right, left = generator.binomial(n, first, 2000), generator.binomial(m, second, 2000)
    intervals = [stats.balanced_accuracy((int(k), n), (int(j), m))[1] for k, j in zip(right, left, strict=True)]
    assert 0.93 <= np.mean([low <= (first + second) / 2 <= high for low, high in intervals]) <= 0.985


def test_balanced_accuracy_needs_both_classes():
    with pytest.raises(ValueError, match="both classes"):
        stats.balanced_accuracy((0, 0), (1, 2))


# ------------------------------------------------------------------------- rates corrected for a classifier's errors

SHARES = st.floats(0, 1)
COUNTS = st.integers(1, 400)


def apparent_of(true, recall, specificity):
    return true * recall + (1 - true) * (1 - specificity)


@given(SHARES, st.floats(0.5, 1), st.floats(0.51, 1))
def test_a_corrected_rate_undoes_the_classifiers_errors(true, recall, specificity):
    """Rogan and Gladen's equation, solved for the true rate: the oracle is the rate that the errors make of it."""
    apparent = apparent_of(true, recall, specificity)
    estimate = stats.rogan_gladen((apparent, 10**7), (recall, 10**7), (specificity, 10**7))
    assert estimate is not None
    rate, (low, high) = estimate
    assert rate == pytest.approx(true, abs=1e-6)
    assert 0 <= low <= rate <= high <= 1


@given(SHARES, COUNTS, COUNTS, COUNTS)
def test_a_perfect_classifiers_rate_is_left_as_it_is(rate, n, positives, negatives):
    estimate = stats.rogan_gladen((rate, n), (1.0, positives), (1.0, negatives))
    assert estimate is not None
    assert estimate[0] == pytest.approx(rate)


@given(SHARES, st.floats(0, 1), COUNTS, COUNTS, COUNTS)
def test_no_better_than_chance_is_no_estimate(rate, recall, n, positives, negatives):
    assert stats.rogan_gladen((rate, n), (recall, positives), (1 - recall, negatives)) is None


@given(SHARES, SHARES, SHARES, COUNTS, COUNTS, COUNTS)
def test_a_corrected_rate_and_its_interval_are_rates(rate, recall, specificity, n, positives, negatives):
    estimate = stats.rogan_gladen((rate, n), (recall, positives), (specificity, negatives))
    if estimate is not None:
        assert recall + specificity > 1
        assert 0 <= estimate[1][0] <= estimate[0] <= estimate[1][1] <= 1


def test_no_labels_of_a_kind_is_no_correction():
    with pytest.raises(ValueError, match="labels of both kinds"):
        stats.rogan_gladen((0.5, 10), (1.0, 0), (1.0, 5))


def test_the_interval_is_lang_and_reiczigels():
    """Their formula, as R's asht::prevSeSp 1.0.3 has it."""
    ap, n, se, n_se, sp, n_sp, z = 0.3, 442, 0.9, 30, 0.85, 70, stats.Z95
    ap2, se2, sp2 = (ap * n + z**2 / 2) / (n + z**2), (se * n_se + 1) / (n_se + 2), (sp * n_sp + 1) / (n_sp + 2)
    prev = (ap2 + sp2 - 1) / (se2 + sp2 - 1)
    shift = 2 * z**2 * (prev * se2 * (1 - se2) / (n_se + 2) - (1 - prev) * sp2 * (1 - sp2) / (n_sp + 2))
    parts = (ap2 * (1 - ap2) / (n + z**2), prev**2 * se2 * (1 - se2) / (n_se + 2),
             (1 - prev) ** 2 * sp2 * (1 - sp2) / (n_sp + 2))  # fmt: skip
    half = z * math.sqrt(sum(parts)) / (se2 + sp2 - 1)
    estimate = stats.rogan_gladen((ap, n), (se, n_se), (sp, n_sp))
    assert estimate is not None
    assert estimate[0] == pytest.approx(0.2)
    assert estimate[1] == pytest.approx((prev + shift - half, prev + shift + half))


@pytest.mark.parametrize(("true", "recall", "specificity", "labels"), [(0.3, 0.9, 0.9, 100), (0.06, 0.8, 0.97, 200)])
def test_the_interval_covers_the_true_rate(true, recall, specificity, labels):
    draw = random.Random(7)
    covered = trials = 0
    for _ in range(600):
        k = sum(draw.random() < apparent_of(true, recall, specificity) for _ in range(300))
        positives = sum(draw.random() < true for _ in range(labels))
        if not 0 < positives < labels:
            continue
        right = [sum(draw.random() < p for _ in range(n)) / n
                 for p, n in ((recall, positives), (specificity, labels - positives))]  # fmt: skip
        estimate = stats.rogan_gladen((k / 300, 300), (right[0], positives), (right[1], labels - positives))
        if estimate is not None:
            trials += 1
            covered += estimate[1][0] <= true <= estimate[1][1]
    assert trials > 550
    assert covered / trials > 0.93
