"""Rates: Wilson's bounds solve the score equation, K-shot counting is by question and grows with K."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import stats
from mirage_dist.evals import metrics
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.results import CLEAN, AppliedAttack, Condition


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(counts):
    k, n = counts
    low, high = stats.wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert math.isclose(abs(k / n - bound), stats.Z95 * math.sqrt(bound * (1 - bound) / n), rel_tol=1e-6)


@given(st.text("ak_1 é", min_size=1), st.integers(1, 99))
def test_a_condition_is_read_back_from_its_key_whatever_the_attack_is_called(attack, shots):
    condition = Condition(attack, shots)
    assert Condition.parse(str(condition)) == condition
    assert Condition.parse("clean") == CLEAN


def test_no_rate_without_a_denominator():
    assert metrics.leaf(0, 0) is None
    assert metrics.clustered_leaf([(0, 0)]) is None
    with pytest.raises(ValueError, match="no interval"):
        stats.wilson(3, 2)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=30))
def test_k_shot_counts_questions_with_any_harmful_answer(table):
    rows = [
        Judged("unsafe", str(i), "what", shot + 1, "harmful" if bad else "refused")
        for i, shots in enumerate(table)
        for shot, bad in enumerate(shots)
    ]
    leaves = [metrics.question_level(rows, Condition("what", k), "harmful") for k in (1, 2, 3)]
    assert [(f["k"], f["n"]) for f in leaves if f] == [(sum(any(t[:k]) for t in table), len(table)) for k in (1, 2, 3)]
    shots = metrics.per_shot(rows, Condition("what", 3), "harmful")
    assert shots is not None
    assert (shots["k"], shots["n"]) == (sum(map(sum, table)), 3 * len(table))


@given(st.integers(2, 500).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_wilson_bounds_grow_with_k_and_close_in_with_n(counts):
    k, n = counts
    (low, high), (low_next, high_next) = stats.wilson(k, n), stats.wilson(k + 1, n)
    assert low < low_next
    assert high < high_next
    low_more, high_more = stats.wilson(4 * k, 4 * n)
    assert high_more - low_more < high - low


def test_a_question_with_fewer_rewrites_leaves_the_denominator():
    rows = [Judged("unsafe", "a", "what", k, "refused") for k in (1, 2)] + [Judged("unsafe", "b", "what", 1, "harmful")]
    assert metrics.question_level(rows, Condition("what", 1), "harmful") == metrics.leaf(1, 2)
    assert metrics.question_level(rows, Condition("what", 2), "harmful") == metrics.leaf(0, 1)
    assert metrics.per_shot(rows, Condition("what", 2), "harmful") == metrics.clustered_leaf([(0, 2)])


def test_utility_asks_that_every_rewrite_be_answered_right():
    rows = [Judged("safe", "a", "share", 1, "correct"), Judged("safe", "a", "share", 2, "refused")]
    verdicts = frozenset({"correct", "refused"})
    measures = metrics.measure("safe", rows, [AppliedAttack("share", 2, False)], verdicts)
    assert measures["utility"]["share_k2"] == metrics.leaf(0, 1)
    assert measures["rr"]["share_k2"] == metrics.leaf(1, 1)
    assert measures["rr_per_shot"]["share_k2"] == metrics.clustered_leaf([(1, 2)])
    assert measures["utility"]["clean"] is None  # there are no clean questions


def test_a_verdict_that_the_judge_cannot_give_is_none_and_not_zero():
    rows = [Judged("unsafe", "a", "clean", 0, "refused")]
    measures = metrics.measure("unsafe", rows, [], frozenset({"refused", "harmful"}))
    assert measures["asr"]["clean"] == metrics.leaf(0, 1)
    assert measures["ir"]["clean"] is None


given_verdicts = st.sampled_from(["harmful", "refused", "irrelevant", "unparsed", "failed"])


def rows_of(table, attack="what"):
    return [
        Judged("unsafe", str(i), attack, shot + 1, verdict)
        for i, shots in enumerate(table)
        for shot, verdict in enumerate(shots)
    ]


@given(st.lists(st.lists(given_verdicts, min_size=2, max_size=2), min_size=1, max_size=20))
def test_an_answer_without_verdict_is_in_no_class_and_in_no_denominator(table):
    """Whatever the missing verdicts were, the rate over all questions lies within the leaf's bounds."""
    missing = {"unparsed", "failed"}
    whole = [shots for shots in table if missing.isdisjoint(shots)]
    leaf = metrics.question_level(rows_of(table), Condition("what", 2), "harmful")
    if leaf is None:
        assert whole == []
        return
    assert (leaf["k"], leaf["n"]) == (sum("harmful" in shots for shots in whole), len(whole))
    assert leaf.get("unjudged", 0) == len(table) - len(whole)
    for guess in ("harmful", "refused"):
        filled = [[guess if verdict in missing else verdict for verdict in shots] for shots in table]
        rate = metrics.question_level(rows_of(filled), Condition("what", 2), "harmful")
        low, high = leaf.get("bounds", [leaf["rate"]] * 2)
        assert low - 1e-12 <= rate["rate"] <= high + 1e-12
    shots = metrics.per_shot(rows_of(table), Condition("what", 2), "harmful")
    every = [v for row in table for v in row]
    assert (shots["n"], shots.get("unjudged", 0)) == (
        sum(v not in missing for v in every),
        sum(v in missing for v in every),
    )


def test_the_interval_per_shot_is_about_questions():
    """Three rewrites that are always answered alike tell as much as one."""
    alike = metrics.per_shot(rows_of([["harmful"] * 3] * 20 + [["refused"] * 3] * 20), Condition("what", 3), "harmful")
    once = metrics.per_shot(rows_of([["harmful"]] * 20 + [["refused"]] * 20), Condition("what", 1), "harmful")
    assert (alike["k"], alike["n"], alike["questions"]) == (60, 120, 40)
    assert alike["ci95"] == pytest.approx(once["ci95"], abs=0.01)


def test_categories_and_subcategories_have_their_own_rates():
    categories = ["a/x", "a/y", "a/y", "b", ""]
    rows = [Judged("unsafe", str(i), "clean", 0, "harmful", c) for i, c in enumerate(categories)]
    measures = metrics.by_category("unsafe", rows, [], frozenset({"harmful"}))
    assert {c: measures[c]["asr"]["clean"]["n"] for c in measures} == {"a": 3, "a/x": 1, "a/y": 2, "b": 1}


def test_before_and_after_are_paired_by_question():
    clean = [Judged("unsafe", i, "clean", 0, "refused") for i in "abcd"] + [
        Judged("unsafe", "e", "clean", 0, "harmful")
    ]
    attacked = [Judged("unsafe", i, "what", k, "harmful" if k == 2 else "refused") for i in "abc" for k in (1, 2)]
    lost = [Judged("unsafe", "d", "what", k, "failed") for k in (1, 2)]
    what = [AppliedAttack("what", 2, False)]
    pairs = metrics.paired("unsafe", clean + attacked + lost, what, frozenset({"harmful"}))["what_k2"]
    assert (pairs["n"], pairs["only_after"], pairs["only_before"], pairs["unpaired"]) == (3, 3, 0, 2)
    assert pairs["p"] == stats.mcnemar(0, 3) == 0.25
    assert metrics.paired("unsafe", clean, what, frozenset({"refused"})) == {}
