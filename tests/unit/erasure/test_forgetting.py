"""Measures of forgetting against their definitions written out, and what must hold of them."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.erasure.forgetting import (
    closeness,
    extraction_strength,
    key,
    log_truth_ratio,
    loss,
    min_k,
    probability,
    rouge_l,
)

LOGPS = st.lists(st.floats(-30, 0), min_size=1, max_size=12)
WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(LOGPS)
def test_probability_is_the_products_root_and_loss_its_logarithm(logps):
    assert probability(logps) == pytest.approx(math.prod(map(math.exp, logps)) ** (1 / len(logps)), rel=1e-9)
    assert loss(logps) == pytest.approx(-math.log(probability(logps)), abs=1e-9)


@given(LOGPS, st.floats(0.01, 1))
def test_min_k_is_the_mean_of_the_lowest_and_falls_to_the_loss(logps, share):
    """open-unlearning's MinKProbAttack: −mean of the first max(1, int(n · k)) of the sorted values."""
    chosen = np.sort(np.array(logps))[: max(1, int(len(logps) * share))]
    assert min_k(logps, share) == pytest.approx(-chosen.mean(), abs=1e-9)
    assert min_k(logps, share) >= loss(logps) - 1e-9
    assert min_k(logps, 1.0) == pytest.approx(loss(logps), abs=1e-9)


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_extraction_strength_is_the_longest_suffix_that_follows_by_itself(greedy):
    least = min(k for k in range(len(greedy) + 1) if all(greedy[k:]))
    assert extraction_strength(greedy) == pytest.approx(1 - least / len(greedy))


def test_an_answer_whose_last_token_is_wrong_cannot_be_extracted_at_all():
    """open-unlearning's loop leaves k at n − 1 there, and its score at 1/n."""
    assert extraction_strength([True, True, True, False]) == 0.0
    assert extraction_strength([True] * 4) == 1.0


@given(LOGPS, st.lists(LOGPS, min_size=1, max_size=4))
def test_a_truth_ratio_is_the_quotient_of_geometric_means(true, false):
    """open-unlearning: exp(−mean of the wrong answers' average losses) / exp(−the right one's)."""
    expected = math.exp(-np.mean([loss(answer) for answer in false])) / probability(true)
    truth = log_truth_ratio(true, false)
    assert math.exp(truth) == pytest.approx(expected, rel=1e-9)
    assert log_truth_ratio(true, [true]) == pytest.approx(0.0, abs=1e-12)
    assert closeness(truth) == pytest.approx(min(expected, 1 / expected), rel=1e-9)


@given(WORDS, WORDS.filter(bool))
def test_rouge_l_is_the_longest_common_subsequence_by_trying_all(answer, forgotten):
    def subsequences(words):
        return {c for size in range(len(words) + 1) for c in combinations(words, size)}

    longest = max(len(c) for c in subsequences(answer) & subsequences(forgotten))
    assert rouge_l(" ".join(answer), ", ".join(forgotten).upper()) == pytest.approx(longest / len(forgotten))


@pytest.mark.parametrize(
    ("answer", "forgotten", "share"),
    [
        ("写真は京都です", "写真は東京です", 6 / 7),  # a letter, as such scripts have no spaces between words
        ("ดี", "ดีมาก", 1 / 4),  # of Thai, a letter with its vowel sign
        ("मेरा घर", "मेरी घर", 1 / 2),  # vowel signs belong to their word: not three of four pieces
        ("the cafe\u0301", "the caf\u00e9", 1.0),
        ("x 2", "x_1 2", 1 / 2),
    ],
)
def test_rouge_l_counts_the_words_of_any_script(answer, forgotten, share):
    assert rouge_l(answer, forgotten) == pytest.approx(share)


def test_texts_are_compared_by_their_words_and_without_any_by_themselves():
    assert key("Yes.") == key(" yes !") != key("no")
    assert key("…") != key("?") == key(" ? ")
    assert key("a b") != key("ab")


@pytest.mark.parametrize(
    "call",
    [
        lambda: probability([]),
        lambda: min_k([-1.0], 0.0),
        lambda: min_k([-1.0], 1.5),
        lambda: extraction_strength([]),
        lambda: log_truth_ratio([-1.0], []),
        lambda: rouge_l("a word", "…"),
    ],
)
def test_what_has_no_value_is_an_error(call):
    with pytest.raises(ValueError, match=r"\w"):
        call()
