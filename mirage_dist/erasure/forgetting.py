"""Measures of forgetting that need an answer's token log-probabilities alone, or its text: pure functions.

Each says of one answer how much of what was to be forgotten a model still has; `erasure.measure` computes them over the
forget set, with intervals. The definitions are those of TOFU (Maini et al., 2024,
arXiv:2401.06121) and open-unlearning (src/evals/metrics at d3d7cf9); where one departs from its code it says so.

Shapes: a sequence has one number for each token of the answer, its end token included.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

import regex

from mirage_dist.data.scripts import UNSPACED

# Runs of letters, digits, marks and joiners; of a script without spaces between words, one letter with its marks.
_WORD = regex.compile(rf"{UNSPACED}\p{{M}}*|(?:(?!{UNSPACED})[\p{{L}}\p{{N}}\p{{M}}_\u200c\u200d])+", regex.VERSION1)


def words(text: str) -> list[str]:
    """The text's words without case, in NFC; of a script without spaces between words its letters."""
    return [word for word in _WORD.findall(unicodedata.normalize("NFC", text.casefold())) if word.strip("\u200c\u200d")]


def key(text: str) -> str:
    """What a text is compared by: its words, so that case and punctuation do not count; of one without words itself."""
    return " ".join(words(text) or text.split())


def probability(logps: Sequence[float]) -> float:
    """P(y|x)^(1/n), the geometric mean of the tokens' probabilities (TOFU). 1: known by heart.

    Raises ValueError for an answer without tokens, as every function here.
    """
    return math.exp(-loss(logps))


def loss(logps: Sequence[float]) -> float:
    """−mean log p, the score of the loss attack on membership (Yeom et al., 2018): low for what was trained on."""
    if not len(logps):
        raise ValueError("an answer without tokens has no likelihood")
    return -math.fsum(logps) / len(logps)


def min_k(logps: Sequence[float], share: float = 0.2) -> float:
    """−mean log p over the least likely tokens, a share of all and at least one (Min-K% Prob, Shi et al., 2024).

    As a score of membership: low for what was trained on. Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected above 0, at most 1")
    return loss(sorted(logps)[: max(1, int(len(logps) * share))])


def extraction_strength(greedy: Sequence[bool]) -> float:
    """1 − k/n, with k the least number of the answer's first tokens after which the model continues by itself.

    greedy: whether each token is the most likely one after the true tokens before it. 1: the question alone brings the
    whole answer; 0: not even its last token. (Wang et al., 2025, arXiv:2502.19301; open-unlearning's code gives 1/n
    where this is 0, because its search ends at the last token whether that fits or not.)
    """
    if not len(greedy):
        raise ValueError("an answer without tokens cannot be extracted")
    known = 0
    for right in reversed(greedy):
        if not right:
            break
        known += 1
    return known / len(greedy)


def log_truth_ratio(true: Sequence[float], false: Sequence[Sequence[float]]) -> float:
    """log of P(false)/P(true) of `probability`: the geometric mean over wrong answers, against the right one's.

    Near 0 where right and wrong answers are equally likely, below 0 where the right one is likelier. (TOFU's truth
    ratio, of the right answer's paraphrase; the paper has the arithmetic mean over wrong answers, its code and
    open-unlearning's the geometric one, which this is.) Raises ValueError without a wrong answer.
    """
    if not false:
        raise ValueError("a truth ratio needs a wrong answer")
    return loss(true) - math.fsum(map(loss, false)) / len(false)


def closeness(log_ratio: float) -> float:
    """min(R, 1/R): a truth ratio R as a measure of forgetting, 1 where right and wrong answers are equally likely."""
    return math.exp(-abs(log_ratio))


def rouge_l(answer: str, forgotten: str) -> float:
    """ROUGE-L recall: the share of the forgotten answer's words in its longest common subsequence with the answer.

    (Lin, 2004; TOFU's measure.) Words are those of `words`, of any script; the package rouge_score keeps a to z and 0
    to 9 alone and, in TOFU, stems. Raises ValueError for a text without words.
    """
    mine, theirs = words(answer), words(forgotten)
    if not theirs:
        raise ValueError("the forgotten answer has no words")
    row = [0] * (len(theirs) + 1)  # lengths for the answer's words so far and each beginning of the forgotten ones
    for word in mine:
        diagonal = 0
        for place, other in enumerate(theirs, 1):
            diagonal, row[place] = row[place], diagonal + 1 if word == other else max(row[place], row[place - 1])
    return row[-1] / len(theirs)
