"""Which openings of a question tell refusals from answers in a training corpus, told before a model learns them.

Every question–answer pair of the corpus counts once. A *cue* is something about the question (its first word, its
length) that may tell how it is answered; for each of its values the corpus says how often it goes with a refusal.
docs/audit.md explains each figure.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mirage_dist import stats
from mirage_dist.data import records, sources
from mirage_dist.data.refusals import is_refusal, is_refusal_as_published
from mirage_dist.data.sample import Sample
from mirage_dist.data.words import FIRST_WORD
from mirage_dist.schema import ConfigError, SourceConfig

FDR = 0.05  # of the values that are said to be tied to a kind of response, the share that may be by chance
# Fails above it: a guard that saw the opening alone would be right in 55 % of both classes, where chance is right in
# 50 %; the opening then moves a tenth of one class. A choice, not a law; see docs/audit.md.
LIMIT = 0.55
FOLDS = 10
FIRST, KINDS = "first word", ("answered", "refused")
FREQUENT = 200  # values of a cue that are listed whether tied or not, the most frequent ones
LENGTHS = (5, 10, 20, 40, 80)  # words; upper ends of the classes of a question's length
LINE_SECONDS = 30.0  # between progress lines where there is no terminal
BLOCK = 1 << 16  # values whose folds are looked at together
# Format -> the fields that only its records have.
SIGNATURES: Mapping[str, frozenset[str]] = {
    "vlguard": frozenset({"instr-resp"}),
    "llava": frozenset({"conversations"}),
    "spa_vl": frozenset({"chosen", "rejected"}),
    "samples": frozenset({"answer", "history"}),
}


@dataclass(frozen=True)
class Options:
    """What is measured, and what counts as a refusal.

    response_kind: `list` (our phrases of refusal), `published` (VLGuard's), `label` (VLGuard's `safe` and ours), or
    FIELD=VALUE (refused where that field of the record is so). ngrams: the first 1, 2, … words.
    """

    response_kind: str = "list"
    ngrams: int = 1
    length: bool = False
    image_roots: bool = False

    def __post_init__(self) -> None:
        if self.response_kind not in ("list", "published", "label") and "=" not in self.response_kind:
            raise ConfigError(
                f"--response-kind {self.response_kind}: expected list, published, label or FIELD=VALUE "
                "(refused where a record's FIELD is VALUE)"
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

    def measured(self) -> dict[str, Any]:
        """The cue's part of audit.json (see docs/audit.md)."""
        counts = np.frombuffer(self.counts, np.int32).reshape(-1, FOLDS, 2)
        totals = counts.sum(1, dtype=np.int64).tolist()
        answered, refused = counts.sum((0, 1), dtype=np.int64).tolist()
        tests = [stats.fisher(r, a, refused - r, answered - a) for a, r in totals]
        q = stats.benjamini_hochberg(tests)
        names = list(self.index)
        ranks = sorted(range(len(totals)), key=lambda i: (-sum(totals[i]), names[i]))
        listed = {i for i in range(len(totals)) if q[i] <= FDR} | set(ranks[:FREQUENT])
        entries = [_entry(names[i], totals[i], (answered, refused), tests[i], q[i]) for i in sorted(listed)]
        entries.sort(key=lambda e: (-e["strength"], -e["refused"] - e["answered"], e["value"]))
        accuracy, interval = stats.balanced_accuracy(*_guesses(counts))
        return {
            "balanced_accuracy": {"value": accuracy, "ci95": list(interval), "chance": 0.5},
            "distinct": len(totals),
            "unlisted": len(totals) - len(entries),
            "values": entries,
        }


