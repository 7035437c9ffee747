"""The content of `erasure.json`, as types: what the tests of erasure measure. Imports no heavy library.

Each test returns its own part; `erasure.run` writes the file, reports read it. A rate without a denominator is None.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from mirage_dist.evals.results import Entry, Leaf

# ------------------------------------------------------------------------------------------------------- relearning


class StepRates(TypedDict):
    """ASR at one step of relearning: of all questions, of those whose content was relearned, and of the others."""

    all: Leaf | None
    relearned: Leaf | None
    other: Leaf | None


class RelearningRun(TypedDict):
    """contents: number of contents in the relearned samples. steps: training step -> rates; "0" is the model before."""

    contents: int
    steps: dict[str, StepRates]


class RelearningResult(TypedDict):
    """questions, contents: numbers of each. runs: number of relearned samples -> the run on them."""

    questions: int
    contents: int
    runs: dict[str, RelearningRun]


# ----------------------------------------------------------------------------------------------------- quantisation


class Rounding(TypedDict):
    """layers: number of rounded layers. share: fraction of all parameters that are rounded.

    error: root mean square of the change, divided by the root mean square of the weights.
    """

    layers: int
    share: float
    error: float


class Quantised(TypedDict):
    entry: Entry
    weights: Rounding


class QuantisationResult(TypedDict):
    """The suite's headline figures before rounding, and after it by bits a weight."""

    before: Entry
    after: dict[str, Quantised]


# ------------------------------------------------------------------------------------------------------------ probe


class PlaceAccuracy(TypedDict):
    """shuffled: of a probe fitted on shuffled labels."""

    accuracy: Leaf | None
    shuffled: Leaf | None


class Places(TypedDict):
    """One entry a place: 0 is the input of the first decoder layer, l the output of layer l − 1.

    last: the last prompt token. image: the mean of the image tokens, None unless every sample has an image.
    """

    last: list[PlaceAccuracy]
    image: list[PlaceAccuracy] | None


class Probed(TypedDict):
    """classes: label -> number of samples to fit. left_out: samples of smaller classes.

    fitted, tested: numbers of samples. majority: accuracy of always naming the most frequent class.
    """

    classes: dict[str, int]
    left_out: int
    fitted: int
    tested: int
    majority: Leaf | None
    places: Places


class ProbeResult(Probed):
    """transfer: a probe fitted on retained samples and tested on forget samples."""

    label: str
    transfer: Probed | None


# ------------------------------------------------------------------------ completion, one perturbation, attribution


class CompletionResult(TypedDict):
    """words: number of given words -> ASR; "0" is ASR on all questions without a prefix.

    nothing_to_give: number of answers that begin with their content; they count in no other rate.
    """

    words: dict[str, Leaf | None]
    nothing_to_give: int


class FitSummary(TypedDict):
    """The samples that one perturbation was fitted on: their number, and that of their contents.

    clean, loss: mean negative log-probability of a token of their targets, without the perturbation and with it.
    """

    samples: int
    contents: int
    clean: float
    loss: float


class PerturbedRates(TypedDict):
    """ASR on the same questions: as they are, with random noise of size epsilon, and with the perturbation.

    contents: number of distinct contents of these questions; the intervals take them as independent, not questions.
    """

    contents: int
    clean: Leaf | None
    noise: Leaf | None
    perturbed: Leaf | None


class UniversalResult(TypedDict):
    """epsilon, steps: the options. fit: see `FitSummary`.

    held_out: of questions about contents that are in no sample of the fit. fitted: of questions about the others.
    without_picture: number of forget samples left out for lack of a picture. unperturbed: number of those left out
    because the model's preprocessing of their pictures cannot be reproduced; where this shows only when a question is
    asked, it is missing from `perturbed` alone.
    """

    epsilon: int
    steps: int
    fit: FitSummary
    held_out: PerturbedRates
    fitted: PerturbedRates
    without_picture: int
    unperturbed: int


class MeanFall(TypedDict):
    """Mean over n questions of P(refusal opening | question) − P(refusal opening | one word replaced)."""

    mean: float
    ci95: list[float]
    n: int


