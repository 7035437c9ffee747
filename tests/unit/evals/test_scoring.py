"""Benchmarks' scores against their published definitions; their mean and its interval."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import config as configs
from mirage_dist import stats
from mirage_dist.evals import judges, metrics
from mirage_dist.evals.judges import scoring
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.results import AppliedAttack
from mirage_dist.schema import ConfigError, EvalRecipe

# What the published code makes of an answer: its own quirks included.
NORMAL = {
    "The Red, Car.": "red car",
    "two dogs": "2 dogs",
    "None": "0",
    "an apple": "apple",
    "dont know": "don't know",
    "couldntve": "couldntve",  # two apostrophes are missing; only one is ever put back
    "couldn'tve": "couldn't've",
    "100,978": "100978",
    "3.5 m": "3.5 m",
    "U.S.A.": "usa",
    "2:50 pm": "2:50 pm",
    "hot-dog": "hot dog",
    "hot - dog": "hot dog",
    "black/white": "black white",
    "red,blue": "redblue",
    "girl's bag": "girl 's bag",
    "thats": "that's",
    "what?\n": "what",
    "yes!": "yes",
    "Unanswerable": "unanswerable",
    "the": "",
}


@pytest.mark.parametrize("answer", NORMAL)
def test_answers_are_normalised_as_published(answer):
    assert scoring.normalised(answer) == NORMAL[answer]


words = st.sampled_from(["cat", "the cat", "Cat.", "dog", "2", "two", "dont", "don't", ""])


@given(words, st.lists(words, min_size=10, max_size=10))
def test_vqa_accuracy_is_the_mean_over_all_sets_of_nine_annotators(response, references):
    answer, others = scoring.normalised(response), [scoring.normalised(r) for r in references]
    nine = [min(subset.count(answer) / 3, 1) for subset in itertools.combinations(others, 9)]
    assert scoring.vqa_accuracy(response, references) == pytest.approx(sum(nine) / 10, abs=1e-12)


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_by_the_number_of_annotators_who_agree(matches, score):
    references = ["cat"] * matches + ["dog"] * (10 - matches)
    assert scoring.vqa_accuracy("The cat.", references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        (" B\n", None),  # the newline has become ". " before it is compared
        ("B. wood", "B"),
        ("B\nwood", "B"),
        ("B) wood", None),
        ("b", None),
        ("The answer is C.", "C"),
        ("Wood floats. The answer is C", "C"),
        ("The answer is A or rather: The answer is D.", "D"),
        ("The answer is wood.", None),
        ("F", None),
        ("", None),
    ],
)
def test_an_option_is_read_as_llavas_script_reads_it(response, letter):
    assert scoring.option(response) == letter


# ------------------------------------------------------------------------------------------ mean and interval


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_scores_of_right_and_wrong_have_wilsons_interval(right):
    assert stats.scored([(float(r), 1) for r in right]) == stats.wilson(sum(right), len(right))


@given(st.lists(st.sampled_from([0, 0.3, 0.6, 0.9, 1]), min_size=1, max_size=60))
def test_the_interval_of_a_mean_score_holds_it_and_stays_within_0_and_1(scores):
    low, high = stats.scored([(s, 1) for s in scores])
    assert 0 <= low <= sum(scores) / len(scores) + 1e-12
    assert sum(scores) / len(scores) - 1e-12 <= high <= 1


@pytest.mark.parametrize(("cats", "size"), [(0.75, 60), (0.75, 1000), (0.2, 60)])
def test_the_interval_of_a_mean_score_covers_in_simulation(cats, size):
    """Two of three answers that score at all score 1; narrower than a coin's, for scores vary less."""
    generator = np.random.default_rng(0)
    values, chances = [0, 0.3, 0.6, 1], [1 - cats, cats / 6, cats / 6, cats * 2 / 3]
    mean = float(np.dot(values, chances))
    drawn = generator.choice(values, (1000, size), p=chances)
    intervals = [stats.scored([(float(s), 1) for s in row]) for row in drawn]
    assert 0.93 <= np.mean([low <= mean <= high for low, high in intervals]) <= 0.98
    coin = stats.wilson(round(mean * 1000), 1000)
    assert size < 1000 or np.mean([high - low for low, high in intervals]) < coin[1] - coin[0]


def test_rewrites_of_a_question_are_one_cluster_and_a_mean_says_what_its_k_is():
    rows = [Judged("vqa", str(i), "share", k, "scored", "", s) for i, s in enumerate([1, 0.3, 0]) for k in (1, 2)]
    rows += [Judged("vqa", str(i), "clean", 0, "scored", "", s) for i, s in enumerate([1, 0.6, 1])]
    measured = metrics.measure("utility", rows, [AppliedAttack("share", 2, False)], frozenset({"scored"}))
    clean, attacked = measured["accuracy"]["clean"], measured["accuracy"]["share_k2"]
    assert clean == {"rate": 2.6 / 3, "k": 2.6, "n": 3, "ci95": list(stats.scored([(1, 1), (0.6, 1), (1, 1)]))}
    assert (attacked["k"], attacked["n"], attacked["questions"]) == (2.6, 6, 3)
    assert math.isclose(attacked["rate"], 2.6 / 6)
    assert attacked["ci95"] == list(stats.scored([(2, 2), (0.6, 2), (0, 2)]))
    assert measured["rr"]["clean"] is None  # not this judge's to tell


# ------------------------------------------------------------------------------------------------ recipe


def recipe(*overrides):
    return configs.load("configs/eval/vqav2.yaml", overrides, EvalRecipe)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["judges=[keyword]"], r"judges: sets\.vqav2 is of kind utility, which `benchmark` scores; add it"),
        (["sets.vqav2.kind=safe"], "benchmark scores sets of kind utility, and there is none"),
        (
            ["sets.vqav2.sources=[{format: llava, path: a.json}]"],
            r"sets\.vqav2: kind utility takes sources that are scored alike, of vqav2.*; got llava",
        ),
        (
            [
                "sets.vqav2.sources=[{format: vizwiz, path: a.json},{format: scienceqa, path: b.json, annotations: c}]",
            ],
            "scored alike.*got vizwiz, scienceqa",
        ),
    ],
)
def test_a_benchmark_needs_its_judge_and_the_judge_a_benchmark(overrides, words):
    with pytest.raises(ConfigError, match=words):
        judges.panel(recipe(*overrides))