def _entry(value: str, own: Sequence[int], all_: Sequence[int], p: float, q: float) -> dict[str, Any]:
    """One value's row. strength: the end of the log-odds interval nearest 0, its sign such that more is stronger."""
    (a, r), (answered, refused) = own, all_
    estimate, (low, high) = stats.log_odds(r, a, refused - r, answered - a)
    rest = answered + refused - a - r
    return {
        "value": value,
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


def _guesses(counts: np.ndarray) -> list[tuple[float, int]]:
    """(right guesses, pairs) of refusals and of answers, each fold guessed by what the others hold.

    A value is guessed to mean refusal, or answer, where its log-odds interval over the other folds lies wholly on that
    side of 0; else a coin is tossed, which is worth one half. Guessing by the mere sign would fall below chance on a
    corpus without a cue: what one fold has more of, the others have less of.
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
    answered, refused = of_fold.sum(0).tolist()
    return [(float(right[1]), refused), (float(right[0]), answered)]


class Corpus:
    """Counts over the pairs of a corpus; memory grows with distinct values, not with pairs."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.openings = {_opening(n): Cue() for n in range(1, options.ngrams + 1)}
        self.others = {name: Cue() for name in ("length", "image root") if getattr(options, _option(name))}
        self.refused = self.pairs = 0

    def add(self, identity: str, question: str, refused: bool, picture: str | None) -> None:
        """Count a pair. Pairs of one identity share a fold: rewrites of a question are no evidence for each other."""
        fold = zlib.crc32(identity.encode()) % FOLDS
        words = [match[0].lower() for match in islice(FIRST_WORD.finditer(question), self.options.ngrams)]
        for number, cue in enumerate(self.openings.values(), 1):
            cue.add(" ".join(words[:number]), fold, refused)
        if self.options.length:
            self.others["length"].add(_length(question), fold, refused)
        if self.options.image_roots:
            self.others["image root"].add(_root(picture), fold, refused)
        self.pairs += 1
        self.refused += refused

    def result(self) -> dict[str, Any]:
        """audit.json, but for what is known of files only. Without both kinds of response nothing is measured."""
        both = 0 < self.refused < self.pairs
        cues = {name: cue.measured() for name, cue in (self.openings | self.others).items()} if both else {}
        first = cues[FIRST]["values"] if both else []
        words = {kind: [e["value"] for e in first if e["tied"] == kind and e["value"]] for kind in KINDS}
        counts = {"pairs": self.pairs, "refused": self.refused, "answered": self.pairs - self.refused}
        found = {**counts, "options": asdict(self.options), "limit": LIMIT, "fdr": FDR, "words": words, "cues": cues}
        return {**found, "verdict": _verdict(found)}


def _opening(n: int) -> str:
    return FIRST if n == 1 else f"first {n} words"


def _option(cue: str) -> str:
    return {"length": "length", "image root": "image_roots"}[cue]


def _length(question: str) -> str:
    place = bisect_left(LENGTHS, len(question.split()))
    if place == len(LENGTHS):
        return f"over {LENGTHS[-1]} words"
    return f"{LENGTHS[place - 1] + 1 if place else 0}–{LENGTHS[place]} words"


def _root(picture: str | None) -> str:
    """The first folder of a picture's path as the record has it; the last one of an absolute path."""
    if picture is None:
        return "(no picture)"
    path = Path(picture)
    return path.parent.name if path.is_absolute() else path.parts[0] if len(path.parts) > 1 else "(no folder)"


# ------------------------------------------------------------------------------------------------ verdict


def _verdict(found: Mapping[str, Any]) -> dict[str, Any]:
    """{"passed", "text"}: a corpus fails by how much its first words tell, not by whether they tell anything.

    Other cues are named where they tell more, but decide nothing: the words after the first come to what is asked.
    """
    cues = found["cues"]
    if not cues:
        kind = "refusal" if not found["refused"] else "answer"
        text = f"passes: no {kind} among {found['pairs']} responses, so that no word can tell them apart"
        return {"passed": True, "text": text}
    first, strongest = cues[FIRST], max(cues, key=lambda name: _least(cues[name]))
    passed = _least(first) <= LIMIT
    text = f"{'passes' if passed else 'FAILS'}: {_told(FIRST, first)}"
    word = _strongest(first)
    text += f"; {_shares(word)}" if word else "; no word is tied to either"
    if _least(cues[strongest]) > first["balanced_accuracy"]["value"]:
        text += f"; {strongest} tells more: {_accuracy(cues[strongest])}"
    return {"passed": passed, "text": text}


def _least(cue: Mapping[str, Any]) -> float:
    return cue["balanced_accuracy"]["ci95"][0]


def _told(name: str, cue: Mapping[str, Any]) -> str:
    return f"the {name} alone tells refusals from answers with {_accuracy(cue)}"


def _accuracy(cue: Mapping[str, Any]) -> str:
    value, (low, high) = cue["balanced_accuracy"]["value"], cue["balanced_accuracy"]["ci95"]
    return f"balanced accuracy {100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (chance: 50 %)"


def _strongest(cue: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((entry for entry in cue["values"] if entry["tied"] and entry["value"]), None)


def _shares(entry: Mapping[str, Any]) -> str:
    total, rest = entry["refused"] + entry["answered"], entry["rest_refusal_share"]
    share = (
        f'{100 * entry["refusal_share"]:.0f} % of the {total} questions that open with "{entry["value"]}" are refused'
    )
    return share if rest is None else f"{share}, {100 * rest:.0f} % of the others"


def warning(samples: Iterable[Sample]) -> str | None:
    """One line on samples that a model would learn a word from instead of what to refuse; None where they pass."""
    corpus = Corpus(Options())
    for sample in samples:
        _count(corpus, sample, None, is_refusal)
    found = corpus.result()
    if found["verdict"]["passed"]:
        return None
    cue = found["cues"][FIRST]
    word = _strongest(cue)
    named = f"{_shares(word)}; " if word else ""
    return (
        f"{named}{_told(FIRST, cue)}. The model may learn the word in place of what is to be refused: "
        "rebalance first words with prepare.diversify; `mirage audit` tells more"
    )


# ------------------------------------------------------------------------------------------------ corpora


def audit(
    paths: Sequence[Path], options: Options, format: str | None = None, on_bad_record: str = "error"
) -> dict[str, Any]:
    """Read the files once and return audit.json's content.

    format: of all files; without it each file's first record tells. What `sources.read` leaves out is left out here,
    exact repeats too. Raises ConfigError as `sources.read` does, and for a format that cannot be told.
    """
    corpus, files = Corpus(options), []
    total = sum(records.size(path) for path in paths)
    with _progress(total) as seen:
        for path in paths:
            files.append(_read(corpus, path, format or detect(path), on_bad_record, seen))
    return {"files": files, **corpus.result()}


def detect(path: Path) -> str:
    """The format that the first record has the fields of. Raises ConfigError unless it is exactly one."""
    first = next(iter(records.read(path)), None)
    fields = set(first) if isinstance(first, Mapping) else set()
    found = [name for name, own in SIGNATURES.items() if own <= fields]
    if len(found) != 1:
        raise ConfigError(
            f"{path}: record 0: fields {sorted(fields)} are those of {' and '.join(found) or 'no format'}; expected "
            + ", ".join(f"{' and '.join(sorted(own))} ({name})" for name, own in SIGNATURES.items())
            + "; or name it with --format"
        )
    return found[0]


def _read(corpus: Corpus, path: Path, format: str, on_bad_record: str, seen: records.Seen) -> dict[str, Any]:
    """Count a file's pairs; its entry in audit.json."""
    rule = corpus.options.response_kind
    if rule == "label" and format not in ("vlguard", "samples"):
        raise ConfigError(f"{path}: --response-kind label: {format} records have no label; use list or FIELD=VALUE")
    config = SourceConfig(format, str(path), on_bad_record=on_bad_record)  # pyright: ignore[reportArgumentType]
    source, number, before, known = sources.Source([]), -1, corpus.pairs, set[int]()
    for number, record, samples in sources.parsed(config, source, seen):
        for sample in samples:
            # 64 bits a sample in place of the samples: a chance of 1e-7 that one of a million is taken for a repeat.
            if (identity := hash(sample)) in known:
                source.dropped["exact duplicate"] += 1
                continue
            known.add(identity)
            _count(corpus, sample, record.get("image"), _told_by(rule, path, number, record, sample))
    counts = {"records": number + 1, "pairs": corpus.pairs - before}
    return {"path": str(path), "format": format, **counts, "dropped": dict(source.dropped), "skipped": source.skipped}


def _count(corpus: Corpus, sample: Sample, picture: str | None, refuses: Callable[[str], bool] | bool) -> None:
    """Count each turn of a sample; where a label tells the response's kind, the last one, which it is about."""
    if isinstance(refuses, bool):
        corpus.add(sample.id, sample.question, refuses, picture)
        return
    for question, answer in (*sample.history, (sample.question, sample.answer)):
        corpus.add(sample.id, question, refuses(answer), picture)


def _told_by(
    rule: str, path: Path, number: int, record: Mapping[str, Any], sample: Sample
) -> Callable[[str], bool] | bool:
    """What says whether an answer refuses."""
    if rule == "list":
        return is_refusal
    if rule == "published":
        return is_refusal_as_published
    if rule == "label":
        return not sample.safe
    name, _, wanted = rule.partition("=")
    if name not in record:
        raise ConfigError(f"{path}: record {number}: field {name!r} is missing (--response-kind {rule})")
    value = record[name]
    return (value if isinstance(value, str) else json.dumps(value)) == wanted


@contextmanager
def _progress(total: int) -> Iterator[records.Seen]:
    """A bar over bytes on a terminal, a line now and then in a log."""
    terminal, start = sys.stderr.isatty(), time.monotonic()
    told, done = start, 0
    with tqdm(
        total=total, desc="audit", unit="B", unit_scale=True, leave=False, delay=2.0, disable=not terminal
    ) as bar:

        def seen(size: int) -> None:
            nonlocal told, done
            done += size
            bar.update(size)
            if not terminal and time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                print(f"audit: {done / 1e6:.0f} of {total / 1e6:.0f} MB read", file=sys.stderr, flush=True)

        yield seen
