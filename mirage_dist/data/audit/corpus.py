"""The measurement: how often each value of a cue goes with a refusal, and how well a cue alone predicts refusals."""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from mirage_dist import stats
from mirage_dist.data.pictures import Reference
from mirage_dist.data.refusals import FEW, PhraseList
from mirage_dist.data.sample import Sample
from mirage_dist.data.scripts import main_script
from mirage_dist.data.words import opening, words
from mirage_dist.schema import ConfigError
from mirage_dist.schema.limits import NGRAMS

FDR = 0.05  # false-discovery rate among the values that are reported as tied to a kind of response
# A corpus fails above it: a guesser that sees the opening alone would be right in 55 % of both classes, where chance is
# right in 50 %; the opening then moves a tenth of one class. A choice; see docs/audit_method.md.
LIMIT = 0.55
FOLDS = 10
FIRST = "first word"
KINDS: tuple[Literal["answered", "refused"], ...] = ("answered", "refused")
FREQUENT = 200  # the most frequent values of a cue are listed whether tied or not
LENGTHS = (5, 10, 20, 40, 80)  # words; upper ends of the classes of a question's length
CHARACTERS = (1, 2, 3)  # first letters that are measured where the first word cannot be
BLOCK = 1 << 16  # values whose folds are processed at once


class Accuracy(TypedDict):
    """A balanced accuracy from 0 to 1, its 95 % interval, and what chance reaches."""

    value: float
    ci95: list[float]
    chance: float


class Value(TypedDict):
    """One value of a cue, such as one first word.

    refused, answered: pairs with this value. refusal_share: of its pairs, rest_refusal_share: of all other pairs (None
    when there are none). log_odds: natural logarithm of the odds ratio of refusal, with its 95 % interval. p: Fisher's
    exact test. q: p corrected for the number of values. strength: the end of the interval nearest 0, its sign such that
    more is stronger.
    """

    value: str
    refused: int
    answered: int
    refusal_share: float
    rest_refusal_share: float | None
    log_odds: float
    ci95: list[float]
    p: float
    q: float
    tied: Literal["refused", "answered"] | None
    strength: float


class CueResult(TypedDict):
    """distinct: number of values, of which `unlisted` are neither tied nor frequent and not in `values`.

    left_out: kind of response -> pairs without a value of this cue, since it could not be measured.
    """

    balanced_accuracy: Accuracy
    distinct: int
    unlisted: int
    left_out: dict[str, int]
    values: list[Value]


class Unmeasured(TypedDict):
    """Pairs of which the audit cannot know what it counts, by script.

    questions: those without a measurable first word. responses: those in a script of which the list has no phrase, so
    that it would find no refusal. pairs: those with either.
    """

    pairs: int
    refused: int
    answered: int
    questions: dict[str, int]
    responses: dict[str, int]


class Measured(TypedDict):
    """A corpus's counts. words: kind of response -> the first words that are tied to it, strongest first.

    cues: name -> result; empty when the corpus has only one kind of response. warnings: what may make the counts wrong.
    """

    pairs: int
    refused: int
    answered: int
    options: dict[str, Any]
    limit: float
    fdr: float
    unmeasured: Unmeasured
    warnings: list[str]
    words: dict[str, list[str]]
    cues: dict[str, CueResult]


@dataclass(frozen=True)
class Options:
    """What is measured, and what counts as a refusal.

    response_kind: `list` (our phrases of refusal), `published` (VLGuard's), `label` (VLGuard's `safe` and ours), or
    FIELD=VALUE (refused if that field of the record has this value). ngrams: measure the first 1, 2, …, N words.
    refusals: with `list`, the file of another list of phrases (see `data.refusals.PhraseList`).
    """

    response_kind: str = "list"
    ngrams: int = 1
    length: bool = False
    image_roots: bool = False
    refusals: str | None = None

    def __post_init__(self) -> None:
        if self.response_kind not in ("list", "published", "label") and "=" not in self.response_kind:
            raise ConfigError(
                f"--response-kind {self.response_kind}: expected list, published, label or FIELD=VALUE "
                "(refused if a record's FIELD is VALUE)"
            )
        if not 1 <= self.ngrams <= NGRAMS.value:
            raise ConfigError(f"--ngrams {self.ngrams}: expected a whole number from 1 to {NGRAMS.value}")
        if self.refusals is not None and self.response_kind != "list":
            raise ConfigError(
                f"--refusals {self.refusals}: is for --response-kind list; {self.response_kind} does not use it"
            )


