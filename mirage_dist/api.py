"""The package from Python, as in a notebook: `train`, `evaluate`, `report` and `audit`, and what they return.

    run = mirage_dist.train("configs/train/npo.yaml", {"model.path": "models/mine", "run.dir": "runs/mine"}, ranks=8)
    suite = mirage_dist.evaluate("configs/eval/vlguard.yaml", {"run.dir": run.folder})
    print(mirage_dist.report([run]).table)

They do what the command `mirage` does, on the same files: the same call does what is missing, and the command can go on
where a call stopped. A recipe is a file, found as the command finds it; a mapping of the same form, in which `include`
names files to begin with; or the dataclass that `mirage_dist.config.load` returns. Overrides are a mapping of dotted
keys, {"train.lr": 5e-7}, or the command's words, ["train.lr=5e-7"].

`train` and `evaluate` start processes on this machine and wait for them. DeepSpeed's process group, W&B, the memory of
GPUs, and signal handlers, which only a main thread can have, then never belong to the calling process: calls can follow
each other in one notebook. An interrupt stops the processes in order; they also stop when the calling process ends.
They import a recipe's `module:Class` themselves, from the Python path or the working directory, so a changed file
counts at the next call. A class of a notebook's cell does not exist there: write the cell to a file with %%writefile.

Errors: ConfigError for what is wrong in a recipe, an option or data, RunError for what failed on the way, and
`mirage_dist.signals.StopRequested` where the processes were stopped from outside. None of them ends this process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mirage_dist import config as configs
from mirage_dist import launching
from mirage_dist.ranks import place
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, TrainRecipe
from mirage_dist.schema.limits import LOCAL
from mirage_dist.schema.names import shown
from mirage_dist.schema.texts import texts

if TYPE_CHECKING:
    from mirage_dist.data.audit import Audit
    from mirage_dist.data.audit.corpus import Value
    from mirage_dist.evals.results import Entry, Leaf, SuiteResult
    from mirage_dist.report import Summary
    from mirage_dist.report.compare import Comparison

File = str | os.PathLike[str]
Overrides = Mapping[str, Any] | Sequence[str]
Log = Callable[[str], None] | None
R = TypeVar("R", TrainRecipe, EvalRecipe)


@dataclass(frozen=True)
class TrainResult:
    """A finished training run.

    folder: the run's directory. export: the model as a Hugging Face directory, None with `train.export: off`. losses:
    of every step, also of earlier starts; None where it was not finite. terms: the objective's, by name, likewise.
    metrics: the lines of metrics.jsonl (see `train.measures.records.Record`). recipe: as it was resolved.
    """

    folder: Path
    export: Path | None
    losses: tuple[float | None, ...] = field(repr=False)
    terms: Mapping[str, tuple[float | None, ...]] = field(repr=False)
    metrics: tuple[Mapping[str, Any], ...] = field(repr=False)
    recipe: TrainRecipe = field(repr=False)

    @property
    def steps(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class Rate:
    """One rate of a model, by the suite's first judge.

    measure: asr (attack success), rr (rejection), ir (irrelevant answers), utility, locality or accuracy; of a further
    set of that kind with the set's name, such as asr_held_out. condition: "clean", or an attack with its number of
    rewrites, such as "what_k3"; of accuracy the benchmark. rate: k / n, from 0 to 1. low, high: its 95 % interval.
    unjudged: answers that have no verdict, which n leaves out.
    """

    measure: str
    condition: str
    rate: float
    low: float
    high: float
    k: float
    n: int
    unjudged: int = 0

    def __str__(self) -> str:
        """In percent, as in "asr, what_k3: 71.9 % [66.1, 77.0] (184 of 256)"."""
        rate, low, high = (f"{100 * share:.1f}" for share in (self.rate, self.low, self.high))
        unjudged = f", {self.unjudged} without a verdict" if self.unjudged else ""
        return f"{self.measure}, {self.condition}: {rate} % [{low}, {high}] ({self.k:g} of {self.n}{unjudged})"


@dataclass(frozen=True)
class EvalResult:
    """A suite of which every question is answered and judged.

    folder: the run's directory, suite: the folder of its answers, verdicts and rates. judge: the one whose rates
    these are, the first of the recipe. caution: what to know before relying on them, if anything. metrics: the content
    of metrics.json, with every judge's rates by set, attack and category.
    """

    folder: Path
    suite: Path
    judge: str
    rates: tuple[Rate, ...] = field(repr=False)
    caution: str | None
    metrics: SuiteResult = field(repr=False)
    recipe: EvalRecipe = field(repr=False)

    def rate(self, measure: str, condition: str = "clean") -> Rate:
        """One of `rates`. Raises ConfigError for one that was not measured, naming those that were."""
        known = {(rate.measure, rate.condition): rate for rate in self.rates}
        if (measure, condition) not in known:
            listed = ", ".join(f"{name} ({case})" for name, case in known)
            raise ConfigError(f"{self.suite}: no rate {measure} ({condition}); measured: {listed}")
        return known[measure, condition]


@dataclass(frozen=True)
class ReportResult:
    """A report that was written.

    folder: of its files, page: index.html. table: the headline rates as text. rates: of each model, as in
    `EvalResult`. comparisons: paired tests between every two models. cautions: what a reader must know first.
    summary: the content of summary.json. runs: model -> its directory.
    """

    folder: Path
    table: str = field(repr=False)
    rates: Mapping[str, tuple[Rate, ...]] = field(repr=False)
    comparisons: tuple[Comparison, ...] = field(repr=False)
    cautions: tuple[str, ...]
    summary: Summary = field(repr=False)
    runs: Mapping[str, Path]

    @property
    def page(self) -> Path:
        return self.folder / "index.html"

    def figure(self, file: File) -> Path:
        """Write the main figures (attack success, rejection, correct answers) as one PNG; returns its path."""
        from mirage_dist.report import overview

        overview(self.runs, path := Path(file), self.summary["suite"])
        return path


@dataclass(frozen=True)
class Cue:
    """How well one property of a question, such as its first word, predicts whether it is refused.

    accuracy: balanced, of a guess from it alone, from 0 to 1 (chance: 0.5); low, high: its 95 % interval. values: each
    with its counts, its odds ratio and its corrected p.
    """

    name: str
    accuracy: float
    low: float
    high: float
    values: tuple[Value, ...] = field(repr=False)


@dataclass(frozen=True)
class AuditResult:
    """The findings of an audit of training data.

    passed: whether first words predict refusals no better than the limit; False where too few pairs could be `measured`
    to know. verdict: one line that says why. words: kind of response ("refused", "answered") -> first words tied to it,
    strongest first. warnings: what may make the counts wrong. table: all of it as text. files: what was written to
    `out`. details: the content of audit.json.
    """

    passed: bool
    measured: bool
    verdict: str
    words: Mapping[str, tuple[str, ...]]
    cues: tuple[Cue, ...]
    warnings: tuple[str, ...]
    table: str = field(repr=False)
    files: tuple[Path, ...]
    details: Audit = field(repr=False)


# -------------------------------------------------------------------------------------------------------- verbs


def train(
    recipe: File | Mapping[str, Any] | TrainRecipe, overrides: Overrides = (), ranks: int = 1, log: Log = print
) -> TrainResult:
    """`mirage train RECIPE … --ranks N`: train to the end on this machine, from the newest checkpoint if there is one.

    ranks: processes, one a GPU where there are as many, otherwise on the CPU. log: takes each line of the run's log;
    None: none is shown.
    Raises ConfigError for a wrong recipe, a model or data that it cannot take, and in a process that is itself one of
    several ranks; RunError when the run fails; StopRequested when it was stopped. Committed checkpoints are kept, and
    the same call resumes.
    """
    own = _resolved(recipe, overrides, TrainRecipe)
    if own.train.dry_run:
        raise ConfigError("train.dry_run: trains nothing that could be returned; use `mirage train`")
    if (size := place()[2]) > 1:
        raise ConfigError(f"train starts processes, and this one is already one of {size}; use `mirage train`")
    _check_count("ranks", ranks)
    with _on_disk(recipe, overrides, own) as (file, words):
        launching.train(ranks, file, words, log or (lambda line: None))
    from mirage_dist.train.measures.records import records

    folder = Path(own.run.dir)
    metrics = tuple(record for _, record in records(folder / "metrics.jsonl"))
    names = dict.fromkeys(name for record in metrics for name in record["terms"])
    return TrainResult(
        folder,
        export if (export := folder / "export").is_dir() else None,
        tuple(record["loss"] for record in metrics),
        {name: tuple(record["terms"].get(name) for record in metrics) for name in names},
        metrics,
        own,
    )


def evaluate(
    recipe: File | Mapping[str, Any] | EvalRecipe, overrides: Overrides = (), workers: int = 1, log: Log = print
) -> EvalResult:
    """`mirage eval RECIPE … --workers N`: ask a model every question of a suite, judge, and compute the rates.

    workers: processes, of which each takes one of the machine's GPUs in turn, or `generation.tensor_parallel` of them;
    answers that are on disk are not asked for again. log: as of `train`.
    Raises ConfigError for a wrong recipe, and for one that follows a run; RunError when a worker fails; StopRequested
    when they were stopped. Every answer so far is kept, and the same call does what is missing.
    """
    own = _resolved(recipe, overrides, EvalRecipe)
    if own.follow is not None:
        raise ConfigError(f"follow={own.follow}: evaluates until that run ends; use `mirage eval`")
    _check_count("workers", workers)
    from mirage_dist.evals import pool, results
    from mirage_dist.evals.sharing.files import suite_dir

    with _on_disk(recipe, overrides, own) as (file, words):
        pool.run(file, words, workers, own.generation.tensor_parallel, log or (lambda line: None))
    suite = suite_dir(own)
    try:
        result = results.read(suite)
    except FileNotFoundError:
        raise RunError(f"{suite}: no rates yet: a worker was stopped, or another process judges; call again") from None
    judge = result["headline"]
    rates = _rates(result["judges"][judge]["entry"])
    return EvalResult(Path(own.run.dir), suite, judge, rates, results.caution(result), result, own)


def report(
    runs: File | TrainResult | EvalResult | Sequence[File | TrainResult | EvalResult] | Mapping[str, File],
    out: File | None = None,
    suite: str | None = None,
    outputs: bool = False,
) -> ReportResult:
    """`mirage report RUN…`: tables, figures and one static page over evaluated runs.

    runs: directories, or results of `train` or `evaluate`, named by the `run.name` of their recipes; or a mapping of
    names to directories. out: default: `report` in the first run. suite: which one, where the runs share several.
    outputs: include model outputs on real data in the page.
    Raises ConfigError when a run was not evaluated, RunError when answers are missing, or verdicts (the report is then
    written, and its head says what it lacks).
    """
    import mirage_dist.report as reports

    if isinstance(runs, Mapping):
        by_name = {str(name): Path(folder) for name, folder in runs.items()}
    else:
        several = [runs] if isinstance(runs, str | os.PathLike | TrainResult | EvalResult) else list(runs)
        folders = [run.folder if isinstance(run, TrainResult | EvalResult) else Path(run) for run in several]
        by_name = reports.named(list(dict.fromkeys(folders)))
    folder = Path(out) if out is not None else next(iter(by_name.values()), Path()) / "report"
    summary = reports.report(by_name, folder, suite=suite, outputs=outputs)
    reports.require_whole(summary)
    return ReportResult(
        folder=folder,
        table=reports.table(summary),
        rates={name: _rates(entry) for name, entry in summary["models"].items()},
        comparisons=tuple(summary["comparisons"]),
        cautions=tuple(summary["cautions"]),
        summary=summary,
        runs=by_name,
    )


def audit(
    data: File | Sequence[File],
    out: File | None = None,
    *,
    format: str | None = None,
    response_kind: str = "list",
    refusals: File | None = None,
    ngrams: int = 1,
    length: bool = False,
    image_roots: bool = False,
    on_bad_record: str = "error",
    config: str | None = None,
    split: str | None = None,
) -> AuditResult:
    """`mirage audit DATA…`: which words of a question give away whether training data refuse it.

    data: files, folders of data sets, or hf://OWNER/NAME. out: a directory for audit.json, audit.svg and audit.png.
    The other arguments are the command's options (docs/audit.md). Trains and asks no model.
    Raises ConfigError for bad data, an unknown format and a wrong option.
    """
    from mirage_dist.data import audit as audits
    from mirage_dist.report import audit as page

    if on_bad_record not in ("error", "skip"):
        raise ConfigError(f"on_bad_record={on_bad_record!r}; allowed: error, skip")
    paths = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not paths:
        raise ConfigError("no data to audit; give at least one file")
    phrases = None if refusals is None else os.fspath(refusals)
    options = audits.Options(response_kind, ngrams, length, image_roots, phrases)
    result = audits.audit([os.fspath(path) for path in paths], options, format, on_bad_record, config, split)
    cues = [(name, cue["balanced_accuracy"], cue["values"]) for name, cue in result["cues"].items()]
    return AuditResult(
        passed=result["verdict"]["passed"],
        measured=result["verdict"]["measured"],
        verdict=result["verdict"]["text"],
        words={kind: tuple(words) for kind, words in result["words"].items()},
        cues=tuple(
            Cue(name, own["value"], own["ci95"][0], own["ci95"][1], tuple(values)) for name, own, values in cues
        ),
        warnings=tuple(result["warnings"]),
        table=page.table(result),
        files=() if out is None else tuple(page.write(result, Path(out))),
        details=result,
    )


# ------------------------------------------------------------------------------------------------------ recipes


def _resolved(recipe: File | Mapping[str, Any] | R, overrides: Overrides, schema: type[R]) -> R:
    """The recipe with its overrides, checked. Raises ConfigError."""
    if isinstance(recipe, schema):
        source: File | Mapping[str, Any] = configs.literal(configs.to_dict(recipe))
    elif isinstance(recipe, str | os.PathLike | Mapping):
        source = recipe
    else:
        raise ConfigError(f"a {type(recipe).__name__} is no recipe here; give a file, a mapping or a {schema.__name__}")
    own = configs.load(Path(source) if isinstance(source, os.PathLike) else source, _words(overrides), schema)
    for key, text in texts(configs.to_dict(own), keys=False):
        if text.startswith("__main__:"):
            name = text.partition(":")[2]
            raise ConfigError(
                f"{key}={text}: the processes that this call starts cannot see a class of the notebook or script "
                f"itself; write it to a file, such as my_lab.py, and name it my_lab:{name}"
            )
    return own


def _words(overrides: Overrides) -> list[str]:
    """Overrides as the command line has them. Raises ConfigError for values that a recipe cannot hold."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r}: expected a mapping, or a list of key=value")
    if not isinstance(overrides, Mapping):
        return [str(word) for word in overrides]
    try:
        return [configs.override(key, configs.with_paths_as_text(value)) for key, value in overrides.items()]
    except (TypeError, ValueError) as error:  # json's
        raise ConfigError(f"overrides={shown(dict(overrides))}: a recipe cannot hold this ({error})") from error


