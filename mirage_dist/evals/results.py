"""The content of a suite's `metrics.json`, as types, and the keys of its rates. Imports no heavy library.

`evals.runner` writes the file, `evals.metrics` computes the rates, reports and the tests of erasure read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from mirage_dist import state
from mirage_dist.evals.sharing.usage import Sums, described
from mirage_dist.schema.documents import whole_number
from mirage_dist.stats import Paired

# harmless: not harmful, by a judge that decides nothing else; it may be a refusal.
Verdict = Literal["refused", "answered", "harmful", "harmless", "irrelevant", "correct", "scored", "unparsed", "failed"]
# Answers without a verdict: the judge's output could not be parsed, or the judge's model gave none.
UNJUDGED: frozenset[Verdict] = frozenset({"unparsed", "failed"})


# ------------------------------------------------------------------------------------------------- conditions


@dataclass(frozen=True, slots=True)
class Condition:
    """What questions were asked under: as the data have them, or as the first `shots` rewrites of an attack.

    `str()` gives its key in `metrics.json`, such as "clean" or "what_k3"; `parse` reads a key.
    """

    attack: str
    shots: int  # 0: the questions themselves

    def __str__(self) -> str:
        return f"{self.attack}_k{self.shots}" if self.shots else self.attack

    @classmethod
    def parse(cls, key: str) -> Condition:
        """The condition of a key. A key without a number of shots is the questions' own condition, shots 0."""
        attack, separator, shots = key.rpartition("_k")
        number = whole_number(shots)
        return cls(attack, number) if separator and attack and number is not None else cls(key, 0)

    @property
    def label(self) -> str:
        """For readers of tables and figures, such as "what, K = 3"."""
        return f"{self.attack}, K = {self.shots}" if self.shots else self.attack


CLEAN = Condition("clean", 0)


@dataclass(frozen=True, slots=True)
class AppliedAttack:
    """An attack on a set of questions: its name in the recipe, its number of rewrites K, whether it is a control.

    A control changes the question in a way that should not matter; it explains how much of the attack's effect is due
    to rewriting as such.
    draws: how many answers to each rewrite are drawn at random; `shots` then counts these answers. 0: none is drawn.
    spent: the steps that the search had taken for each rewrite, where these are the stages of one; else empty.
    """

    name: str
    shots: int
    control: bool
    draws: int = 0
    spent: tuple[int, ...] = ()

    @property
    def rewrites(self) -> int:
        """The number of rewrites, however many answers each has."""
        return self.shots // self.draws if self.draws else self.shots

    @property
    def conditions(self) -> list[Condition]:
        """K = 1 … `shots`; where answers are drawn, after 1, 2, 4, 8 … rounds and after all of them."""
        if not self.draws:
            return [Condition(self.name, k) for k in range(1, self.shots + 1)]
        rounds = [2**i for i in range(self.draws.bit_length()) if 2**i < self.draws]
        return [Condition(self.name, n * self.rewrites) for n in (*rounds, self.draws)]

    @property
    def full(self) -> Condition:
        """All of its rewrites."""
        return Condition(self.name, self.shots)


# ----------------------------------------------------------------------------------------------- metrics.json


class Leaf(TypedDict):
    """One rate. `rate` = k / n, `ci95` = [low, high].

    questions: present where n counts answers and several of them share a question.
    unjudged, bounds: present where answers have no verdict: their number, and the rate if none of them were hits and
    if all of them were. Of accuracies, and of the best of fewer draws than there are, `rate` is the mean score and `k`
    the sum of scores, rounded to hundredths.
    """

    rate: float
    k: float
    n: int
    ci95: list[float]
    questions: NotRequired[int]
    unjudged: NotRequired[int]
    bounds: NotRequired[list[float]]


Rates = dict[str, Leaf | None]  # by condition (see `Condition`); None: not measured, or the judge cannot tell


class Measures(TypedDict, total=False):
    """The measures of one set of questions, by its kind (see `evals.metrics`).

    unsafe: asr, ir, asr_per_shot. safe: rr, utility, rr_per_shot. utility: accuracy, rr. locality: locality.
    """

    asr: Rates
    ir: Rates
    asr_per_shot: Rates
    rr: Rates
    utility: Rates
    rr_per_shot: Rates
    accuracy: Rates
    locality: Leaf | None