class Cue:
    """How often each value goes with an answer and with a refusal, fold by fold."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}
        self.counts = array("i")  # value × fold × (answered, refused)

    def add(self, value: str, fold: int, refused: bool) -> None:
        row = self.index.setdefault(value, len(self.index))
        if row * 2 * FOLDS == len(self.counts):
            self.counts.frombytes(bytes(2 * FOLDS * self.counts.itemsize))
        self.counts[(row * FOLDS + fold) * 2 + refused] += 1

    def join(self, other: Cue) -> None:
        """Add the counts of pairs that come after these."""
        for value in other.index:
            self.index.setdefault(value, len(self.index))
        missing = 2 * FOLDS * len(self.index) - len(self.counts)
        self.counts.frombytes(bytes(missing * self.counts.itemsize))
        rows = [self.index[value] for value in other.index]
        own, theirs = (np.frombuffer(counts, np.int32).reshape(-1, 2 * FOLDS) for counts in (self.counts, other.counts))
        own[rows] += theirs

    def measured(self, total: tuple[int, int]) -> CueResult:
        """The cue's part of audit.json.

        total: (answered, refused) pairs of the corpus. Those without a value of this cue are in no share and no odds;
        the guesser tosses a coin for them.
        """
        counts = np.frombuffer(self.counts, np.int32).reshape(-1, FOLDS, 2)
        totals = counts.sum(1, dtype=np.int64).tolist()
        answered, refused = counts.sum((0, 1), dtype=np.int64).tolist()
        tests = [stats.fisher(r, a, refused - r, answered - a) for a, r in totals]
        q = stats.benjamini_hochberg(tests)
        names = list(self.index)
        ranks = sorted(range(len(totals)), key=lambda i: (-sum(totals[i]), names[i]))
        listed = {i for i in range(len(totals)) if q[i] <= FDR} | set(ranks[:FREQUENT])
        values = [_value(names[i], totals[i], (answered, refused), tests[i], q[i]) for i in sorted(listed)]
        values.sort(key=lambda v: (-v["strength"], -v["refused"] - v["answered"], v["value"]))
        accuracy, interval = stats.balanced_accuracy(*_guesses(counts, total))
        return {
            "balanced_accuracy": {"value": accuracy, "ci95": list(interval), "chance": 0.5},
            "distinct": len(totals),
            "unlisted": len(totals) - len(values),
            "left_out": {"refused": total[1] - refused, "answered": total[0] - answered},
            "values": values,
        }


def _value(name: str, own: Sequence[int], total: Sequence[int], p: float, q: float) -> Value:
    """One value's row. own, total: (answered, refused) pairs with this value and in the corpus."""
    (a, r), (answered, refused) = own, total
    estimate, (low, high) = stats.log_odds(r, a, refused - r, answered - a)
    rest = answered + refused - a - r
    return {
        "value": name,
        "refused": r,
        "answered": a,
        "refusal_share": r / (a + r),
        "rest_refusal_share": (refused - r) / rest if rest else None,
        "log_odds": estimate,
        "ci95": [low, high],
        "p": p,
        "q": q,
        "tied": (None if q > FDR else "refused" if estimate > 0 else "answered"),
        "strength": low if estimate > 0 else -high,
    }


def _guesses(counts: np.ndarray, total: tuple[int, int]) -> list[tuple[float, int]]:
    """(right guesses, pairs) of refusals and of answers, each fold guessed from the other folds.

    counts: (values, FOLDS, 2) pairs, answered and refused. total: of these, with the pairs that have no value. A value
    is guessed to mean refusal, or answer, if its log-odds interval over the other folds lies wholly on that side of 0;
    else a coin is tossed, which counts one half. Guessing by the sign alone would fall below chance on a corpus without
    a cue: values that are frequent in one fold are rarer in the others.
    """
    of_fold = counts.sum(0, dtype=np.int64)
    others = of_fold.sum(0) - of_fold
    right = np.zeros(2)
    for start in range(0, len(counts), BLOCK):
        block = counts[start : start + BLOCK].astype(np.int64)
        seen = block.sum(1, keepdims=True) - block
        cells, rest = seen + 0.5, others - seen + 0.5
        estimate = np.log(cells[..., 1] * rest[..., 0] / (cells[..., 0] * rest[..., 1]))  # as stats.log_odds
        half = stats.Z95 * np.sqrt((1 / cells + 1 / rest).sum(-1))
        guess = np.sign(estimate) * (np.abs(estimate) > half)
        right += (block[..., 0] * (1 - guess)).sum() / 2, (block[..., 1] * (1 + guess)).sum() / 2
    right += (np.array(total) - of_fold.sum(0)) / 2
    answered, refused = total
    return [(float(right[1]), refused), (float(right[0]), answered)]


