"""The forget–retain frontier: settings over their seeds, which of them no other beats, and methods at equal utility.

Values are taken question by question, the same questions of every run. A setting's rate is the mean over its seeds and
over questions. Its interval is a percentile bootstrap over both (questions drawn jointly for all settings, since they
are the same; seeds for each setting, one fewer than there are, which makes the variance of few seeds unbiased:
McCarthy and Snowden, 1985), widened to the score interval over questions (`stats.scored`): a bootstrap of
rates that are all 0 or 1 has no width.

Methods are compared at one level of the retain measure. To choose the best of many settings and to measure it on the
same answers flatters it, the more the more settings there are. So one half of the questions (by the hash of their ids)
and of the seeds chooses: of a method's settings that reach the level there, the one with the best forget measure. The
other half measures it. Then the halves change places, and the mean of both is reported (cross-fitting: Chernozhukov et
al., Econom. J. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirage_dist import stats
from mirage_dist.data.stream import derived_seed
from mirage_dist.report.curves.frontier import LOWER, AtLevel, Difference, Estimate, Setting
from mirage_dist.report.load import by_hash

RESAMPLES = 2000
AT_ONCE = 1 << 22  # weights of questions that are held at a time
CLOSE = 1e-9  # two rates that differ by less are equal: sums of the same counts in another order
Values = NDArray[np.float64]  # (seeds, questions)


@dataclass(frozen=True)
class Measured:
    """One setting. forget, retain: (S, Q), the value of each question (in one order of all settings) by seed."""

    method: str
    setting: str
    values: dict[str, Any]
    seeds: list[int]
    runs: list[str]
    forget: Values
    retain: Values


@dataclass(frozen=True)
class Questions:
    """Ids of the questions of both measures, in the order of the values, and the measures' names."""

    forget: list[str]
    retain: list[str]
    forget_measure: str
    retain_measure: str

    @property
    def signs(self) -> tuple[int, int]:
        """1 of a measure of which more is better, -1 of the others."""
        return (-1 if self.forget_measure in LOWER else 1), (-1 if self.retain_measure in LOWER else 1)


