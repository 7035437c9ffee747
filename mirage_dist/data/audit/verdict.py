"""The verdict on a corpus, in words, and the warning before a training run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from mirage_dist.data.audit.corpus import FIRST, LIMIT, Corpus, CueResult, Measured, Options, Value
from mirage_dist.data.refusals import is_refusal
from mirage_dist.data.sample import Sample


class Verdict(TypedDict):
    """passed: whether the first words predict refusals no better than LIMIT. text: one line that says why."""

    passed: bool
    text: str


def verdict(measured: Measured) -> Verdict:
    """A corpus fails by how well its first words predict refusals, not by whether they predict at all.

    Other cues are named when they predict better, but decide nothing: the words after the first approach the question's
    content.
    """
    cues = measured["cues"]
    if not cues:
        kind = "refusal" if not measured["refused"] else "answer"
        text = f"passes: no {kind} among {measured['pairs']} responses, so no word can separate refusals from answers"
        return {"passed": True, "text": text}
    first, strongest = cues[FIRST], max(cues, key=lambda name: _lower_end(cues[name]))
    passed = _lower_end(first) <= LIMIT
    text = f"{'passes' if passed else 'FAILS'}: {_separates(FIRST, first)}"
    word = _strongest(first)
    text += f"; {_shares(word)}" if word else "; no word is tied to either"
    if _lower_end(cues[strongest]) > first["balanced_accuracy"]["value"]:
        text += f"; {strongest} separates them better: {_accuracy(cues[strongest])}"
    return {"passed": passed, "text": text}


def warning(samples: Iterable[Sample]) -> str | None:
    """One line on samples from which a model would learn a first word in place of what to refuse; None if they pass."""
    corpus = Corpus(Options())
    for sample in samples:
        corpus.add_sample(sample, None, is_refusal)
    measured = corpus.measured()
    if verdict(measured)["passed"]:
        return None
    cue = measured["cues"][FIRST]
    word = _strongest(cue)
    shares = f"{_shares(word)}; " if word else ""
    return (
        f"{shares}{_separates(FIRST, cue)}. The model may learn the word in place of what is to be refused: "
        "rebalance first words with prepare.diversify; `mirage audit` shows every word"
    )


def _lower_end(cue: CueResult) -> float:
    return cue["balanced_accuracy"]["ci95"][0]


def _separates(name: str, cue: CueResult) -> str:
    return f"the {name} alone separates refusals from answers with {_accuracy(cue)}"


def _accuracy(cue: CueResult) -> str:
    value, (low, high) = cue["balanced_accuracy"]["value"], cue["balanced_accuracy"]["ci95"]
    return f"balanced accuracy {100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (chance: 50 %)"


def _strongest(cue: CueResult) -> Value | None:
    return next((value for value in cue["values"] if value["tied"] and value["value"]), None)


def _shares(word: Value) -> str:
    total, rest = word["refused"] + word["answered"], word["rest_refusal_share"]
    share = f'{100 * word["refusal_share"]:.0f} % of the {total} questions that open with "{word["value"]}" are refused'
    return share if rest is None else f"{share}, {100 * rest:.0f} % of the others"