class Corpus:
    """Counts over the question–answer pairs of a corpus; memory grows with distinct values, not with pairs."""

    def __init__(self, options: Options) -> None:
        self.options = options
        # The published phrases are English, as ours are.
        by_list = options.response_kind in ("list", "published")
        self.phrases = PhraseList.read(options.refusals) if by_list else None
        self.openings = {_opening(n): Cue() for n in range(1, options.ngrams + 1)}
        self.letters = {_letters(n): Cue() for n in CHARACTERS}  # of the questions without a measurable first word
        self.others = {name: Cue() for name in ("length", "image root") if getattr(options, _option(name))}
        self.refused = self.pairs = 0
        self.unmeasured = [0, 0]  # answered, refused
        self.questions, self.responses = Counter[str](), Counter[str]()  # unmeasured ones by script

    def add(self, identity: str, question: str, refused: bool, picture: str | None, unread: str | None = None) -> None:
        """Count a pair. Pairs of one identity share a fold, since rewrites of a question are not independent.

        picture: the picture's path as the record has it, for the cue `image root`. unread: the response's script, if
        `refused` cannot be known because of it.
        """
        fold = zlib.crc32(identity.encode()) % FOLDS
        start = opening(question)
        script = start.script if start else None
        if start is None or start.measured:
            first = list(islice(words(question), self.options.ngrams)) if self.options.ngrams > 1 else []
            first = first or [start.key if start else ""]
            for number, cue in enumerate(self.openings.values(), 1):
                cue.add(" ".join(first[:number]), fold, refused)
            if self.options.length:
                self.others["length"].add(_length(question), fold, refused)
        else:
            for number, cue in zip(CHARACTERS, self.letters.values(), strict=True):
                cue.add(start.characters(number), fold, refused)
        if self.options.image_roots:
            self.others["image root"].add(_root(picture), fold, refused)
        self.pairs += 1
        self.refused += refused
        if script or unread:
            self.unmeasured[refused] += 1
            self.questions.update([script] if script else [])
            self.responses.update([unread] if unread else [])

    def add_sample(self, sample: Sample, picture: str | None, refuses: Callable[[str], bool] | bool) -> None:
        """Count each turn of a sample by `refuses`; or, if it is a label, the last turn only, which the label rates."""
        if isinstance(refuses, bool):
            self.add(sample.id, sample.question, refuses, picture)
            return
        for question, answer in (*sample.history, (sample.question, sample.answer)):
            unread = self.phrases is not None and not self.phrases.reads(answer)
            self.add(sample.id, question, refuses(answer), picture, main_script(answer) if unread else None)

    def join(self, other: Corpus) -> None:
        """Add what was counted, with the same options, of pairs that come after these: the result is that of all."""
        for name, cue in other._cues().items():
            self._cues()[name].join(cue)
        self.pairs += other.pairs
        self.refused += other.refused
        self.unmeasured = [sum(counts) for counts in zip(self.unmeasured, other.unmeasured, strict=True)]
        self.questions.update(other.questions)
        self.responses.update(other.responses)

    def _cues(self) -> dict[str, Cue]:
        return self.openings | self.letters | self.others

    def measured(self) -> Measured:
        """The corpus's part of audit.json. Without both kinds of response there are no cues."""
        both = 0 < self.refused < self.pairs
        total = (self.pairs - self.refused, self.refused)
        measurable = self.openings | (self.letters if self.questions else {}) | self.others
        cues = {name: cue.measured(total) for name, cue in measurable.items()} if both else {}
        first = cues[FIRST]["values"] if both else []
        return {
            "pairs": self.pairs,
            "refused": self.refused,
            "answered": self.pairs - self.refused,
            "options": asdict(self.options),
            "limit": LIMIT,
            "fdr": FDR,
            "unmeasured": {
                "pairs": sum(self.unmeasured),
                "refused": self.unmeasured[1],
                "answered": self.unmeasured[0],
                "questions": dict(self.questions.most_common()),
                "responses": dict(self.responses.most_common()),
            },
            "warnings": self._warnings(),
            "words": {kind: [v["value"] for v in first if v["tied"] == kind and v["value"]] for kind in KINDS},
            "cues": cues,
        }

    def _warnings(self) -> list[str]:
        """A list that finds almost nothing is no evidence that nothing was refused."""
        kind, path = self.options.response_kind, self.options.refusals
        if self.phrases is None or self.refused >= FEW * self.pairs:
            return []
        named = "the published list" if kind == "published" else f"the list {path}" if path else "our English list"
        return [
            f"{named} finds a refusal in {self.refused} of {self.pairs} responses; if they refuse in another language "
            "or in other words, name a list with --refusals FILE (docs/audit.md), or a label with --response-kind"
        ]


def _opening(n: int) -> str:
    return FIRST if n == 1 else f"first {n} words"


def _letters(n: int) -> str:
    return "first character" if n == 1 else f"first {n} characters"


def _option(cue: str) -> str:
    return {"length": "length", "image root": "image_roots"}[cue]


def _length(question: str) -> str:
    place = bisect_left(LENGTHS, len(question.split()))
    if place == len(LENGTHS):
        return f"over {LENGTHS[-1]} words"
    return f"{LENGTHS[place - 1] + 1 if place else 0}–{LENGTHS[place]} words"


def _root(picture: str | None) -> str:
    """The first folder of a relative path, the last one of an absolute path."""
    if picture is None:
        return "(no picture)"
    if isinstance(picture, Reference):
        return "(in the table)"
    path = Path(picture)
    return path.parent.name if path.is_absolute() else path.parts[0] if len(path.parts) > 1 else "(no folder)"
