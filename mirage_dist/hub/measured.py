"""The evaluations in a run's directory that measured the model of one checkpoint, for its card.

A run's directory may hold evaluations of several checkpoints and of other models. An evaluation belongs to a
checkpoint where it names the checkpoint itself (`model.run`: the hash is that of the checkpoint's manifest), where it
measured the very files that are exported now, or where it measured an export that is unchanged since and whose card
names the checkpoint. Any other is left out, with a line in the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from mirage_dist import disk
from mirage_dist.evals import manifest, results
from mirage_dist.evals.results import CLEAN, Leaf, SuiteResult
from mirage_dist.model import directory
from mirage_dist.model.exports import card
from mirage_dist.model.exports.card import Evaluation, Rate
from mirage_dist.model.shards import MANIFEST
from mirage_dist.progress import ON_STDERR, log
from mirage_dist.report import text
from mirage_dist.report.load import Run, rates
from mirage_dist.schema import ConfigError, RunError

SHOWN = ("asr", "ir", "rr", "utility", "accuracy", "locality")


def evaluations(run: Path, folder: Path, checkpoint: Path) -> list[Evaluation]:
    """Those of the checkpoint's model, by suite. folder: its export. Damaged results are left out with a warning."""
    of_checkpoint, made, listed = disk.sha256(checkpoint / MANIFEST), _Hash(folder), []
    for file in sorted([*run.glob("evals/*/metrics.json"), *run.glob("evals/*/step-*/metrics.json")]):
        try:
            result = results.read(file.parent)
            own = result["model_hash"]
            if own == of_checkpoint or own == made.value or _of_export(file.parent, own, of_checkpoint):
                suite = str(file.parent.relative_to(run / "evals"))
                listed.append(_evaluation(Run(checkpoint.name, run, suite, result)))
            else:
                log.info(
                    f"{file.parent}: measured another model than {checkpoint.name} (hash {own[:12]}…); its rates are "
                    "not in the card",
                    extra=ON_STDERR,
                )
        except RunError as error:
            log.warning(f"{error}. Its rates are not in the card", extra=ON_STDERR)
    return listed


class _Hash:
    """The hash of a model directory, computed when it is first wanted; None of an adapter, which nobody evaluates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def value(self) -> str | None:
        adapter = (self.folder / directory.ADAPTER_CONFIG).is_file()
        return None if adapter else directory.model_hash(self.folder)


def _of_export(suite: Path, model_hash: str, checkpoint_hash: str) -> bool:
    """Whether a suite measured a model directory, unchanged since, whose card names the checkpoint."""
    try:
        path = manifest.read(suite).get("model", {}).get("path") if (suite / "manifest.json").is_file() else None
        if not path or not (Path(path) / card.FILE).is_file():
            return False
        head = card.read((Path(path) / card.FILE).read_text(encoding="utf-8", errors="replace"), path)
        return head.get("checkpoint_hash") == checkpoint_hash and directory.model_hash(Path(path)) == model_hash
    except (ConfigError, RunError, OSError):  # somebody else's card, or files that are gone or damaged
        return False


def _evaluation(run: Run) -> Evaluation:
    result = run.metrics
    cautions = [results.caution(result)]
    if run.defence:
        cautions.append(
            f"Every question came with the defence {run.defence[0]}, a system prompt; the rates are with it."
        )
    return Evaluation(
        result["suite"],
        card.without_places(run.judged_by["about"]),
        result["seed"],
        result["recipe_hash"],
        tuple(_rates(result)),
        tuple(filter(None, cautions)),
    )


def _rates(result: SuiteResult) -> Iterator[Rate]:
    """Of each set, clean and under each attack with all of its rewrites, by the first judge.

    Accuracies are a benchmark's, by its own judge.
    """
    for name, info in result["sets"].items():
        full = [results.applied(title, attack).full for title, attack in info["attacks"].items()]
        for measure in SHOWN:
            judges = [result["headline"]] if measure != "accuracy" else list(result["judges"])
            for judge in judges:
                own = result["judges"][judge]
                by_condition = rates(own["sets"].get(name, {}), measure)
                for condition in (CLEAN, *full):
                    if (leaf := by_condition.get(str(condition))) is not None:
                        yield _rate(name, measure, condition.label, leaf, card.without_places(own["about"]))


def _rate(name: str, measure: str, condition: str, leaf: Leaf, judge: str) -> Rate:
    title, (low, high) = text.MEASURES[measure][0], leaf["ci95"]
    return Rate(
        name, measure, title, condition, leaf["rate"], leaf["k"], leaf["n"], (low, high), judge, leaf.get("unjudged", 0)
    )