def halves(ids: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each question is in the second half, by the hash of its id: nobody has chosen them."""
    second = set(by_hash(ids)[1::2])
    return np.array([key in second for key in ids])


def estimates(arrays: Sequence[Values], name: str) -> tuple[list[Estimate], Values]:
    """The estimate of each (S, Q) array of the same Q questions, and the resampled means (arrays, RESAMPLES).

    name: of the measure, which decides the draws.
    """
    means = _resampled(arrays, name)
    return [_estimate(own, drawn) for own, drawn in zip(arrays, means, strict=True)], means


def _estimate(own: Values, drawn: Values) -> Estimate:
    seeds, rate = len(own), float(own.mean())
    by_seed = own.mean(axis=1)
    return {
        "rate": rate,
        "ci95": _bounds(rate, drawn, _clusters(own)),
        "sd": float(by_seed.std(ddof=1)) if seeds > 1 else None,
        "by_seed": [float(value) for value in by_seed],
    }


def _clusters(own: Values) -> list[tuple[float, int]]:
    """Of each question, the sum over seeds and their number."""
    return [(float(total), len(own)) for total in own.sum(axis=0)]


def _bounds(rate: float, drawn: Values, clusters: Sequence[tuple[float, int]]) -> list[float]:
    low, high = (float(bound) for bound in np.quantile(drawn, [0.025, 0.975]))
    of_questions = stats.scored(clusters)
    return [max(0.0, min(rate, low, of_questions[0])), min(1.0, max(rate, high, of_questions[1]))]


def _resampled(arrays: Sequence[Values], name: str, seeds: str = "seeds") -> Values:
    """Means of arrays (S, Q) over questions drawn jointly and seeds drawn for each: (arrays, RESAMPLES).

    seeds: decides the draws of seeds, which both measures share: a resample has the same trainings on both axes.
    """
    generator = np.random.default_rng(derived_seed("frontier", name))
    of_trainings = np.random.default_rng(derived_seed("frontier", seeds))
    count, questions = RESAMPLES, arrays[0].shape[1]
    of_seeds = [_weights(of_trainings, len(own), max(1, len(own) - 1), count) for own in arrays]
    means = np.empty((len(arrays), count))
    step = max(1, AT_ONCE // questions)
    for start in range(0, count, step):
        weights = _weights(generator, questions, questions, min(step, count - start))
        for number, own in enumerate(arrays):
            part = slice(start, start + len(weights))
            means[number, part] = np.sum(of_seeds[number][part] * (weights @ own.T), axis=1)
    return means


def _weights(generator: np.random.Generator, of: int, draws: int, size: int) -> Values:
    """Weights (size, of), each row's sum 1, of `draws` draws with replacement."""
    return generator.multinomial(draws, [1 / of] * of, size=size) / draws


def pareto(forget: Values, retain: Values) -> NDArray[np.bool_]:
    """Which settings no other beats: as good on both axes and better on one. More is better on both.

    forget, retain: (settings,) or (settings, resamples), each resample by itself.
    """
    first, second = forget[:, None], retain[:, None]  # of whom it may be beaten: axis 1
    as_good = (forget[None] >= first - CLOSE) & (retain[None] >= second - CLOSE)
    better = (forget[None] > first + CLOSE) | (retain[None] > second + CLOSE)
    return np.logical_not((as_good & better).any(axis=1))


def settings(measured: Sequence[Measured], questions: Questions) -> list[Setting]:
    """Every setting with its estimates and its place on the frontier."""
    sign_f, sign_r = questions.signs
    forget, drawn_f = estimates([one.forget for one in measured], "forget")
    retain, drawn_r = estimates([one.retain for one in measured], "retain")
    rates_f = sign_f * np.array([e["rate"] for e in forget])
    rates_r = sign_r * np.array([e["rate"] for e in retain])
    of_all, on, share = pareto(rates_f, rates_r), np.zeros(len(measured), dtype=bool), np.zeros(len(measured))
    for method in dict.fromkeys(one.method for one in measured):
        own = np.array([one.method == method for one in measured])
        on[own] = pareto(rates_f[own], rates_r[own])
        share[own] = np.mean(
            [pareto(sign_f * drawn_f[own, b], sign_r * drawn_r[own, b]) for b in range(RESAMPLES)], axis=0
        )
    return [
        {
            "method": one.method,
            "setting": one.setting,
            "values": one.values,
            "seeds": one.seeds,
            "runs": one.runs,
            "forget": forget[i],
            "retain": retain[i],
            "pareto": bool(on[i]),
            "pareto_share": float(share[i]),
            "pareto_of_all": bool(of_all[i]),
        }
        for i, one in enumerate(measured)
    ]


@dataclass(frozen=True)
class Part:
    """Some of the questions, as indices, and half of the seeds: those of even or of odd place. half: None for all."""

    forget: NDArray[np.int64]
    retain: NDArray[np.int64]
    half: int | None

    def of(self, one: Measured) -> tuple[Values, Values]:
        """The values of a setting in this part. A single seed is in every part."""
        seeds = np.arange(len(one.seeds))
        if self.half is not None and len(seeds) > 1:
            seeds = seeds[seeds % 2 == self.half]
        return one.forget[np.ix_(seeds, self.forget)], one.retain[np.ix_(seeds, self.retain)]


def chosen(candidates: Sequence[Measured], part: Part, level: float, signs: tuple[int, int]) -> Measured | None:
    """Of the settings that reach the level on these questions and seeds, the one with the best forget measure there.

    Of equal ones the one that retains more, then the first. None when no setting reaches the level.
    """
    best: tuple[float, float] | None = None
    choice = None
    for one in candidates:
        forget, retain = (sign * float(own.mean()) for sign, own in zip(signs, part.of(one), strict=True))
        if retain < signs[1] * level - CLOSE:
            continue
        if best is None or forget > best[0] + CLOSE or (abs(forget - best[0]) <= CLOSE and retain > best[1] + CLOSE):
            best, choice = (forget, retain), one
    return choice


def at_level(measured: Sequence[Measured], questions: Questions, level: float) -> list[AtLevel]:
    """Every method at the level of the retain measure (see this module)."""
    by_method: dict[str, list[Measured]] = {}
    for one in measured:
        by_method.setdefault(one.method, []).append(one)
    of_forget, of_retain = halves(questions.forget), halves(questions.retain)
    parts = [Part(np.flatnonzero(of_forget == half), np.flatnonzero(of_retain == half), half) for half in (0, 1)]
    whole = Part(np.arange(len(of_forget)), np.arange(len(of_retain)), None)
    rows: list[AtLevel] = []
    for method, candidates in by_method.items():
        choices = [chosen(candidates, part, level, questions.signs) for part in parts]
        of_all = chosen(candidates, whole, level, questions.signs)
        row: AtLevel = {
            "method": method,
            "forget": None,
            "retain": None,
            "in_sample": None,
            "chosen": [one and one.setting for one in choices],
            "of_all": of_all and of_all.setting,
        }
        first, second = choices
        if first is not None and second is not None:
            held_out = [parts[1].of(first), parts[0].of(second)]
            row["forget"] = _of_halves([forget for forget, _ in held_out], "forget")
            row["retain"] = _of_halves([retain for _, retain in held_out], "retain")
            row["in_sample"] = float(np.mean([parts[0].of(first)[0].mean(), parts[1].of(second)[0].mean()]))
        rows.append(row)
    return rows


def _of_halves(arrays: Sequence[Values], name: str) -> Estimate:
    """The mean of the two halves' rates, each of its own questions and seeds."""
    halves = [_resampled([own], f"{name} {half}", f"seeds {half}")[0] for half, own in enumerate(arrays)]
    drawn = np.mean(halves, axis=0)
    by_half = [float(own.mean()) for own in arrays]
    clusters = [cluster for own in arrays for cluster in _clusters(own)]
    rate = sum(by_half) / 2
    return {"rate": rate, "ci95": _bounds(rate, drawn, clusters), "sd": None, "by_seed": []}


def differences(rows: Sequence[AtLevel]) -> list[Difference]:
    """Of the forget measure between every two methods that reach the level.

    The interval combines the two methods' own (MOVER: Zou and Donner, Stat. Med. 2008) as if they were independent;
    methods answer the same questions, so it is wider than need be.
    """
    pairs: list[Difference] = []
    reached = [(row["method"], row["forget"]) for row in rows if row["forget"] is not None]
    for number, (first, one) in enumerate(reached):
        for second, two in reached[number + 1 :]:
            difference = two["rate"] - one["rate"]
            below = math.hypot(two["rate"] - two["ci95"][0], one["ci95"][1] - one["rate"])
            above = math.hypot(two["ci95"][1] - two["rate"], one["rate"] - one["ci95"][0])
            bounds = [max(-1.0, difference - below), min(1.0, difference + above)]
            pairs.append({"methods": [first, second], "difference": difference, "ci95": bounds})
    return pairs
