"""Every family against everything that the product does with a model; docs/models.md holds the result.

One process performs the runs of one rank for all families, a pair of processes those of two ranks, so that imports are
paid once. `MIRAGE_WRITE_MODELS_PAGE=1 python -m pytest tests/families` writes the table of docs/models.md.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from families import page, tasks
from families.checks import COLUMNS, Refused, Runs
from families.models import FAMILIES
from mirage_dist import config as configs
from mirage_dist import ranks
from mirage_dist.config import REPOSITORY
from mirage_dist.model import load
from mirage_dist.objectives.base import make
from mirage_dist.ranks import Group
from mirage_dist.schema import TrainRecipe
from mirage_dist.train.feed import Feed
from mirage_dist.train.planning.streams import read_streams

DEADLINE = 400.0  # seconds for all runs, on a busy machine
# The mark that ends an answer: the template's own, or the tokenizer's end token where a template writes none.
ENDS = {
    **dict.fromkeys(("llava_llama", "llava_mistral", "llava_next", "mistral3"), "</s>"),
    **dict.fromkeys(("idefics3", "smolvlm"), "<end_of_utterance>"),
    **dict.fromkeys(("paligemma", "paligemma_templated"), "<eos>"),
    **dict.fromkeys(("mllama", "llama_text"), "<|eot_id|>"),
    "gemma3": "<end_of_turn>",
}
PATIENT = 0.05  # seconds between looks at a file


class Matrix:
    """All runs, started when first asked for; cells by family and column."""

    def __init__(self, root: Path, family: Callable[[str], Path], names: list[str]) -> None:
        self.root, self.family, self.names = root, family, names
        self.cells: dict[tuple[str, str], str | None] = {}
        self.of: dict[str, Runs] = {}
        (root / "data").mkdir()
        tasks.write_data(root / "data")

    @cached_property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The rank of the single runs, and the two of the others."""
        (self.root / "outcomes").mkdir()
        for size, runs in ((1, tasks.RUNS), (tasks.RANKS, tasks.PAIR)):
            performed = [task for name in self.names for task in self._tasks(name, runs)]
            (self.root / f"tasks-{size}.json").write_text(json.dumps(performed))
        port = str(ranks.free_port())
        return [self._start(0, 1), *(self._start(rank, tasks.RANKS, port) for rank in range(tasks.RANKS))]

    def _tasks(self, name: str, runs: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
        data, base, folder = self.root / "data", self.family(name), self.root / "runs" / name
        text_only = name.endswith("_text")
        files = {
            run: ("train", tasks.recipe(data, base, folder / run, text_only, change)) for run, change in runs.items()
        }
        if runs is tasks.RUNS:
            for size in (1, 4):
                files[f"eval_{size}"] = ("eval", tasks.suite(data, base, folder / "eval", text_only, size))
        return [{"name": f"{name}.{run}", "verb": verb, "recipe": str(file)} for run, (verb, file) in files.items()]

    def _start(self, rank: int, size: int, port: str = "") -> subprocess.Popen[bytes]:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        own = {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY}/tests",
        }
        with (self.root / f"log-{size}-{rank}").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "families.rank", str(self.root)],
                env={**os.environ, **own, **(place | {"MASTER_PORT": port} if size > 1 else {})},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ended(self, name: str, run: str) -> dict[str, Any]:
        """Wait for a run; its outcome (see `families.rank`)."""
        file, deadline = self.root / "outcomes" / f"{name}.{run}.json", time.monotonic() + DEADLINE
        processes = self.processes
        while True:
            over = [process.poll() is not None for process in processes]
            if file.exists():
                return json.loads(file.read_text())
            size = tasks.RANKS if run in tasks.PAIR else 1
            assert not any(over[1:] if size > 1 else over[:1]), self._log(size)
            assert time.monotonic() < deadline, f"{name}.{run} does not end: {self._log(size)}"
            time.sleep(PATIENT)

    def _log(self, size: int) -> str:
        return "\n".join((self.root / f"log-{size}-{rank}").read_text()[-4000:] for rank in range(size))

    def runs(self, name: str) -> Runs:
        """Of one family at a time: the previous one's models are let go."""
        if name not in self.of:
            data = self.root / "data" / ("text" if name.endswith("_text") else "pictured")
            end = ENDS.get(name, "<|im_end|>")
            folder = self.root / "runs" / name
            self.of = {name: Runs(self.family(name), data, folder, end, lambda run: self.ended(name, run))}
        return self.of[name]

    def hidden_places(self, message: str) -> str:
        """A message without the paths of this session."""
        return message.replace(str(self.root), "RUNS").replace(str(self.family(self.names[0]).parent), "MODELS")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, family, request):
    own = (item for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    chosen = {item.callspec.params.get("name") for item in own}
    built = Matrix(tmp_path_factory.mktemp("matrix"), family, [name for name in FAMILIES if name in chosen])
    yield built
    for process in built.processes if "processes" in vars(built) else ():
        process.kill()
        process.wait()


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, column, matrix):
    """The column's claim holds for this family, or the product refuses it with a message."""
    try:
        COLUMNS[column](matrix.runs(name))
    except Refused as refusal:
        matrix.cells[name, column] = matrix.hidden_places(str(refusal))
    else:
        matrix.cells[name, column] = None


@pytest.mark.parametrize("name", ["llava_llama"])
def test_in_one_step_a_rank_has_text_alone_while_the_other_has_a_picture(name, matrix):
    recipe = configs.load(matrix.runs(name)["npo_2"] / "config.yaml", [], TrainRecipe)
    needs = make(recipe.objective).needs
    feed = Feed(recipe, needs, read_streams(recipe, needs), load.processor(recipe.model))
    mark = matrix.runs(name).hf.config.image_token_id

    def pictured(step: int, rank: int) -> bool:
        (micro,) = feed.window(step, Group(rank, rank, tasks.RANKS, torch.device("cpu")))
        shown = micro.batch.unpadded_BS.bool()
        return bool((micro.batch.inputs["input_ids"][shown] == mark).any())

    assert any(pictured(step, 0) != pictured(step, 1) for step in range(tasks.STEPS))


def test_the_page_of_models_holds_this_matrix(matrix):
    missing = [place for place in ((n, c) for n in FAMILIES for c in COLUMNS) if place not in matrix.cells]
    if missing:
        pytest.skip(f"{len(missing)} cells were not made, such as {missing[0]}")
    table = page.table(matrix.cells, list(COLUMNS))
    if os.environ.get(page.WRITE):
        page.write(table)
    assert page.current() == table, f"docs/models.md differs: {page.WRITE}=1 python -m pytest tests/families writes it"
