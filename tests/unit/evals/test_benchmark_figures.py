"""POPE's, MME's and GQA's rules: how an answer is read, and what they publish beside accuracy, against other ways."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist.data.formats.yes_no import TASKS
from mirage_dist.evals.judges import figures, scoring
from mirage_dist.evals.judges.figures import Answered

# What the published scripts make of an answer, their quirks included.
POPE = {
    "No": "no",
    "no, there is none.": "no",
    "Yes, there is no doubt.": "no",
    "Yes. There is no dog.": "yes",
    "There is not a dog": "no",
    "Not that I see": "yes",
    "NO": "yes",
    "No,": "no",
    "None": "yes",
    "": "yes",
    " No\n": "no",
}
MME = {
    "Yes": "yes",
    "YES, it is.": "yes",
    "no": "no",
    "None": "no",
    "I do not": None,
    "I know": None,
    "a no": "no",
    "It is. Yes": None,
    "Oh yes": None,
    "": None,
    "\nYes": "yes",
}
GQA = {"Yes.": "yes", "Light Blue": "light blue", "U.S.A.": "u.s.a", " a man \n": "a man", "yes...": "yes"}


@pytest.mark.parametrize(
    ("read", "cases"), [(scoring.pope, POPE), (scoring.mme, MME), (scoring.gqa, GQA)], ids=["pope", "mme", "gqa"]
)
def test_answers_are_read_as_the_published_scripts_read_them(read, cases):
    assert {response: read(response) for response in cases} == cases


def by_counts(answers: Sequence[Answered]) -> dict[str, float]:
    """POPE's own computation from the four counts."""
    pairs = [(answer.chosen == "yes", answer.expected == "yes") for answer in answers]
    tp, fp, tn, fn = (pairs.count(kind) for kind in ((True, True), (True, False), (False, False), (False, True)))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes": (tp + fp) / len(pairs),
    }


words = st.sampled_from(["yes", "no"])
answered = st.lists(st.tuples(st.sampled_from(["adversarial", "popular", "random"]), words, words), max_size=40)


@given(answered)
def test_popes_figures_are_those_of_its_four_counts(rows):
    # One right and one wrong yes in each category, so that nothing is divided by 0.
    sure = [(name, "yes", "yes") for name in ("adversarial", "popular", "random")]
    answers = [Answered(str(i), *row) for i, row in enumerate([*rows, *sure])]
    scores = figures.pope(answers)
    expected = {}
    for category in ("adversarial", "popular", "random"):
        expected[category] = by_counts([answer for answer in answers if answer.category == category])
    for category, own in expected.items():
        got = {name: value["rate"] if isinstance(value, dict) else value for name, value in scores[category].items()}
        assert got == pytest.approx(own, abs=1e-12)
    assert scores["mean"]["f1"] == pytest.approx(sum(own["f1"] for own in expected.values()) / 3, abs=1e-12)


def test_a_model_that_never_says_yes_has_no_precision():
    answers = [Answered(str(i), "random", expected, "no") for i, expected in enumerate(["yes", "no"])]
    scores = figures.pope(answers)
    assert scores["random"]["precision"] is None
    assert (scores["random"]["f1"], scores["mean"]["f1"]) == (0.0, 0.0)
    assert figures.pope([Answered("0", "random", "no", "no")])["mean"] == {"f1": None}


def pictured(task: str, kind: str, pairs: Sequence[tuple[str | None, str | None]]) -> list[Answered]:
    """Answers to the questions to answer with yes and with no, picture by picture."""
    return [
        Answered(f"{task}/{i}.png/{expected}", f"{kind}/{task}", expected, chosen)
        for i, pair in enumerate(pairs)
        for expected, chosen in zip(("yes", "no"), pair, strict=True)
    ]


choices = st.sampled_from(["yes", "no", None])
every_task = st.fixed_dictionaries(
    {task: st.lists(st.tuples(choices, choices), min_size=1, max_size=6) for tasks in TASKS.values() for task in tasks}
)


@given(every_task)
def test_mmes_scores_are_accuracy_and_accuracy_of_both_questions_in_percent(pairs):
    """As calculation.py computes them, two lines of a task's file after the other."""
    answers, expected = [], dict.fromkeys(TASKS, 0.0)
    for kind, tasks in TASKS.items():
        for task in tasks:
            answers += pictured(task, kind, pairs[task])
            right = [(yes == "yes", no == "no") for yes, no in pairs[task]]
            accuracy = sum(map(sum, right)) / (2 * len(right))
            expected[task] = 100 * accuracy + 100 * sum(map(all, right)) / len(right)
            expected[kind] += expected[task]
    scores = figures.mme(answers)
    assert {name: own["score"] for name, own in scores.items()} == pytest.approx(expected, abs=1e-9)


def test_a_sum_over_tasks_is_given_only_where_every_task_was_asked():
    answers = [row for task in TASKS["cognition"] for row in pictured(task, "cognition", [("yes", "no")])]
    scores = figures.mme(answers)
    assert (scores["cognition"], scores["perception"]) == ({"score": 800.0}, {"score": None})
    assert figures.mme(answers[2:])["cognition"] == {"score": None}


def test_a_picture_with_one_question_is_in_accuracy_alone():
    """As a limit may leave it."""
    answers = pictured("count", "perception", [("yes", "no"), ("no", "no")])[:-1]
    own = figures.mme(answers)["count"]
    assert (own["accuracy"]["k"], own["accuracy"]["n"]) == (2, 3)
    assert (own["accuracy_plus"]["k"], own["accuracy_plus"]["n"]) == (1, 1)
