"""A sweep of two settings and two seeds on the toy world: killed and started again, it ends as one never stopped."""

import json
import os
import signal
import subprocess
from pathlib import Path

import forkserver
import pytest
import yaml
from conftest import launch, losses, steps_done, until
from safetensors.torch import load_file

from mirage_dist import config as configs
from mirage_dist import liveness, report
from mirage_dist.schema import RunError
from mirage_dist.sweep import points, results
from mirage_dist.sweep.recipe import SweepRecipe

STEPS = 3
SMALL = [f"train.max_steps={STEPS}", "train.save_every=1", "train.global_batch=8", "train.micro_batch=8"]


@pytest.fixture(scope="module")
def recipe(toy, tmp_path_factory) -> Path:
    """A sweep without evaluations."""
    own = [word for word in toy.overrides("npo", Path("unused")) if not word.startswith(("run.dir", "seed"))]
    npo = {"recipe": "configs/train/demo_npo.yaml", "overrides": own + SMALL, "grid": {"train.lr": [1e-4, 1e-2]}}
    folder = tmp_path_factory.mktemp("sweep")
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "tiny", "out": f"{folder}/out", "seeds": [0, 1], "methods": {"npo": npo}}))
    return file


@pytest.fixture(scope="module")
def evaluated(recipe, toy) -> Path:
    """The same sweep, of one seed, with an evaluation and its frontier."""
    world = {"dir": str(toy.root / "world"), "seed": 21, **toy.sizes}
    words = [configs.override(f"world.{key}", value) for key, value in world.items()]
    suite = {"recipe": "configs/eval/demo.yaml", "overrides": [*words, "generation.max_new_tokens=4"]}
    more = {"seeds": [0], "evaluate": [suite], "frontier": {"forget": {"condition": "what_k3"}, "level": 0.0}}
    file = recipe.with_name("evaluated.yaml")
    file.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **more}))
    return file


def start(file: Path, *words: str) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [forkserver.python(), "-m", "mirage_dist.cli", "sweep", str(file), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def resumed(recipe, plain_environment) -> tuple[points.Plan, str]:
    """Killed, with its training, when the second point trained; then started again at once, two points at a time."""
    planned = points.plan(configs.load(recipe, [], SweepRecipe))
    first, second, *_ = planned.points
    process = start(recipe)
    until(lambda: steps_done(second.run), process)
    process.send_signal(signal.SIGKILL)
    owner = liveness.read(second.run / "owner.json")
    assert owner is not None
    os.kill(owner["pid"], signal.SIGKILL)
    process.communicate()
    kept = (first.run / "metrics.jsonl").stat().st_mtime_ns
    process = start(recipe, "--jobs", "2")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert (first.run / "metrics.jsonl").stat().st_mtime_ns == kept
    return planned, output


def test_a_killed_sweep_does_what_is_missing_and_trains_what_one_never_stopped_trains(resumed, tmp_path):
    planned, output = resumed
    assert output.count("done before") == 1
    assert "[4/4]" in output
    assert [steps_done(point.run) for point in planned.points] == [STEPS] * 4
    for other in planned.points[2:]:  # other seeds, other runs
        assert not (losses(other.run) == losses(planned.points[0].run)).all()
    killed = planned.points[1]
    launch(1, "train", killed.recipe, *killed.overrides, f"run.dir={tmp_path}/whole")
    assert (losses(killed.run) == losses(tmp_path / "whole")).all()
    mine, whole = (load_file(run / "export/model.safetensors") for run in (killed.run, tmp_path / "whole"))
    assert all((mine[name] == whole[name]).all() for name in whole)


def test_what_is_added_is_done_and_a_point_that_fails_is_named_and_stops_no_other(resumed, evaluated, tmp_path):
    """One seed's points are evaluated and put on the frontier; one of them has half of an export."""
    planned, _ = resumed
    before = {point.name: (point.run / "metrics.jsonl").stat().st_mtime_ns for point in planned.points}
    broken, other = planned.points[:2]
    weights = broken.run / "export/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    process = start(evaluated)
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "1 of 3 points failed, the others are done" in output
    assert f"{broken.name}: eval demo ended with status" in output
    assert {point.name: (point.run / "metrics.jsonl").stat().st_mtime_ns for point in planned.points} == before
    out = Path(planned.sweep.out)
    own, text = results.write(out, tmp_path / "report")
    assert [one["runs"] for one in own["settings"]] == [[other.name]]
    assert f"{broken.name} has no result, and its setting is left out" in text
    assert own == json.loads((tmp_path / "report/frontier.json").read_text())
    with pytest.raises(RunError, match="1 points of the sweep have no results"):
        results.require_whole(own)
    summary = report.report({"npo": other.run}, tmp_path / "alone")
    assert own["settings"][0]["forget"]["rate"] == summary["models"]["npo"]["asr"]["what_k3"]["rate"]
