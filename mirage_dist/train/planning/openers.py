"""`data.balance: openers`: epochs in which every first word is as frequent in what is forgotten as in what is kept.

Where the first word of a question tells which of two streams it is in, an objective ties forgetting to that word, and
the model loses answers to harmless questions that begin with it. Nothing is reworded here (see `data.diversify` for
that): an epoch draws some samples several times, and others in one epoch of many.

The sides are the streams of the objective; those of one stream are its refusals and its answers. With p_s the shares of
the first words that every side has, on side s, each side is drawn with shares proportional to min_s p_s. Of all
distributions that are equal on every side this one repeats the most often repeated sample least: 1 / Σ min_s p_s times,
one over what the sides have in common. First words that any side lacks cannot be even, and keep their numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirage_dist import disk, state
from mirage_dist.data import words
from mirage_dist.data.refusals import PhraseList
from mirage_dist.data.sample import Sample
from mirage_dist.data.stream import Draw
from mirage_dist.objectives.base import Needs
from mirage_dist.schema import ConfigError

FILE = "openers.json"  # in the folder of a run's samples
SHOWN = 6  # openers that a text names


@dataclass(frozen=True)
class Openers:
    """The openers of a stream. labels: (first word, whether the answer refuses); codes: (n,), each sample's label."""

    labels: list[tuple[str, bool]]
    codes: NDArray[np.int32]

    @classmethod
    def of(cls, samples: Sequence[Sample], refuses: Callable[[str], bool]) -> Openers:
        numbers: dict[tuple[str, bool], int] = {}
        codes = np.empty(len(samples), np.int32)
        for place, sample in enumerate(samples):
            first = words.opening(sample.question)
            label = (first.key if first else "", refuses(sample.answer))
            codes[place] = numbers.setdefault(label, len(numbers))
        return cls(list(numbers), codes)


def of(samples: Mapping[str, Sequence[Sample]], refusals: str | None) -> dict[str, Openers]:
    """The openers of every stream. refusals: the file of a list of phrases of refusal; None: ours."""
    refuses = PhraseList.read(refusals)
    return {name: Openers.of(own, refuses) for name, own in samples.items()}


def write(folder: Path, streams: Mapping[str, Openers]) -> None:
    """Keep the openers beside the samples that they are of. Raises OSError."""
    content = {name: {"labels": own.labels, "codes": own.codes.tolist()} for name, own in streams.items()}
    disk.write(folder / FILE, state.sealed("openers", {"streams": content}), private=True)


def read(folder: Path) -> dict[str, Openers]:
    """Raises state.Damaged, and FileNotFoundError."""
    content: dict[str, Any] = state.read("openers", folder / FILE)["streams"]
    return {
        name: Openers([(word, refuses) for word, refuses in own["labels"]], np.array(own["codes"], np.int32))
        for name, own in content.items()
    }


@dataclass(frozen=True)
class Balance:
    """How the streams are drawn. text: what is even, and how often a sample comes. uneven: what cannot be even."""

    draws: dict[str, Draw]
    text: str
    uneven: list[str]


def balance(streams: Mapping[str, Openers], needs: Needs) -> Balance:
    """The draws of the streams that decide an order; paired streams follow their first.

    Raises ConfigError when no opener is on every side, or there is one side only.
    """
    names = [name for name in needs.streams if name not in needs.paired[1:]]
    by_answer = len(names) == 1
    sides: dict[tuple[str, bool | None], Counter[str]] = {}
    for name in names:
        counts = np.bincount(streams[name].codes, minlength=len(streams[name].labels))
        for (word, refuses), count in zip(streams[name].labels, counts.tolist(), strict=True):
            sides.setdefault((name, refuses if by_answer else None), Counter())[word] += count
    title = {side: _title(*side) for side in sides}
    if len(sides) == 1:
        raise ConfigError(
            f"data.balance=openers: has only {next(iter(title.values()))} to balance; it needs a second stream, or "
            "refusals beside answers; take it out"
        )
    shared = set.intersection(*(set(counts) for counts in sides.values())) - {words.NOT_MEASURED, ""}
    if not shared:
        most = "; ".join(f"{title[side]}: {_named(counts)}" for side, counts in sides.items())
        raise ConfigError(
            f"data.balance=openers: no first word is in {' and in '.join(title.values())} ({most}), so none can be "
            "even; reword the questions with prepare.diversify"
        )
    even = {side: sum(counts[word] for word in shared) for side, counts in sides.items()}
    common = {word: min(counts[word] / even[side] for side, counts in sides.items()) for word in sorted(shared)}
    drawn = {side: _counts(counts, common) for side, counts in sides.items()}
    draws = {name: _draw(streams[name], {s: own for s, own in drawn.items() if s[0] == name}) for name in names}
    most = max(drawn[side][word] / count for side, counts in sides.items() for word, count in counts.items())
    frequent = Counter({word: round(1e6 * share) for word, share in common.items()})
    text = (
        f"data.balance=openers: {_named(frequent)} as frequent in {' as in '.join(title.values())}; "
        f"an epoch has a sample up to {-(-most // 1):.0f} times"
    )
    uneven = []
    for side, counts in sides.items():
        if alone := Counter({word: count for word, count in counts.items() if word not in shared}):
            share = alone.total() / counts.total()
            uneven.append(
                f"data.balance=openers: {share:.0%} of {title[side]} open with words that others lack or that cannot "
                f"be measured ({_named(alone)}), and stay as frequent as they are: the model may still learn these"
            )
    return Balance(draws, text, uneven)


def _title(name: str, refuses: bool | None) -> str:
    return name if refuses is None else f"{name}'s {'refusals' if refuses else 'answers'}"


def _named(counts: Counter[str]) -> str:
    shown = ", ".join(f'"{word}"' for word, _ in counts.most_common(SHOWN))
    return shown + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def _counts(counts: Counter[str], common: Mapping[str, float]) -> dict[str, int]:
    """Draws of each opener in an epoch: as many in all as there are samples, and at least one of each.

    common: the shared openers, with shares that need not sum to one.
    """
    even = sum(count for word, count in counts.items() if word in common)
    total = sum(common.values())
    exact = {word: even * share / total for word, share in common.items()}
    own = {word: max(1, int(value)) for word, value in exact.items()}
    while (left := even - sum(own.values())) != 0:  # by fewer than there are openers
        step = 1 if left > 0 else -1
        open_to = [word for word in own if own[word] + step > 0]
        own[max(open_to, key=lambda word: (step * (exact[word] - own[word]), word))] += step
    return {word: own.get(word, count) for word, count in counts.items()}


def _draw(openers: Openers, sides: Mapping[tuple[str, bool | None], Mapping[str, int]]) -> Draw:
    """sides: the draws of each opener, on the one or two sides of a stream."""
    every = [(refuses, word) for (_, refuses), own in sides.items() for word in own]
    numbers = {label: number for number, label in enumerate(every)}
    by_answer = every[0][0] is not None
    of_label = [numbers[refuses if by_answer else None, word] for word, refuses in openers.labels]
    counts = [count for own in sides.values() for count in own.values()]
    return Draw(np.array(of_label, np.int64)[openers.codes], np.array(counts, np.int64))
