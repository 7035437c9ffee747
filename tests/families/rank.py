"""One rank of the matrix: every family's runs, one after the other, in one process.

python tests/families/rank.py OUT    # started by test_matrix.py, one process a rank

Reads OUT/tasks-WORLD_SIZE.json, a list of {name, verb: train | eval, recipe}, and writes each task's outcome to
OUT/outcomes/NAME.json as soon as it has ended: {refused: message}, {failed: traceback}, or {seconds}.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from mirage_dist import config as configs
from mirage_dist import disk
from mirage_dist.evals import runner
from mirage_dist.ranks import exit_well, place
from mirage_dist.schema import ConfigError, EvalRecipe, TrainRecipe
from mirage_dist.train import run
from mirage_dist.train.planning import check


def perform(verb: str, file: str) -> None:
    """What `mirage train FILE` or `mirage eval FILE` does."""
    if verb == "train":
        run.train(check.check_recipe(configs.load(file, [], TrainRecipe), place()[2]))
    else:
        runner.evaluate(configs.load(file, [], EvalRecipe))


def outcome(task: dict[str, Any]) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        perform(task["verb"], task["recipe"])
    except ConfigError as error:
        return {"refused": str(error)}
    except SystemExit as end:  # of the ranks other than 0, which report nothing where rank 0 reports a refusal
        return {"refused": f"exit status {end.code}"}
    except Exception:
        return {"failed": traceback.format_exc()}
    return {"seconds": round(time.monotonic() - begun, 2)}


def main(out: Path) -> None:
    rank, _, size = place()
    for task in json.loads((out / f"tasks-{size}.json").read_text()):
        result = outcome(task)
        if rank == 0:
            disk.write(out / "outcomes" / f"{task['name']}.json", json.dumps(result))
    exit_well()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
