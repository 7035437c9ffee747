"""From answers to the content of `metrics.json`: the judges' verdicts, and every rate computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from sys import intern
from typing import Any, cast

from mirage_dist import config as configs
from mirage_dist.evals import judges, manifest, metrics
from mirage_dist.evals import results as formats
from mirage_dist.evals.judges import Judge, Opinion
from mirage_dist.evals.judges.errors import correction
from mirage_dist.evals.judges.errors.correction import Labelled
from mirage_dist.evals.judges.errors.labels import Matched
from mirage_dist.evals.metrics import Judged
from mirage_dist.evals.results import Entry, JudgeResult, Measures, SuiteResult, Verdict, of_set
from mirage_dist.evals.sharing.claims import Claims
from mirage_dist.evals.sharing.files import Row
from mirage_dist.evals.worklist import WorkList
from mirage_dist.schema import EvalRecipe

RATES = ("asr", "rr", "ir", "utility")  # of an entry, by condition; locality has one condition only


def judge(
    recipe: EvalRecipe,
    suite: Path,
    model_hash: str,
    panel: Sequence[Judge],
    work: WorkList,
    rows: Sequence[Row],
    claims: Claims,
    labels: Matched | None = None,
) -> SuiteResult:
    """Judge every row that is not judged yet and compute the suite's result.

    rows: one for each question of the work list, in its order. claims: this worker's, who holds `judging`. The first
    judge of the panel gives the headline. labels: human ones of some of the rows.
    Raises ConfigError for labels of other answers, what `judges.judged` raises and, when every judge has judged,
    RunError for one without verdicts.
    """
    known: list[Verdict | None] = [] if labels is None else labels.of(rows)
    opinions = {judge.name: judges.judged(suite, judge, rows, claims) for judge in panel}
    for own in panel:
        judges.require_verdicts(own, opinions[own.name])
    results = {judge.name: _by_judge(recipe, judge, work, rows, opinions[judge.name], known) for judge in panel}
    # Benchmarks are scored against their own answers, whichever judge gives the headline.
    entries = [result["entry"] for result in results.values()]
    scored = next((r["entry"] for r in results.values() if r["kind"] == "benchmark"), {})
    if "accuracy" in scored:
        for entry in entries:
            entry["accuracy"] = scored["accuracy"]
    verdicts: dict[str, list[Verdict]] = {name: [o.verdict for o in own] for name, own in opinions.items()}
    result: SuiteResult = {
        "model_hash": model_hash,
        "suite": recipe.suite,
        "seed": recipe.seed,
        "recipe_hash": manifest.recipe_hash(recipe),
        "world": None if recipe.world is None else configs.to_dict(recipe.world),
        "sets": {
            name: {
                "kind": recipe.sets[name].kind,
                "samples": work.samples(name),
                "attacks": {a.name: formats.info(a) for a in applied},
            }
            for name, applied in work.attacks.items()
        },
        "headline": panel[0].name,
        "judges": results,
        "agreement": judges.compare(panel, rows, verdicts, known),
    }
    if labels is not None:
        result["labels"] = labels.info
    if caution := formats.caution(result):
        result["caution"] = caution
    return result


def _judged(row: Row, opinion: Opinion) -> Judged:
    """A suite may have a million of them: words that many rows share are kept once."""
    place = intern(row["set"]), intern(row["id"]), intern(row["attack"]), row["shot"]
    return Judged(*place, opinion.verdict, intern(row["category"]), opinion.detail.get("score"), row.get("turns", 0))


def _by_judge(
    recipe: EvalRecipe,
    judge: Judge,
    work: WorkList,
    rows: Sequence[Row],
    opinions: Sequence[Opinion],
    labels: Sequence[Verdict | None],
) -> JudgeResult:
    judged = [_judged(row, opinion) for row, opinion in zip(rows, opinions, strict=True)]
    measured, categories, paired, counts, corrected = {}, {}, {}, {}, {}
    for name, attacks in work.attacks.items():
        kind, own = recipe.sets[name].kind, [j for j in judged if j.set == name]
        measured[name] = metrics.measure(kind, own, attacks, judge.verdicts)
        categories[name] = metrics.by_category(kind, own, attacks, judge.verdicts)
        paired[name] = metrics.paired(kind, own, attacks, judge.verdicts)
        counts[name] = metrics.counts(own)
        if labels:
            labelled: Labelled = [pair for pair in zip(judged, labels, strict=True) if pair[0].set == name]
            corrected[name] = correction.corrected(measured[name], labelled)
    result: JudgeResult = {
        "kind": judge.kind,
        "about": judge.about,
        "entry": _entry(recipe, measured),
        "sets": measured,
        "categories": categories,
        "paired": paired,
        "verdicts": counts,
        "unjudged": judges.unjudged(opinions),
    }
    if labels:
        result["corrected"] = corrected
    if scores := judge.figures(rows, opinions):
        result["scores"] = scores
    return result


def _entry(recipe: EvalRecipe, measured: Mapping[str, Measures]) -> Entry:
    """The headline figures, and those of every further set of a kind. measured: by set."""
    entry: dict[str, Any] = dict.fromkeys((*RATES, "locality"))
    kinds = {name: recipe.sets[name].kind for name in measured}
    seen: set[str] = set()
    for name, measures in measured.items():
        own = {m: rate for m, rate in measures.items() if m in entry} if kinds[name] != "utility" else {}
        entry |= {of_set(m, name): rate for m, rate in own.items()} if kinds[name] in seen else own
        seen.add(kinds[name])
    if benchmarks := [name for name, kind in kinds.items() if kind == "utility"]:
        entry["accuracy"] = {name: measured[name].get("accuracy", {})["clean"] for name in benchmarks}
    return cast(Entry, entry)