class AttributionSet(TypedDict):
    """questions: their number. whole: mean P(refusal opening) of the unchanged questions.

    words: replacement word -> one entry for each position, as far as two questions are so long.
    """

    questions: int
    whole: float
    words: dict[str, list[MeanFall]]


class AttributionResult(TypedDict):
    """sets: kind of set ("unsafe", "safe") -> its figures."""

    opening: str
    sets: dict[str, AttributionSet]


# ------------------------------------------------------------------------------------------- measures of forgetting


class Measured(TypedDict):
    """The mean over n answers, and its 95 % interval.

    contents: number of distinct contents; the interval takes these, not answers, as independent. None where there is
    one content only, and the value has no bounds.
    """

    mean: float
    ci95: list[float] | None
    n: int
    contents: int


class Measures(TypedDict):
    """Measures of one set of answers (see `erasure.forgetting`). None: of no answer, or not measured of this set.

    truth_ratio: its geometric mean. closeness: of each answer's truth ratio to 1. without_wrong: number of answers that
    have no truth ratio, because no other content could be drawn as wrong. paraphrased: number of answers whose truth
    ratio has a paraphrase of the right answer.
    """

    probability: Measured
    extraction_strength: Measured
    rouge_l: Measured | None
    truth_ratio: Measured | None
    closeness: Measured | None
    without_wrong: int
    paraphrased: int


class Membership(TypedDict):
    """P(a forget answer's score is below an unseen one's): .5 where an attack on membership cannot tell them apart.

    members, others: numbers of answers. The interval takes contents as independent.
    """

    auc: float
    ci95: list[float]
    members: int
    others: int


class Difference(TypedDict):
    """A two-sample Kolmogorov-Smirnov test: largest distance of the distributions, p, number of values of each."""

    distance: float
    p: float
    n: int


class ForgetQuality(TypedDict):
    """The truth ratios of the model and of one that never knew, compared.

    answers: over answers, as TOFU does; p is too small where several answers state one content. contents: over the
    mean log truth ratio of each content.
    """

    answers: Difference
    contents: Difference


class Never(TypedDict):
    """The same forget answers under a model that never knew. quality: None where no answer has a truth ratio."""

    model_hash: str
    forget: Measures
    quality: ForgetQuality | None


class Scoring(TypedDict):
    """What was measured, and how. Values of models in which these differ cannot be compared.

    wrong, min_k: the options. scored: set -> SHA-256 of its questions, answers and wrong answers.
    """

    wrong: int
    min_k: float
    scored: dict[str, str]


class ForgettingResult(TypedDict):
    """scoring: absent from results of earlier versions.

    forget, retain, unseen: by set; None: not named in the recipe. membership: score ("loss", "min_k") -> attack.

    unseen_without_content: number of unseen samples left out because `content` matches nothing in their answer.
    """

    forget: Measures
    retain: Measures | None
    unseen: Measures | None
    membership: dict[str, Membership] | None
    unseen_without_content: int
    never: Never | None
    scoring: NotRequired[Scoring]


# ----------------------------------------------------------------------------------------------------- erasure.json


class ForgetSummary(TypedDict):
    """samples, contents: numbers of forget samples and of distinct contents.

    without_content: number of samples left out because `content` matches nothing in their answer.
    """

    samples: int
    contents: int
    without_content: int


class ErasureResult(TypedDict):
    """`erasure.json`. seconds: test -> seconds that it took in the start that finished it last.

    A test that the recipe does not name is absent.
    """

    suite: str
    model_hash: str
    judge: str
    forget: ForgetSummary
    seconds: dict[str, float]
    relearning: NotRequired[RelearningResult]
    quantisation: NotRequired[QuantisationResult]
    probe: NotRequired[ProbeResult]
    completion: NotRequired[CompletionResult]
    universal: NotRequired[UniversalResult]
    forgetting: NotRequired[ForgettingResult]
    attribution: NotRequired[AttributionResult]
