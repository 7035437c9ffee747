"""`mirage eval CONFIG follow=RUN`: every checkpoint of a training run, as they come, until the run is finished.

    evals/SUITE/step-000100/       as of any suite; its model is the checkpoint
    evals/SUITE/history.jsonl      one line a step: {"step", "judge", "entry"} (see `evals.runner.evaluate`)

Where the run tells W&B, the rates of `entry` go there too, as eval/… against eval/step. What a model said goes there
only when `wandb_outputs` asks for it: as a table of plain text, the same questions at every step.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist import signals
from mirage_dist.evals import runner
from mirage_dist.evals.sharing.files import Answers, Row, suite_dir, whole_objects, write_atomically
from mirage_dist.model.shards import committed, step_of
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe, TrainRecipe
from mirage_dist.signals import StopRequested

POLL_SECONDS = 5.0


def follow(recipe: EvalRecipe, place: tuple[int, int] = (0, 1)) -> None:
    """Evaluate the oldest checkpoint that is not evaluated, again and again; several workers may follow one run.

    A checkpoint that the run's retention removes before its turn is told of and left out. Raises what `evaluate` does,
    ConfigError when answers are to go to a W&B run that is none, and StopRequested between two checkpoints.
    """
    run, tracker, gone = Path(str(recipe.follow)), None, set[int]()
    if recipe.wandb_outputs and _train_recipe(run).monitor.wandb == "off":
        raise ConfigError(f"wandb_outputs={recipe.wandb_outputs}: {run} does not tell W&B (its monitor.wandb is off)")
    while True:
        if name := signals.received():
            raise StopRequested(f"eval {recipe.suite}: stopped by {name}; every answer so far is on disk")
        # Asked before the look: a run that is over makes no checkpoint that the look could miss.
        over = _over(run)
        left = [step_of(c) for c in committed(run / "checkpoints") if not _metrics(recipe, step_of(c)).is_file()]
        waiting = [step for step in left if step not in gone]
        if not waiting:
            if over:
                break
            time.sleep(POLL_SECONDS)
            continue
        try:
            result = runner.evaluate(_of_step(recipe, waiting[0]), place)
        except (ConfigError, OSError):
            if (run / "checkpoints" / f"step-{waiting[0]:06d}").is_dir():
                raise
            print(f"eval {recipe.suite}: step {waiting[0]} was removed before it was evaluated", flush=True)
            gone.add(waiting[0])
            continue
        if result is None:  # another worker judges it
            gone.add(waiting[0])
            continue
        write_history(recipe)
        tracker = tracker or _tracker(run)
        if tracker is not None:
            told = {"eval/step": waiting[0], **_rates(_entry(result))}
            with _private():
                tracker.log({**told, **_outputs(recipe, waiting[0], result)})
    if tracker is not None:
        tracker.finish()


def write_history(recipe: EvalRecipe) -> None:
    """All that is measured, by step; the same whoever writes it last."""
    lines = []
    for file in sorted(suite_dir(recipe).glob("step-*/metrics.json"), key=lambda file: step_of(file.parent)):
        result = json.loads(file.read_text(encoding="utf-8"))
        told = {"step": step_of(file.parent), "judge": result["headline"], "entry": _entry(result)}
        lines.append(json.dumps(told) + "\n")
    write_atomically(suite_dir(recipe) / "history.jsonl", "".join(lines))


def _of_step(recipe: EvalRecipe, step: int) -> EvalRecipe:
    model = EvalModelConfig(run=recipe.follow, step=step, dtype=recipe.model.dtype)
    return replace(recipe, suite=f"{recipe.suite}/step-{step:06d}", model=model, follow=None, wandb_outputs=0)


def _metrics(recipe: EvalRecipe, step: int) -> Path:
    return suite_dir(_of_step(recipe, step)) / "metrics.json"


def _over(run: Path) -> bool:
    """Whether no more checkpoints will come. A run that was stopped on request goes on later and is not over."""
    if not (run / "manifest.json").is_file():
        return False
    exports = _train_recipe(run).train.export
    return (run / "export").is_dir() if exports else not (run / "owner.json").exists()


def _entry(result: Mapping[str, Any]) -> dict[str, Any]:
    return result["judges"][result["headline"]]["entry"]


def _rates(entry: Mapping[str, Any]) -> dict[str, float]:
    """Every rate and the count that it is of: {"eval/asr/clean": .1, "eval/asr/clean_n": 256, …}."""
    return {
        name: value
        for path, leaf in _leaves(entry, "eval")
        for name, value in ((path, leaf["rate"]), (f"{path}_n", leaf["n"]))
    }


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if "rate" in tree:
        yield path, tree
        return
    for name, part in tree.items():
        if part is not None:
            yield from _leaves(part, f"{path}/{name}")


TOLD = ("set", "attack", "shot", "id", "category", "question", "response")


def _outputs(recipe: EvalRecipe, step: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """{"eval/outputs": table} of at most `wandb_outputs` answers with the headline judge's verdicts; {} without it."""
    if not recipe.wandb_outputs:
        return {}
    import wandb

    suite = suite_dir(_of_step(recipe, step))
    said = whole_objects(suite / "verdicts" / f"{result['headline']}.jsonl")
    verdicts = {line["key"]: line["verdict"] for line in said}
    rows = Answers(suite).refresh().of(verdicts)
    chosen = heapq.nsmallest(recipe.wandb_outputs, rows, key=_by_place)
    print(f"eval {recipe.suite}: step {step}: {len(chosen)} of {len(rows)} answers go to W&B", flush=True)
    data = [[*(str(row[name]) for name in TOLD), verdicts[row["key"]]] for row in chosen]
    table = wandb.Table(columns=[*TOLD, "verdict"], data=data)
    return {"eval/outputs": table, "eval/outputs_n": len(chosen), "eval/outputs_of": len(rows)}


def _by_place(row: Row) -> str:
    """An order that nobody chose, and that is the same for every model."""
    place = json.dumps([row[name] for name in ("set", "id", "attack", "shot")])
    return hashlib.sha256(place.encode()).hexdigest()


@contextmanager
def _private() -> Iterator[None]:
    """W&B keeps copies on disk of what it is told; only their owner may read them."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _train_recipe(run: Path) -> TrainRecipe:
    return configs.load(run / "config.yaml", [], TrainRecipe)


def _tracker(run: Path) -> Any:
    """The training run's own W&B run, to which this process adds; None where it has none."""
    recipe = _train_recipe(run)
    if recipe.monitor.wandb == "off":
        return None
    import wandb

    given: dict[str, Any] = {"mode": "offline", "resume": "allow"}
    if recipe.monitor.wandb == "online":
        # Training may be writing to it now; it is for training to say how the run ended.
        settings = wandb.Settings(mode="shared", x_primary=False, x_label="eval", x_update_finish_state=False)
        given = {"settings": settings}
    identity = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["wandb_id"]
    options = recipe.monitor
    tracker = wandb.init(project=options.project, entity=options.entity, id=identity, dir=str(run), **given)
    # The run's own steps may be far ahead by now, and W&B takes none that lies behind.
    tracker.define_metric("eval/*", step_metric="eval/step")
    return tracker
