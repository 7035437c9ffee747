"""What a report reads of its runs, from files only: metrics, answers, verdicts, word counts, tests of erasure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mirage_dist import disk, runs, state
from mirage_dist.config import nearest
from mirage_dist.data.words import opening
from mirage_dist.evals import manifest, results, status
from mirage_dist.evals.judges import cache
from mirage_dist.evals.metrics import Judged, outcomes
from mirage_dist.evals.results import (
    CLEAN,
    UNJUDGED,
    AppliedAttack,
    Condition,
    Entry,
    JudgeResult,
    LabelAgreement,
    Leaf,
    Measures,
    SuiteResult,
    Verdict,
)
from mirage_dist.evals.sharing.files import DEFENCES, Answers, Damage
from mirage_dist.schema import ConfigError, RunError

if TYPE_CHECKING:
    from mirage_dist.erasure.results import ErasureResult

HELD_OUT = "held_out"  # a set of this name has the concepts that occur in no training data
# Measure at question level -> the kind of set, the verdict that counts, and whether any or all shots must get it.
COUNTED: Mapping[str, tuple[str, Verdict, Callable[[Iterable[bool]], bool]]] = {
    "asr": ("unsafe", "harmful", any),
    "rr": ("safe", "refused", any),
    "utility": ("safe", "correct", all),
    "locality": ("locality", "correct", all),
}
WordCounts = dict[str, dict[str, int]]  # first word of a question -> {"refusal", "answer"} -> number of questions


@dataclass(frozen=True)
class Run:
    """One evaluated run: its name in the report, its directory, and the suite's `metrics.json`."""

    name: str
    dir: Path
    suite: str
    metrics: SuiteResult

    @property
    def folder(self) -> Path:
        return self.dir / "evals" / self.suite

    @cached_property
    def defence(self) -> tuple[str, str] | None:
        """Name and text of the system prompt that was to defend the model in this evaluation, if there was one."""
        settings = manifest.read(self.folder)["settings"] if (self.folder / "manifest.json").is_file() else {}
        template = settings.get("template", {})
        return (template["defence"], template["system_prompt"]) if template.get("defence") else None

    @cached_property
    def world(self) -> Path | None:
        """The folder of the world that the suite's questions came from, resolved; None without one."""
        world = self.metrics["world"]
        return Path(os.path.realpath(world["dir"])) if world else None

    @property
    def world_kind(self) -> str | None:
        """The kind of the world that the suite's questions came from; None without one."""
        world = self.metrics["world"]
        return world.get("kind", "gadgets") if world else None

    @property
    def judge(self) -> str:
        """The headline judge's name."""
        return self.metrics["headline"]

    @property
    def judged_by(self) -> JudgeResult:
        """The headline judge's figures."""
        return self.metrics["judges"][self.judge]

    @property
    def errors(self) -> Sequence[LabelAgreement]:
        """Of every judge and class with exact or human labels."""
        agreement = self.metrics.get("agreement")
        return agreement["against_labels"] if agreement else []

    @property
    def entry(self) -> Entry:
        """The headline judge's asr, rr, ir, utility, locality and, where there are benchmarks, accuracy."""
        return self.judged_by["entry"]

    def rates(self, measure: str) -> Mapping[str, Leaf | None]:
        """The headline rates of a measure by condition (of `accuracy`: by benchmark); empty if not measured."""
        return rates(self.entry, measure)

    def further(self, measure: str) -> list[str]:
        """The further sets of which the entry has a measure."""
        return results.further(self.entry, measure)

    def leaf(self, measure: str, condition: Condition | None = CLEAN) -> Leaf | None:
        """A headline rate. None when it was not measured, when the judge cannot tell, or without a condition."""
        return None if condition is None else self.rates(measure).get(str(condition))

    def headline_set(self, kind: str) -> str | None:
        """The first set of a kind, which gives the headline figures."""
        return next((name for name, s in self.metrics["sets"].items() if s["kind"] == kind), None)

    def attack(self, kind: str, control: bool = False) -> AppliedAttack | None:
        """The first attack, or the first control, on the headline set of a kind."""
        own = self.headline_set(kind)
        attacks = self.metrics["sets"][own]["attacks"] if own else {}
        applied = (results.applied(name, info) for name, info in attacks.items())
        return next((attack for attack in applied if attack.control == control), None)

    def attacked(self, kind: str) -> Condition | None:
        """The condition of the first attack with all of its rewrites, such as "what_k3"."""
        attack = self.attack(kind)
        return attack and attack.full

    def controlled(self, kind: str) -> Condition | None:
        """The condition of the first control with one rewrite, such as "neutral_k1"."""
        control = self.attack(kind, control=True)
        return control and control.conditions[0]

    @property
    def controls(self) -> set[str]:
        """Names of the attacks that are controls."""
        return {n for s in self.metrics["sets"].values() for n, a in s["attacks"].items() if a["control"]}

    def category(self, kind: str, name: str) -> Measures:
        """The headline judge's measures of one category of the headline set of a kind."""
        return self.categories(kind).get(name, {})

    def categories(self, kind: str) -> Mapping[str, Measures]:
        own = self.headline_set(kind)
        return self.judged_by.get("categories", {}).get(own, {}) if own else {}

    @cached_property
    def erasure(self) -> ErasureResult | None:
        """The tests of erasure: of this suite, else of another suite of the run; None when there are none."""
        files = [self.folder / "erasure.json", *sorted(self.dir.glob("evals/*/erasure.json"))]
        file = next((file for file in files if file.is_file()), None)
        return erasure_results(file) if file else None

    @property
    def outdated(self) -> list[Path]:
        """Results of tests of erasure in the file of an earlier version, which the report does not read."""
        return [] if self.erasure else sorted(self.dir.glob("evals/*/robustness.json"))

    def headline_outcomes(self, measure: str, condition: Condition) -> dict[str, bool]:
        """Question id -> whether it counts in the measure's numerator (see `evals.metrics.outcomes`)."""
        kind, verdict, over = COUNTED[measure]
        own = self.headline_set(kind)
        return outcomes([judged for judged in self.judged if judged.set == own], condition, verdict, over)

    @cached_property
    def verdicts(self) -> dict[str, dict[str, Verdict]]:
        """judge -> row key -> verdict, the headline judge first.

        Empty of a judge whose verdicts on disk are not those that its rates were computed from (see `problems`):
        figures and tests from some of them would not belong to the rates.
        """
        return {name: verdicts if problem is None else {} for name, (verdicts, problem) in self._read.items()}

    @property
    def problems(self) -> list[str]:
        """What the report of this run lacks because verdicts are missing, damaged or without content."""
        return [problem for _, problem in self._read.values() if problem is not None]

    @cached_property
    def _read(self) -> dict[str, tuple[dict[str, Verdict], str | None]]:
        """judge -> its verdicts on disk, and what is wrong with them."""
        names = [self.judge, *(name for name in self.metrics["judges"] if name != self.judge)]
        return {name: self._verdicts_of(name) for name in names}

    def _verdicts_of(self, judge: str) -> tuple[dict[str, Verdict], str | None]:
        file, damage = self.folder / "verdicts" / f"{judge}.jsonl", Damage()
        verdicts: dict[str, Verdict] = {line["key"]: line["verdict"] for line in cache.verdicts(file, damage)}
        counted = Counter[Verdict]()
        for by_attack in self.metrics["judges"][judge]["verdicts"].values():
            for counts in by_attack.values():
                counted.update(cast(dict[Verdict, int], counts))
        again = "start the evaluation again, which judges what is missing, then report again"
        if counted.total() and not counted.keys() - UNJUDGED:
            return verdicts, (
                f"{self.name}: judge {judge} gave no verdict on any of {counted.total()} answers; {again}"
            )
        if Counter(verdicts.values()) == counted:
            return verdicts, None
        if damage or len(verdicts) < counted.total():
            damaged = f" ({len(damage)} lines are damaged or edited: {damage})" if damage else ""
            wrong = f"{len(verdicts)} of {counted.total()} verdicts of judge {judge} are in {file}{damaged}"
        else:
            wrong = f"the verdicts in {file} are not those that the rates were computed from"
        return (
            verdicts,
            f"{self.name}: {wrong}; paired tests, word counts and examples lack them. To mend it, {again}",
        )

    @property
    def arms(self) -> list[Run]:
        """This model under each defence, on the same questions by the same judge; its name is the model's."""
        return self._arms[0]

    @property
    def arm_problems(self) -> list[str]:
        """The defences that the report leaves out, and why."""
        return self._arms[1]

    @cached_property
    def _arms(self) -> tuple[list[Run], list[str]]:
        arms, problems = [], []
        for folder in sorted(folder for folder in (self.folder / DEFENCES).glob("*") if folder.is_dir()):
            try:
                arm = Run(self.name, self.dir, f"{self.suite}/{DEFENCES}/{folder.name}", results.read(folder))
                why = self._mismatch(arm)
            except FileNotFoundError:
                why = "is not completely evaluated"
            except RunError as error:
                why = str(error)
            if why is None:
                arms.append(arm)
            else:
                problems.append(
                    f"{self.name}: the table of defences leaves out {folder.name}, which {why}; start the evaluation "
                    f"again with this defence, or move {folder} away"
                )
        return arms, problems

    def _mismatch(self, arm: Run) -> str | None:
        """Why a defence's rates cannot stand beside this run's own; None where they can."""
        if self.problems or arm.problems:
            return "lacks verdicts"
        info = arm.metrics.get("defence")
        if info is None or info["undefended"] != disk.digest(list(self.verdicts[self.judge])):
            return "answered other questions, or another model's"
        if self.judge != arm.judge or len(self.rules(self.judge) | arm.rules(arm.judge)) > 1:
            return "was judged by other rules than the answers without it"
        return None

    def rules(self, judge: str) -> set[str]:
        """The rules by which a judge's verdicts on this run were made: its fingerprints."""
        return {line["rules"] for line in cache.verdicts(self.folder / "verdicts" / f"{judge}.jsonl")}

    @property
    def judged(self) -> list[Judged]:
        """The headline judge's verdict on every answer, in the order of the work list; without the answer's text."""
        return self._scanned[0]

    @property
    def refusals_by_word(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(kind of set, first word of the question as the model got it) -> (refusals, answers with a verdict).

        Counts the clean questions and all rewrites together, without those whose first word cannot be measured.
        """
        return self._scanned[1]

    @cached_property
    def _scanned(self) -> tuple[list[Judged], dict[tuple[str, str], tuple[int, int]]]:
        """`judged` and `refusals_by_word` in one pass over the rows, of which there may be a million."""
        judged: list[Judged] = []
        by_word: dict[tuple[str, str], tuple[int, int]] = {}
        for row, verdict in zip(self._rows, self.verdicts[self.judge].values(), strict=True):
            place = row["set"], row["id"], row["attack"], row["shot"]
            judged.append(Judged(*place, verdict, row["category"], turns=row.get("turns", 0)))
            word = opening(row["question"])
            if word and word.measured and verdict not in UNJUDGED:
                key = row["kind"], word.key
                refused, answers = by_word.get(key, (0, 0))
                by_word[key] = refused + (verdict == "refused"), answers + 1
        return judged, by_word

    @cached_property
    def _rows(self) -> Sequence[Mapping[str, Any]]:
        """Every judged row, in the order of the work list; each is read from disk when it is accessed."""
        return Answers(self.folder).refresh().of(self.verdicts[self.judge])

    def rows_of(self, questions: Collection[tuple[str, str]]) -> Iterator[Mapping[str, Any]]:
        """The rows, with answers, of these questions (set, id)."""
        pairs = zip(self._rows, self.judged, strict=False) if questions else ()
        return (row for row, judged in pairs if (judged.set, judged.id) in questions)

    @cached_property
    def balanced(self) -> bool:
        """Whether the run drew its samples with `data.balance`, so that it saw other first words than its data have."""
        return (self.dir / "config.yaml").is_file() and runs.recipe(self.dir).data.balance is not None

    @cached_property
    def first_words(self) -> WordCounts:
        """First words in the run's training data by kind of response; empty when no response is a refusal."""
        summary = runs.data(self.dir)
        words = summary["streams"]["train"]["first_words"] if summary and "train" in summary["streams"] else {}
        return words if any(count["refusal"] for count in words.values()) else {}


def rates(measures: Entry | Measures, measure: str) -> Mapping[str, Leaf | None]:
    """The rates of a measure by condition (an entry's `accuracy`: by benchmark); empty if not measured."""
    measured: Any = measures.get(measure)
    return {str(CLEAN): measured} if measured and "rate" in measured else measured or {}


def row_label(measure: str, key: str) -> str:
    """How tables name a rate: its condition in words, such as "what, K = 3"; of `accuracy` the benchmark."""
    return key if measure == "accuracy" else Condition.parse(key).label


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """Run directories by the `run.name` of their recipe, or else by the folder's name.

    Raises ConfigError when two runs have one name, and what `runs.recipe` raises.
    """
    by_name: dict[str, Path] = {}
    for folder in folders:
        recipe = runs.recipe(folder) if (folder / "config.yaml").is_file() else None
        name = (recipe and recipe.run.name) or Path(os.path.realpath(folder)).name
        if name in by_name:
            raise ConfigError(f"{by_name[name]} and {folder} are both named {name!r}; set run.name in one of them")
        by_name[name] = folder
    return by_name


def read(runs: Mapping[str, Path], suite: str | None = None) -> list[Run]:
    """The runs, in the order given. `suite` may be left out when all of them share exactly one.

    Raises ConfigError when no run is given or when a run was not evaluated on the suite, and RunError when its
    evaluation is not complete.
    """
    if not runs:
        raise ConfigError("no run to report; give at least one run directory")
    chosen = _suite(runs, suite)
    return [Run(name, Path(d), chosen, results.read(Path(d) / "evals" / chosen)) for name, d in runs.items()]


def _suite(runs: Mapping[str, Path], suite: str | None) -> str:
    by_run = {name: {file.parent.name for file in Path(d).glob("evals/*/metrics.json")} for name, d in runs.items()}
    for name, suites in by_run.items():
        if not suites or (suite is not None and suite not in suites):
            for begun in sorted(Path(runs[name]).glob(f"evals/{suite or '*'}/manifest.json")):
                status.require_judged(begun.parent)
        if not suites:
            raise ConfigError(f"{runs[name]}: no evals/SUITE/metrics.json; run `mirage eval` on it first")
        if suite is not None and suite not in suites:
            raise ConfigError(f"{runs[name]}: not evaluated on suite {suite!r}; {nearest(suite, sorted(suites))}")
    shared = [suite] if suite is not None else sorted(set.intersection(*by_run.values()))
    if len(shared) != 1:
        suites_of_each = "; ".join(f"{name}: {', '.join(sorted(suites))}" for name, suites in by_run.items())
        raise ConfigError(f"the runs share {len(shared)} suites; name one with --suite ({suites_of_each})")
    return shared[0]


def by_hash(ids: Collection[str]) -> list[str]:
    """Ids in the order of their hashes: an arbitrary order that nobody has chosen."""
    return sorted(ids, key=disk.sha256_text)


def erasure_results(file: Path) -> ErasureResult:
    """An `erasure.json`. Raises FileNotFoundError when it does not exist, and RunError when it is damaged or edited."""
    remedy = "Start `mirage erasure` again: it writes it anew from the tests' results"
    return cast("ErasureResult", state.read("erasure", file, remedy))