class Entry(TypedDict):
    """A judge's headline figures, each of the first set of its kind; None where the suite has no such set.

    accuracy: of the clean questions of each benchmark, by set; present where the suite has benchmarks.
    Every further set of a kind has members of its own, such as `asr_held_out` and `ir_held_out` of an unsafe set
    `held_out` (see `of_set`).
    """

    asr: Rates | None
    rr: Rates | None
    ir: Rates | None
    utility: Rates | None
    locality: Leaf | None
    accuracy: NotRequired[dict[str, Leaf | None]]


def of_set(measure: str, own: str) -> str:
    """The member of an `Entry` that has a measure of a further set."""
    return f"{measure}_{own}"


def further(entry: Entry, measure: str) -> list[str]:
    """The further sets of which an entry has a measure, in the order of the suite."""
    return [name.removeprefix(of_set(measure, "")) for name in entry if name.startswith(of_set(measure, ""))]


Figures = dict[str, Leaf | float | None]  # by name; a plain number is no rate of anything, such as F1 or MME's score
Scores = dict[str, Figures]  # by category, and over all of them


class Unjudged(TypedDict):
    """How many answers have no verdict, and why."""

    unparsed: int  # the judge's reply could not be read
    failed: int  # the judge could not be reached, or its endpoint rejected or filtered the request
    reasons: dict[str, int]  # of the failed ones


class Corrected(TypedDict):
    """A rate corrected for its judge's errors (see `stats.rogan_gladen`), by human labels.

    rate, ci95: None where the labels give no estimate, and `reason` says why. recall, specificity: [k, n] of the labels
    by which the judge's errors are estimated: of answers, or of questions where the rate counts questions under
    several rewrites.
    """

    rate: float | None
    ci95: list[float] | None
    recall: list[int]
    specificity: list[int]
    reason: NotRequired[str]


class JudgeResult(TypedDict):
    """One judge's figures.

    kind, about: the judge's kind in the recipe, and one phrase for reports.
    sets: by set. categories: by set, then by category and category/subcategory.
    paired: set -> condition -> each attack against the clean questions (see `stats.paired`).
    verdicts: set -> attack, or "clean" -> verdict -> number of answers.
    corrected: set -> measure -> condition -> the rate corrected for the judge's errors; present with human labels.
    scores: set -> what its benchmark publishes beside the mean score (see `judges.figures`); where there is such a set.
    """

    kind: str
    about: str
    entry: Entry
    sets: dict[str, Measures]
    categories: dict[str, dict[str, Measures]]
    paired: dict[str, dict[str, Paired | None]]
    verdicts: dict[str, dict[str, dict[str, int]]]
    unjudged: Unjudged
    corrected: NotRequired[dict[str, dict[str, dict[str, Corrected]]]]
    scores: NotRequired[dict[str, Scores]]


class PairAgreement(TypedDict):
    """How two judges agree on one class."""

    judges: list[str]
    verdict: Verdict
    unjudged: int  # answers that at least one of the two did not judge; the others are compared
    kappa: float | None  # Cohen's κ, None where chance alone gives full agreement
    agreed: Leaf | None  # the fraction of answers that both put into the class, or both put outside it


HUMAN = "human labels"  # `LabelAgreement.labels` where the labels come from a file


class LabelAgreement(TypedDict):
    """A judge's errors on one class, measured by labels."""

    judge: str
    labels: str  # the judge whose verdicts are the labels, or HUMAN
    verdict: Verdict
    unjudged: int  # as in `PairAgreement`
    precision: Leaf | None  # the fraction of the judge's positive verdicts that are correct
    recall: Leaf | None  # the fraction of the answers of this class that the judge recognises
    specificity: NotRequired[Leaf | None]  # the fraction of the other answers that the judge puts outside the class
    kappa: NotRequired[float | None]  # Cohen's κ of judge and labels


class Agreement(TypedDict):
    """One entry for each pair of judges and each class that both can give."""

    pairs: list[PairAgreement]
    against_labels: list[LabelAgreement]


class LabelsInfo(TypedDict):
    """The file of human labels: its path, its content's SHA-256, and how many answers have each label."""

    file: str
    sha256: str
    verdicts: dict[str, int]


class AttackInfo(TypedDict):
    """See `AppliedAttack`."""

    shots: int
    control: bool
    draws: NotRequired[int]
    spent: NotRequired[list[int]]


def info(attack: AppliedAttack) -> AttackInfo:
    """An attack as `metrics.json` has it under its name."""
    made: AttackInfo = {"shots": attack.shots, "control": attack.control}
    if attack.draws:
        made["draws"] = attack.draws
    if attack.spent:
        made["spent"] = list(attack.spent)
    return made


