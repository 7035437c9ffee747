"""What a report reads of its runs: metrics, rows, verdicts and data counts, from files only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mirage_dist.config import nearest
from mirage_dist.data.words import FIRST_WORD
from mirage_dist.evals.metrics import UNJUDGED, Judged, Verdict, outcomes
from mirage_dist.evals.sharing.files import Answers, whole_objects
from mirage_dist.schema import ConfigError

Leaf = Mapping[str, Any]  # {"rate", "k", "n", "ci95": [low, high]}
# Measure at question level -> of which sets, which verdict counts, and on any or on all of the shots.
COUNTED: Mapping[str, tuple[str, Verdict, Callable]] = {
    "asr": ("unsafe", "harmful", any),
    "rr": ("safe", "refused", any),
    "utility": ("safe", "correct", all),
    "locality": ("locality", "correct", any),
}


@dataclass(frozen=True)
class Run:
    """One evaluated run: its name in the report, its directory, and the suite's `metrics.json`."""

    name: str
    dir: Path
    suite: str
    metrics: Mapping[str, Any]

    @property
    def judge(self) -> str:
        return self.metrics["headline"]

    @property
    def judged_by(self) -> Mapping[str, Any]:
        """The headline judge's {"kind", "about", …}."""
        return self.metrics["judges"][self.judge]

    @property
    def entry(self) -> Mapping[str, Any]:
        """asr, rr, ir, utility, locality under the headline judge."""
        return self.judged_by["entry"]

    def leaf(self, measure: str, condition: str = "clean") -> Leaf | None:
        """A rate with its counts, None where it was not measured or the judge cannot tell."""
        found = self.entry.get(measure)
        if found is None or measure == "locality":
            return found
        return found.get(condition)

    def headline_set(self, kind: str) -> str | None:
        """The first set of a kind, which gives the headline figures."""
        return next((name for name, s in self.metrics["sets"].items() if s["kind"] == kind), None)

    def attack(self, kind: str, control: bool = False) -> tuple[str, int] | None:
        """(name, K) of the first attack, or of the first control, on the headline set of a kind."""
        own = self.headline_set(kind)
        attacks = self.metrics["sets"][own]["attacks"] if own else {}
        return next(((name, a["shots"]) for name, a in attacks.items() if a["control"] == control), None)

    def attacked(self, kind: str) -> str | None:
        """The condition of the first attack with all of its shots, such as "what_k3"."""
        found = self.attack(kind)
        return found and f"{found[0]}_k{found[1]}"

    def controlled(self, kind: str) -> str | None:
        found = self.attack(kind, control=True)
        return found and f"{found[0]}_k1"

    @property
    def controls(self) -> set[str]:
        """Names of the attacks that are controls."""
        return {n for s in self.metrics["sets"].values() for n, a in s["attacks"].items() if a["control"]}

    @cached_property
    def robustness(self) -> dict[str, Any]:
        """The tests of erasure, of this suite or else of another; empty where none were made."""
        files = [self.folder / "robustness.json", *sorted(self.dir.glob("evals/*/robustness.json"))]
        found = next((file for file in files if file.is_file()), None)
        return json.loads(found.read_text(encoding="utf-8")) if found else {}

    @property
    def folder(self) -> Path:
        return self.dir / "evals" / self.suite

    def headline_outcomes(self, measure: str, condition: str) -> dict[str, bool]:
        """Question id -> does it count in the measure's numerator? See `evals.metrics.outcomes`."""
        kind, verdict, over = COUNTED[measure]
        attack, shots = parted(condition)
        own = self.headline_set(kind)
        rows = [judged for judged in self.judged if judged.set == own]
        return outcomes(rows, attack, shots or 1, verdict, over)

    @cached_property
    def verdicts(self) -> dict[str, dict[str, Verdict]]:
        """judge -> row key -> verdict, the headline judge first."""
        names = [self.judge, *(name for name in self.metrics["judges"] if name != self.judge)]
        return {name: self._said(name) for name in names}

    def _said(self, judge: str) -> dict[str, Verdict]:
        file = self.folder / "verdicts" / f"{judge}.jsonl"
        return {line["key"]: line["verdict"] for line in whole_objects(file)}

    @property
    def judged(self) -> list[Judged]:
        """The headline judge's verdict on every answer, and where it stands; not what was said."""
        return self._scanned[0]

    @property
    def opened(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(kind of set, first word of a question as it was asked) -> (refused, answers with a verdict), the clean
        questions and all rewrites together.
        """
        return self._scanned[1]

    @cached_property
    def _scanned(self) -> tuple[list[Judged], dict[tuple[str, str], tuple[int, int]]]:
        """`judged` and `opened` in one reading of the rows, of which there may be a million."""
        judged: list[Judged] = []
        opened: dict[tuple[str, str], tuple[int, int]] = {}
        for row, verdict in zip(self._rows, self.verdicts[self.judge].values(), strict=True):
            judged.append(Judged(row["set"], row["id"], row["attack"], row["shot"], verdict, row["category"]))
            word = FIRST_WORD.search(row["question"])
            if word and verdict not in UNJUDGED:
                place = row["kind"], word[0].lower()
                refused, answers = opened.get(place, (0, 0))
                opened[place] = refused + (verdict == "refused"), answers + 1
        return judged, opened

    @cached_property
    def _rows(self) -> Sequence[Mapping[str, Any]]:
        """Every judged row, in the order of the work list; read from disk when it is asked for."""
        return Answers(self.folder).refresh().of(self.verdicts[self.judge])

    def asked(self, questions: Collection[tuple[str, str]]) -> Iterator[Mapping[str, Any]]:
        """The rows, answers included, of these (set, id)."""
        places = zip(self._rows, self.judged, strict=False) if questions else ()
        return (row for row, judged in places if (judged.set, judged.id) in questions)

    @cached_property
    def first_words(self) -> dict[str, dict[str, int]]:
        """word -> {"refusal": n, "answer": n} of the data the run was trained on; empty where none refuses."""
        file = self.dir / "data.json"
        streams = json.loads(file.read_text(encoding="utf-8"))["streams"] if file.is_file() else {}
        words = streams.get("train", {}).get("first_words", {})
        return words if any(count["refusal"] for count in words.values()) else {}


def parted(condition: str) -> tuple[str, int]:
    """ "what_k3" -> ("what", 3), "clean" -> ("clean", 0)."""
    found = re.fullmatch(r"(.+)_k(\d+)", condition)
    return (found[1], int(found[2])) if found else (condition, 0)


def condition_label(condition: str) -> str:
    """ "what_k3" -> "what, K = 3"."""
    attack, shots = parted(condition)
    return f"{attack}, K = {shots}" if shots else attack


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """Run directories by the name their recipe gives them, or else by their own.

    Raises ConfigError when two share a name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        config = folder / "config.yaml"
        tree: Any = OmegaConf.to_container(OmegaConf.load(config)) if config.is_file() else {}
        name = (tree.get("run") or {}).get("name") or folder.resolve().name
        if name in found:
            raise ConfigError(f"{found[name]} and {folder} are both named {name!r}; set run.name in one of them")
        found[name] = folder
    return found


def read(runs: Mapping[str, Path], suite: str | None = None) -> list[Run]:
    """The runs, in the order given; `suite` may be left out when all of them share exactly one.

    Raises ConfigError when there is no run, or a run was not evaluated on the suite.
    """
    if not runs:
        raise ConfigError("no run to report; give at least one run directory")
    chosen = _suite(runs, suite)
    return [Run(name, Path(d), chosen, _metrics(Path(d) / "evals" / chosen)) for name, d in runs.items()]


def _suite(runs: Mapping[str, Path], suite: str | None) -> str:
    suites = {name: {file.parent.name for file in Path(d).glob("evals/*/metrics.json")} for name, d in runs.items()}
    for name, found in suites.items():
        if not found:
            raise ConfigError(f"{runs[name]}: no evals/SUITE/metrics.json; run `mirage eval` on it first")
        if suite is not None and suite not in found:
            raise ConfigError(f"{runs[name]}: not evaluated on suite {suite!r}; {nearest(suite, sorted(found))}")
    shared = [suite] if suite is not None else sorted(set.intersection(*suites.values()))
    if len(shared) != 1:
        told = "; ".join(f"{name}: {', '.join(sorted(found))}" for name, found in suites.items())
        raise ConfigError(f"the runs share {len(shared)} suites, name one ({told})")
    return shared[0]


def by_hash(ids: Collection[str]) -> list[str]:
    """Ids in the order of their hashes: an arbitrary choice that nobody made."""
    return sorted(ids, key=lambda identity: hashlib.sha256(identity.encode()).hexdigest())


def _metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
