"""`mirage eval CONFIG follow=RUN`: evaluate every checkpoint of a training run as it appears, until the run ends.

    evals/SUITE/step-000100/       a suite whose model is the checkpoint
    evals/SUITE/history.jsonl      one line a step (see `evals.results.HistoryLine`)

Where the run logs to W&B, the rates of each entry are logged to the same W&B run, as eval/… against eval/step. Model
outputs are logged only with `wandb_outputs`: as a table of plain text, with the same questions at every step.
"""

from __future__ import annotations

import heapq
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mirage_dist import disk, signals, state
from mirage_dist.evals import results, runner, tracking
from mirage_dist.evals.judges import cache
from mirage_dist.evals.results import Entry, HistoryLine, SuiteResult
from mirage_dist.evals.sharing import files
from mirage_dist.evals.sharing.files import Answers, Row, suite_dir
from mirage_dist.model.shards import committed, places, step_of
from mirage_dist.monitoring.process import Sender
from mirage_dist.progress import EVERY_RANK, log
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe, RunError
from mirage_dist.signals import StopRequested

POLL_SECONDS = 5.0


def follow(recipe: EvalRecipe, place: tuple[int, int] = (0, 1)) -> None:
    """Evaluate the oldest checkpoint that is not evaluated, again and again; several workers may follow one run.

    place: see `runner.evaluate`. A checkpoint that the run's retention removes before its turn is logged and left out.
    Raises what `evaluate` raises, RunError when the run ends and no checkpoint was evaluated, ConfigError when
    `wandb_outputs` is set and the run does not log to W&B, and StopRequested between two checkpoints after a signal.
    """
    run = Path(str(recipe.follow))
    if recipe.wandb_outputs and tracking.train_recipe(run).monitor.wandb == "off":
        raise ConfigError(f"wandb_outputs={recipe.wandb_outputs}: {run} does not log to W&B (its monitor.wandb is off)")
    trackers: list[Sender] = []
    try:
        _follow(recipe, place, run, trackers)
    finally:
        for tracker in trackers:
            tracking.end(tracker)


def _follow(recipe: EvalRecipe, place: tuple[int, int], run: Path, trackers: list[Sender]) -> None:
    """`follow`. trackers: gets the process that sends results to W&B when there are some, if the run logs to W&B."""
    done, rated, judged_elsewhere = set[int](), set[int](), False
    while True:
        if name := signals.received():
            raise StopRequested(f"eval {recipe.suite}: stopped by {name}; every answer so far is on disk")
        # Before the checkpoints are listed: a run that is over makes no checkpoint that the list could miss.
        over = _over(run)
        steps = [step for c in committed(run / "checkpoints") if (step := step_of(c)) not in done | rated]
        rated.update(step for step in steps if measured(recipe, step))
        waiting = [step for step in steps if step not in rated]
        for tracker in trackers:
            tracker.tick()
        if not waiting:
            if over:
                _require_evaluated(recipe, run, judged_elsewhere)
                break
            time.sleep(POLL_SECONDS)
            continue
        step = waiting[0]
        try:
            result = runner.evaluate(_of_step(recipe, step), place)
        except (ConfigError, OSError):
            if (run / "checkpoints" / f"step-{step:06d}").is_dir():
                raise
            log.info(f"eval {recipe.suite}: step {step} was removed before it was evaluated", extra=EVERY_RANK)
            done.add(step)
            continue
        if result is None:  # another worker judges it
            done.add(step)
            judged_elsewhere = True
            continue
        done.add(step)  # a defence that another worker judges is its business
        write_history(recipe)
        if not trackers and (started := tracking.start(run)) is not None:
            trackers.append(started)
        for tracker in trackers:
            counts, table = _outputs(recipe, step, result)
            tracker.send(
                "log", values={"eval/step": step, **tracking.rates(_entry(result), "eval"), **counts}, table=table
            )