def applied(name: str, info: AttackInfo) -> AppliedAttack:
    """The attack of this name in `metrics.json`."""
    return AppliedAttack(name, info["shots"], info["control"], info.get("draws", 0), tuple(info.get("spent", ())))


class SetInfo(TypedDict):
    """samples: the number of questions."""

    kind: str
    samples: int
    attacks: dict[str, AttackInfo]


class DefenceInfo(TypedDict):
    """The defence under which answers were given: its name and kind in the recipe, and a phrase for reports.

    undefended: a digest of the rows' keys without a defence; others are not the same questions to the same model.
    withheld: of a filter, set -> attack, or "clean" -> [answers withheld, answers]. undecided: of these, how many
    because the guard's reply was no verdict. same_judge: the judges of the rates that are the guard itself.
    """

    name: str
    kind: str
    about: str
    undefended: str
    withheld: NotRequired[dict[str, dict[str, list[int]]]]
    undecided: NotRequired[int]
    same_judge: NotRequired[list[str]]


class Backend(TypedDict):
    """What replies name as the model and its configuration, and how many answers did so. None: they named none."""

    model: str | None
    system_fingerprint: str | None
    answers: int


class Ends(TypedDict):
    """How many answers an endpoint's content filter blocked, or the limit of tokens cut off, of how many."""

    blocked: int
    cut: int
    answers: int


class EndpointInfo(TypedDict):
    """The endpoint that answered, under the name that the recipe gives its model, and what its answers took.

    ends: by set and by attack, or "clean".
    """

    url: str
    model: str
    served: list[Backend]
    ends: dict[str, dict[str, Ends]]
    usage: Sums


class SuiteResult(TypedDict):
    """`metrics.json`. recipe_hash: equal for evaluations whose results are comparable.

    headline: the judge whose entry reports show, a key of `judges`. caution: one sentence where the headline rates are
    a phrase list's (see `caution`). labels: present where the recipe names human labels. defence: present of answers
    under a defence. endpoint: present of an endpoint's answers; `model_hash` is then of its address
    and the fixed fields of its requests.
    """

    model_hash: str
    suite: str
    seed: int
    recipe_hash: str
    world: dict[str, Any] | None
    sets: dict[str, SetInfo]
    headline: str
    judges: dict[str, JudgeResult]
    agreement: Agreement
    caution: NotRequired[str]
    labels: NotRequired[LabelsInfo]
    defence: NotRequired[DefenceInfo]
    endpoint: NotRequired[EndpointInfo]


def caution(result: SuiteResult) -> str | None:
    """What a reader of the headline rates must know first where only a phrase list gave them, in one sentence."""
    judges = result["judges"]
    if judges[result["headline"]]["kind"] != "keyword":
        return None
    others = [name for name, own in judges.items() if own["kind"] not in ("keyword", "benchmark")]
    counts = "it counts every answer to an unsafe question that has none of its phrases as harmful, gibberish included"
    if others:
        return (
            f"The first judge, {result['headline']}, is a list of refusal phrases: {counts}; "
            f"name {others[0]} first in the recipe's judges to head the report with its rates."
        )
    return (
        f"Only a list of refusal phrases judged these answers: {counts}, and misses refusals in other words; "
        "let a model judge them before you rely on these rates (docs/judges.md)."
    )


def taken(info: EndpointInfo) -> str:
    """Which model an endpoint answered as, and what its answers took, in one line."""
    names = dict.fromkeys(backend["model"] for backend in info["served"] if backend["model"])
    prints = {backend["system_fingerprint"] for backend in info["served"] if backend["system_fingerprint"]}
    own = f", which names itself {', '.join(names)}" if names.keys() - {info["model"]} else ""
    several = f", under {len(prints)} system fingerprints" if len(prints) > 1 else ""
    return f"{info['model']} behind {info['url']}{own}{several}: {described(info['usage'])}"


def text(result: SuiteResult) -> str:
    """The content of `metrics.json`."""
    return state.sealed("rates", cast(dict[str, Any], result), indent=1)


def read(suite: Path) -> SuiteResult:
    """`metrics.json`. Raises FileNotFoundError when the suite has none, and RunError for a damaged or edited one."""
    remedy = "Start the evaluation again: it computes the rates from the verdicts on disk"
    return cast(SuiteResult, state.read("rates", suite / "metrics.json", remedy))


class HistoryLine(TypedDict):
    """One line of `history.jsonl`: the headline judge's entry of one checkpoint."""

    step: int
    judge: str
    entry: Entry
