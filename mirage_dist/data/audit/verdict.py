"""The verdict on a corpus, in words, and the warning before a training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict

from mirage_dist.data.audit.corpus import FIRST, LIMIT, Corpus, CueResult, Measured, Options, Value
from mirage_dist.data.refusals import FEW, PhraseList
from mirage_dist.data.sample import Sample


class Verdict(TypedDict):
    """passed: whether the first words predict refusals no better than LIMIT. text: one line that says why.

    measured: whether enough pairs could be measured to know.
    """

    passed: bool
    measured: bool
    text: str


def verdict(measured: Measured) -> Verdict:
    """A corpus fails by how well its first words predict refusals, not by whether they predict at all.

    It passes only if it would also pass with a right guess for every pair that could not be measured. Other cues are
    named when they predict better, but decide nothing: the words after the first approach the question's content.
    """
    cues, left_out = measured["cues"], _left_out(measured)
    if not cues:
        kind = "refusal" if not measured["refused"] else "answer"
        if sum(measured["unmeasured"]["responses"].values()) > 2 * (LIMIT - 0.5) * measured["pairs"]:
            return {"passed": False, "measured": False, "text": f"NOT MEASURED: {left_out}"}
        text = f"passes: no {kind} among {measured['pairs']} responses, so no word can separate refusals from answers"
        return {"passed": True, "measured": True, "text": text}
    first, strongest = cues[FIRST], max(cues, key=lambda name: _lower_end(cues[name]))
    fails = _lower_end(first) > LIMIT
    known = fails or max(_lower_end(first), 0.5) + _share_left_out(measured) / 2 <= LIMIT
    if not known:
        text = f"NOT MEASURED: {left_out}"
    else:
        text = f"{'FAILS' if fails else 'passes'}: {_separates(FIRST, first)}"
        word = _strongest(first)
        text += f"; {_shares(word)}" if word else "; no word is tied to either"
        text += f"; {left_out}" if left_out else ""
    if _lower_end(cues[strongest]) > first["balanced_accuracy"]["value"]:
        better = f"{strongest} separates them better: {_accuracy(cues[strongest])}"
        text += f"; {better if known else _separates(strongest, cues[strongest])}"
    return {"passed": known and not fails, "measured": known, "text": text}


class Imitated:
    """What was counted of samples that a model is to imitate. Parts of a stream can be counted apart, and joined."""

    def __init__(self, refusals: str | None = None) -> None:
        """refusals: the file of another list of phrases than ours. Raises ConfigError as `PhraseList.read`."""
        self.refuses = PhraseList.read(refusals)
        self.corpus = Corpus(Options(refusals=refusals))
        self.unsafe = self.refused = 0  # samples labelled unsafe, and those of them with a refusal

    def add(self, samples: Iterable[Sample]) -> Imitated:
        """Count samples; returns itself."""
        for sample in samples:
            before = self.corpus.refused
            self.corpus.add_sample(sample, None, self.refuses)
            self.unsafe += not sample.safe
            self.refused += not sample.safe and self.corpus.refused > before
        return self

    def join(self, other: Imitated) -> None:
        """Add what was counted of the samples that follow these."""
        self.corpus.join(other.corpus)
        self.unsafe += other.unsafe
        self.refused += other.refused

    def warning(self, first_words: bool = True) -> str | None:
        """One line where a model would learn a first word in place of what to refuse; None if the samples pass.

        first_words: whether a first word that predicts the refusal counts.
        """
        measured = self.corpus.measured()
        result = verdict(measured)
        if not result["measured"]:
            return (
                f"cannot be audited: {result['text']}; `mirage audit` shows more, and data.refusals names a list of "
                "phrases of another language"
            )
        if self.unsafe and self.refused < FEW * self.unsafe:
            return (
                f"has hardly a refusal that is recognised: the list of phrases finds {self.refused} in {self.unsafe} "
                "responses to unsafe questions; if they refuse in another language or in other words, name a list with "
                "data.refusals"
            )
        if result["passed"] or not first_words:
            return None
        cue = measured["cues"][FIRST]
        word = _strongest(cue)
        shares = f"{_shares(word)}; " if word else ""
        return (
            f"fails the audit: {shares}{_separates(FIRST, cue)}. The model may learn the word in place of what is to "
            "be refused: rebalance first words with prepare.diversify or data.balance; `mirage audit` shows every word"
        )


def warning(samples: Iterable[Sample], refusals: str | None = None) -> str | None:
    """`Imitated.warning` of these samples."""
    return Imitated(refusals).add(samples).warning()


def _left_out(measured: Measured) -> str:
    """How many pairs could not be measured, and why; "" when all could."""
    of, unmeasured = measured["pairs"], measured["unmeasured"]
    questions, responses = unmeasured["questions"], unmeasured["responses"]
    parts = []
    if questions:
        parts.append(
            f"{sum(questions.values())} of {of} questions have no first word that could be measured, since their "
            f"script has no spaces between words ({_counts(questions)})"
        )
    if responses:
        parts.append(
            f"{sum(responses.values())} of {of} responses are in a script of which the list of refusals has no phrase "
            f"({_counts(responses)})"
        )
    return "; ".join(parts)


def _counts(scripts: Mapping[str, int]) -> str:
    return ", ".join(f"{script} {count}" for script, count in scripts.items())


def _share_left_out(measured: Measured) -> float:
    """The share of pairs that could not be measured: the mean of the shares of refusals and of answers."""
    kinds = ("refused", "answered")
    return sum(measured["unmeasured"][kind] / measured[kind] for kind in kinds) / 2


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