def _require_evaluated(recipe: EvalRecipe, run: Path, elsewhere: bool) -> None:
    """Raise RunError when the run is over and no checkpoint of it was evaluated. elsewhere: a worker judges one."""
    if not elsewhere and not any(suite_dir(recipe).glob("step-*/metrics.json")):
        raise RunError(
            f"eval {recipe.suite}: {run} has ended, and no checkpoint of it was evaluated: it has none, or its "
            "retention removed each before its turn (train.keep_last)"
        )


def write_history(recipe: EvalRecipe) -> None:
    """Write `history.jsonl` from every step that is measured; any worker writes the same content."""
    history = []
    for folder in places(suite_dir(recipe)):
        try:
            result = results.read(folder)
        except FileNotFoundError:
            continue
        except RunError as error:  # of a checkpoint that may no longer exist
            log.warning(f"eval {recipe.suite}: left out of history.jsonl: {error}", extra=EVERY_RANK)
            continue
        line: HistoryLine = {"step": step_of(folder), "judge": result["headline"], "entry": _entry(result)}
        history.append(state.sealed("history", cast(dict[str, Any], line)))
    files.write(suite_dir(recipe) / "history.jsonl", history)


def _of_step(recipe: EvalRecipe, step: int) -> EvalRecipe:
    model = EvalModelConfig(run=recipe.follow, step=step, dtype=recipe.model.dtype)
    return replace(recipe, suite=f"{recipe.suite}/step-{step:06d}", model=model, follow=None, wandb_outputs=0)


def measured(recipe: EvalRecipe, step: int) -> bool:
    """Whether a checkpoint has its rates, under each defence too; a damaged `metrics.json` is named in the log, and
    written again.
    """
    suite = suite_dir(_of_step(recipe, step))
    try:
        for folder in (suite, *(suite / files.DEFENCES / name for name in recipe.defences)):
            results.read(folder)
    except FileNotFoundError:
        return False
    except RunError as error:
        log.info(f"eval {recipe.suite}: {error}", extra=EVERY_RANK)
        return False
    return True


def _over(run: Path) -> bool:
    """Whether no more checkpoints will appear. A run that was stopped on request continues later: it is not over."""
    if not (run / "manifest.json").is_file():
        return False
    exports = tracking.train_recipe(run).train.export != "off"
    return (run / "export").is_dir() if exports else not (run / "owner.json").exists()


def _entry(result: SuiteResult) -> Entry:
    return result["judges"][result["headline"]]["entry"]


COLUMNS = ("set", "attack", "shot", "id", "category", "question", "response")


def _outputs(recipe: EvalRecipe, step: int, result: SuiteResult) -> tuple[dict[str, float], dict[str, Any] | None]:
    """How many answers go to W&B and of how many, and the table of them and their verdicts; nothing where
    `wandb_outputs` is 0.
    """
    if not recipe.wandb_outputs:
        return {}, None
    suite = suite_dir(_of_step(recipe, step))
    lines = cache.verdicts(suite / "verdicts" / f"{result['headline']}.jsonl")
    verdicts = {line["key"]: line["verdict"] for line in lines}
    rows = Answers(suite).refresh().of(verdicts)
    chosen = heapq.nsmallest(recipe.wandb_outputs, rows, key=_by_place)
    log.info(f"eval {recipe.suite}: step {step}: {len(chosen)} of {len(rows)} answers go to W&B", extra=EVERY_RANK)
    data = [[*(str(row[name]) for name in COLUMNS), verdicts[row["key"]]] for row in chosen]
    counts: dict[str, float] = {"eval/outputs_n": len(chosen), "eval/outputs_of": len(rows)}
    return counts, {"columns": [*COLUMNS, "verdict"], "data": data}


def _by_place(row: Row) -> str:
    """An arbitrary order that is the same for every model."""
    return disk.sha256_text(json.dumps([row[name] for name in ("set", "id", "attack", "shot")]))
