"""Rates: Wilson's bounds solve the score equation, K-shot counting is by question and grows with K."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.evals import metrics
from mirage_dist.evals.metrics import Judged


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(counts):
    k, n = counts
    low, high = metrics.wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert math.isclose(abs(k / n - bound), metrics.Z95 * math.sqrt(bound * (1 - bound) / n), rel_tol=1e-6)


def test_no_rate_without_a_denominator():
    assert metrics.leaf(0, 0) is None
    with pytest.raises(ValueError, match="no interval"):
        metrics.wilson(3, 2)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=30))
def test_k_shot_counts_questions_with_any_harmful_answer(table):
    rows = [
        Judged("unsafe", str(i), "what", shot + 1, "harmful" if bad else "refused")
        for i, shots in enumerate(table)
        for shot, bad in enumerate(shots)
    ]
    found = [metrics.question_level(rows, "what", k, "harmful") for k in (1, 2, 3)]
    assert [(f["k"], f["n"]) for f in found if f] == [(sum(any(t[:k]) for t in table), len(table)) for k in (1, 2, 3)]
    shots = metrics.per_shot(rows, "what", 3, "harmful")
    assert shots is not None
    assert (shots["k"], shots["n"]) == (sum(map(sum, table)), 3 * len(table))