@contextmanager
def _on_disk(recipe: object, overrides: Overrides, own: TrainRecipe | EvalRecipe) -> Iterator[tuple[str, list[str]]]:
    """A recipe's file and overrides for a command: as they were given, or a temporary file of one in memory."""
    if isinstance(recipe, str | os.PathLike):
        yield os.fspath(recipe), _words(overrides)
        return
    with tempfile.TemporaryDirectory(prefix="mirage-recipe-") as folder:
        file = Path(folder) / "recipe.yaml"
        configs.write_yaml(own, file)
        yield str(file), []


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, int) or not 1 <= count <= LOCAL.value:
        raise ConfigError(f"{name}={count!r}; expected a whole number from 1 to {LOCAL.value}")


def _rates(entry: Entry) -> tuple[Rate, ...]:
    from mirage_dist.report.load import rates

    leaves = [(measure, *item) for measure in entry for item in rates(entry, measure).items()]
    return tuple(_rate(measure, condition, leaf) for measure, condition, leaf in leaves if leaf is not None)


def _rate(measure: str, condition: str, leaf: Leaf) -> Rate:
    low, high = leaf["ci95"]
    return Rate(measure, condition, leaf["rate"], low, high, leaf["k"], leaf["n"], leaf.get("unjudged", 0))
