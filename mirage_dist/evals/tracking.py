"""Results of evaluations in the W&B run of the training whose model they measure.

An evaluation of a run's checkpoint or export adds its rates to that run's summary, as eval/SUITE/…; one that follows a
run adds a row for each checkpoint (see `evals.follow`). A failure of W&B costs one warning (see `monitoring.process`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mirage_dist import runs
from mirage_dist.evals import runner
from mirage_dist.evals.models import subject
from mirage_dist.evals.results import Entry, SuiteResult
from mirage_dist.monitoring import wandb_run
from mirage_dist.monitoring.process import END_SECONDS, Sender
from mirage_dist.schema import EvalRecipe, TrainRecipe


def evaluate(recipe: EvalRecipe, place: tuple[int, int] = (0, 1)) -> SuiteResult | None:
    """`runner.evaluate`; the worker that judges passes the rates on. Raises what `runner.evaluate` raises."""
    result = runner.evaluate(recipe, place)
    run = subject.trained_in(recipe.model, Path(recipe.run.dir))
    if result is not None and run is not None and (tracker := start(run)) is not None:
        entry = result["judges"][result["headline"]]["entry"]
        tracker.send("summary", values=rates(entry, f"eval/{recipe.suite}"))
        end(tracker)
    return result


def start(run: Path) -> Sender | None:
    """A process that adds to the training run's W&B run; None where the run does not log to W&B."""
    if not logs(run):
        return None
    recipe = train_recipe(run)
    manifest = runs.manifest(run)
    assert manifest is not None  # of a run that logs
    options = wandb_run.options(recipe.monitor, str(run), manifest["wandb_id"], evaluation=True)
    return Sender(recipe.run.name or run.name, "wandb", options, private=True)  # it keeps local copies of answers


def end(tracker: Sender) -> None:
    """Wait for what was sent, for a bounded time."""
    tracker.ending("finished")
    tracker.close(END_SECONDS)


def rates(entry: Entry, prefix: str) -> dict[str, float]:
    """Every rate with its denominator and its 95 % interval, as PREFIX/asr/clean, …_n, …_low and …_high."""
    values: dict[str, float] = {}
    for path, leaf in _leaves(entry, prefix):
        low, high = leaf["ci95"]
        values |= {path: leaf["rate"], f"{path}_n": leaf["n"], f"{path}_low": low, f"{path}_high": high}
    return values


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if "rate" in tree:
        yield path, tree
        return
    for name, part in tree.items():
        if part is not None:
            yield from _leaves(part, f"{path}/{name}")


def logs(run: Path) -> bool:
    """Whether this is the directory of a training run that logs to W&B."""
    return (run / "manifest.json").is_file() and train_recipe(run).monitor.wandb != "off"


def train_recipe(run: Path) -> TrainRecipe:
    return runs.recipe(run)
