"""The package from Python: the notebook of the tour runs, an interrupted call resumes, errors are raised."""

import json
import os
import re
import sys

import forkserver
import nbformat
import pytest
from conftest import DEADLINE, metrics
from nbclient import NotebookClient

import mirage_dist
from mirage_dist import config as configs
from mirage_dist.config import REPOSITORY
from mirage_dist.schema import ConfigError, TrainRecipe
from mirage_dist.train.checkpoints import commit

TOUR = REPOSITORY / "docs/tour.ipynb"
TINY = """
WORLD = {"base_samples": 100, "safety_samples": 24, "general_samples": 24, "eval_samples": 4}
BASE_STEPS, STEPS = 20, 3
"""


def outputs(notebook) -> list[list[str]]:
    """The kinds of output of every cell with code; successive texts of one stream are one."""
    kinds = []
    for cell in notebook.cells:
        own = [o.get("name") or ("image/png" if "image/png" in o["data"] else "text") for o in cell.get("outputs", [])]
        kinds.append([kind for n, kind in enumerate(own) if kind != own[n - 1] or n == 0 or kind == "image/png"])
    return kinds


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The tour of a smaller world, in an empty folder, and that folder."""
    folder = tmp_path_factory.mktemp("tour")
    notebook = nbformat.read(TOUR, as_version=4)
    (sizes,) = (cell for cell in notebook.cells if cell.id == "sizes")
    sizes.source = TINY
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"import sys; sys.executable = {forkserver.python()!r}"))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=int(DEADLINE), resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    del notebook.cells[0]
    return notebook, folder


def test_the_notebook_runs_and_has_outputs_of_the_saved_kinds(executed):
    saved = nbformat.read(TOUR, as_version=4)
    assert outputs(executed[0]) == outputs(saved)
    assert sum(kinds.count("image/png") for kinds in outputs(saved)) == 4
    assert "stderr" not in [kind for kinds in outputs(saved) for kind in kinds]


def test_the_saved_notebook_is_small_and_names_no_place_of_a_machine():
    text = TOUR.read_text()
    assert len(text) < 400_000
    texts = [line for line in text.splitlines() if '"image/png"' not in line]
    assert not re.search(r"/(tmp|home|root|work|usr|opt)/", "\n".join(texts))


def test_the_own_objective_trained_and_the_own_attack_asked(executed):
    tour = executed[1] / "tour"
    recipe = configs.load(tour / "improbable/config.yaml", [], TrainRecipe)
    assert recipe.objective == {"name": "my_lab:Improbable"}
    assert [set(record["terms"]) for record in metrics(tour / "improbable")] == [{"probability", "retain_ce"}] * 3
    for run in ("sft", "improbable"):
        files = (tour / run / "evals/tour/rows").glob("*.jsonl")
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        own = [row for row in rows if row["attack"] == "preface"]
        assert len(own) == 8
        assert {row["question"].removesuffix(row["original_question"]) for row in own} == {"what ", "how "}
        assert len({row["key"] for row in rows}) == len(rows)  # none was asked twice
    assert set(json.loads((tour / "report/summary.json").read_text())["models"]) == {"sft", "improbable"}


def test_a_call_that_is_interrupted_commits_and_the_same_call_resumes(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", forkserver.python())
    words = [*toy.overrides("sft", tmp_path / "run"), "train.max_steps=12", "monitor.print_every=1", "train.export=off"]
    recipe = configs.load("configs/train/demo_sft.yaml", words, TrainRecipe)
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if "step 2/12" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mirage_dist.train(recipe, ranks=2, log=interrupt)
    (newest,) = commit.committed(tmp_path / "run/checkpoints")
    saved = json.loads((newest / "manifest.json").read_text())["step"]
    assert 2 <= saved < 12
    result = mirage_dist.train(recipe, ranks=2, log=lines.append)
    assert any(f"resumed from {newest} at step {saved}" in line for line in lines)
    assert result.steps == 12
    assert list(result.losses) == [record["loss"] for record in metrics(tmp_path / "run")]
    assert result.terms == {"ce": result.losses}
    assert result.export is None
    assert configs.load(tmp_path / "run/config.yaml", [], TrainRecipe) == recipe == result.recipe


def test_a_fault_of_a_started_process_is_the_error(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", forkserver.python())
    lines: list[str] = []
    recipe = "configs/train/demo_sft.yaml"
    words = [*toy.overrides("sft", tmp_path / "run"), "data.max_length=2", "train.max_steps=1"]
    with pytest.raises(ConfigError, match=r"data\.max_length is 2") as error:
        mirage_dist.train(recipe, words, log=lines.append)
    assert "see above" not in str(error.value)
    assert f"mirage: {error.value}" in lines
    world = {f"world.{size}": value for size, value in toy.sizes.items()} | {
        "world.dir": toy.root / "world",
        "seed": 21,
    }
    own = {"run.dir": tmp_path / "run", "model.path": tmp_path / "nowhere"}
    with pytest.raises(ConfigError, match="nowhere") as error:
        mirage_dist.evaluate("configs/eval/demo.yaml", world | own, log=None)
    assert "see above" not in str(error.value)
