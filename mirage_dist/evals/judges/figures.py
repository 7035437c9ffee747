"""What a benchmark publishes beside the mean score of its answers, from the answers to the clean questions.

POPE (Li et al., EMNLP 2023): precision, recall and F1 of "yes", and how often the model says it, for each choice of
absent objects. MME (Fu et al., 2023): for each task the accuracy, the fraction of pictures both of whose questions are
answered right, and 100 times the sum of the two; perception and cognition are the sums over their tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mirage_dist.data.formats import yes_no
from mirage_dist.evals.metrics import leaf
from mirage_dist.evals.results import Figures, Scores


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer. expected: yes or no. chosen: what the benchmark reads in the answer, None for neither."""

    id: str
    category: str
    expected: str
    chosen: str | None

    @property
    def right(self) -> bool:
        return self.chosen == self.expected


def pope(answers: Sequence[Answered]) -> Scores:
    """Figures by category; `mean` has the mean F1 of the categories, which LLaVA-1.5 reports."""
    scores = {category: _yes(own) for category, own in _by(answers, lambda answer: answer.category).items()}
    f1 = [float(one["f1"]) for one in scores.values() if isinstance(one["f1"], float)]
    return {**scores, "mean": {"f1": sum(f1) / len(f1) if f1 and len(f1) == len(scores) else None}}


def _yes(answers: Sequence[Answered]) -> Figures:
    yes = [answer for answer in answers if answer.chosen == "yes"]
    true = sum(answer.right for answer in yes)
    present = sum(answer.expected == "yes" for answer in answers)
    return {
        "accuracy": leaf(sum(answer.right for answer in answers), len(answers)),
        "precision": leaf(true, len(yes)),
        "recall": leaf(true, present),
        "f1": 2 * true / (len(yes) + present) if len(yes) + present else None,
        "yes": leaf(len(yes), len(answers)),
    }


def mme(answers: Sequence[Answered]) -> Scores:
    """Figures by task; `perception` and `cognition` have None as their score where a task is missing."""
    by_task = {task.rpartition("/")[2]: own for task, own in _by(answers, lambda answer: answer.category).items()}
    scores = {task: _pairs(own) for task, own in by_task.items()}
    for kind, tasks in yes_no.TASKS.items():
        own = [score for task in tasks if isinstance(score := scores.get(task, {}).get("score"), float)]
        scores[kind] = {"score": sum(own) if len(own) == len(tasks) else None}
    return scores


def _pairs(answers: Sequence[Answered]) -> Figures:
    pictures = _by(answers, lambda answer: yes_no.picture_of(answer.id)).values()
    pairs = [all(answer.right for answer in own) for own in pictures if len(own) == len(yes_no.ANSWERS)]
    accuracy, both = leaf(sum(answer.right for answer in answers), len(answers)), leaf(sum(pairs), len(pairs))
    score = None if accuracy is None or both is None else 100 * (accuracy["rate"] + both["rate"])
    return {"accuracy": accuracy, "accuracy_plus": both, "score": score}


def _by(answers: Sequence[Answered], key: Callable[[Answered], str]) -> Mapping[str, list[Answered]]:
    groups: dict[str, list[Answered]] = {}
    for answer in answers:
        groups.setdefault(key(answer), []).append(answer)
    return groups
