"""The points of a sweep: which there are, how they are named, and what is refused before the first one trains."""

import itertools
import math
import re
import shlex
import subprocess
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mirage_dist import cli, disk, liveness, state
from mirage_dist import config as configs
from mirage_dist.liveness import Owner
from mirage_dist.schema import ConfigError, RunError, TrainRecipe
from mirage_dist.sweep import directory, draws, points, pool, slurm
from mirage_dist.sweep.recipe import DrawConfig, MethodConfig, RandomConfig, SweepRecipe

NPO, RMU = "configs/train/demo_npo.yaml", "configs/train/demo_rmu.yaml"
DEMO = "configs/sweep/demo.yaml"


def sweep(tmp_path, *overrides: str) -> SweepRecipe:
    """The shipped sweep, in a folder of the test's."""
    return configs.load(DEMO, [f"out={tmp_path}/sweep", *overrides], SweepRecipe)


def grid(values: dict, **more: object) -> dict:
    """A recipe with one method and nothing else."""
    return {"methods": {"npo": {"recipe": NPO, "grid": values}}, "evaluate": [], "frontier": None, **more}


def written(tmp_path, changes: dict) -> list[str]:
    """The shipped sweep, of one point, with other values of its top-level keys: the words of a command line."""
    own = {"methods": {"npo": {"recipe": NPO}}, "seeds": [0]}
    tree = yaml.safe_load((configs.REPOSITORY / DEMO).read_text()) | own
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**tree, "out": str(tmp_path / "sweep"), **changes}))
    return [str(file)]


def small(tmp_path, values: dict, **more: object) -> points.Plan:
    return points.plan(configs.load(*written(tmp_path, grid(values, **more)), [], SweepRecipe))


def test_a_sweep_has_every_setting_with_every_seed_the_first_seed_of_all_first(tmp_path):
    planned = points.plan(sweep(tmp_path))
    assert len(planned.points) == 2 * (4 + 4)
    assert [point.seed for point in planned.points] == [0] * 8 + [1] * 8
    assert len({point.name for point in planned.points}) == 16
    values = {tuple(point.values.values()) for point in planned.points if point.method == "npo"}
    assert values == set(itertools.product([3e-4, 1e-3], [3.0, 10.0]))
    assert planned.base is not None
    assert planned.base.overrides == ('model.path="runs/demo/world/base/export"',)
    assert planned.suites == ["demo"]


def test_a_point_trains_what_its_name_and_values_say(tmp_path):
    for point in points.plan(sweep(tmp_path)).points:
        recipe = configs.load(str(point.recipe), point.overrides, TrainRecipe)
        assert recipe.run.dir == str(tmp_path / "sweep/points" / point.name)
        assert (recipe.run.name, recipe.seed, recipe.monitor.group) == (point.name, point.seed, "demo")
        assert recipe.world is not None
        assert recipe.world.seed == 0
        assert {key: configs.value(recipe, key) for key in point.values} == point.values


def test_the_example_of_the_page_is_a_sweep_that_is_accepted(tmp_path):
    page = (configs.REPOSITORY / "docs/sweeps.md").read_text()
    file = tmp_path / "page.yaml"
    file.write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    planned = points.plan(configs.load(file, [f"out={tmp_path}/sweep", "seeds=[3]"], SweepRecipe))
    assert len(planned.points) == 6 + 8 + 1
    assert planned.suites == ["vlguard", "vqav2"]
    assert planned.places is not None
    assert [place.set for place in planned.places] == ["unsafes", "vqav2"]


def test_what_is_added_later_leaves_the_names_of_what_is_there(tmp_path):
    def names(values, **more):
        return {point.name for point in small(tmp_path, {"train.lr": values}, **more).points}

    few = names([1e-3], seeds=[1])
    assert few < names([1e-4, 1e-3], seeds=[0, 1], every=["world.seed=0", "train.save_every=5"])
    assert few.isdisjoint(names([1e-3], seeds=[1], every=["world.seed=0", "train.max_steps=7"]))


def test_a_random_search_that_grows_keeps_its_draws():
    def drawn(count):
        keys = {"train.lr": DrawConfig(low=1e-5, high=1e-2, scale="log"), "a.b": DrawConfig(values=[1, 2])}
        return draws.settings(MethodConfig(NPO, random=RandomConfig(count, keys, seed=3)), "methods.npo")

    assert drawn(12)[:5] == drawn(5)
    assert drawn(5) != drawn(5)[::-1]


@given(
    low=st.floats(1e-6, 10), width=st.floats(1.5, 1000), seed=st.integers(0, 99), log=st.booleans(), whole=st.booleans()
)
def test_a_draw_is_within_its_range_and_no_setting_comes_twice(low, width, seed, log, whole):
    own = DrawConfig(low=low, high=low + width, scale="log" if log else "linear", whole=whole)
    count = 1 if whole else 6
    made = draws.settings(MethodConfig(NPO, random=RandomConfig(count, {"k": own}, seed=seed)), "methods.npo")
    values = [setting["k"] for setting in made]
    assert all(low <= value <= low + width for value in values)
    assert len(set(values)) == count
    assert all(isinstance(value, int) == whole for value in values)


def test_draws_on_a_log_scale_are_as_often_in_each_decade():
    keys = {"k": DrawConfig(low=1e-4, high=1e-2, scale="log")}
    made = draws.settings(MethodConfig(NPO, random=RandomConfig(400, keys)), "methods.npo")
    below = sum(setting["k"] < 1e-3 for setting in made)
    assert abs(below - 200) < 4 * math.sqrt(400) / 2


def npo(**options: object) -> dict:
    return {"methods": {"npo": {"recipe": NPO, **options}}}


def rmu(**keys: object) -> dict:
    return {"methods": {"rmu": {"recipe": RMU, "random": {"settings": 3, "keys": keys}}}}


def evaluated(*overrides: str) -> dict:
    return {"recipe": "configs/eval/demo.yaml", "overrides": list(overrides)}


def frontier(forget: dict | None = None, retain: dict | None = None) -> dict:
    return {"frontier": {"forget": forget or {}, "retain": retain or {}}}


MISTAKES = {
    "a key that the recipe lacks": (
        npo(grid={"train.lrr": [0.1]}),
        ["methods.npo, point train.lrr=0.1", "unknown key 'train.lrr'; did you mean 'lr'"],
    ),
    "an option that the objective lacks": (
        npo(grid={"objective.betta": [1.0]}),
        ["point objective.betta=1.0", "unknown key 'objective.betta'"],
    ),
    "a value out of range": (npo(grid={"train.lr": [0.1, -1.0]}), ["point train.lr=-1.0", "train.lr=-1.0; expected"]),
    "a batch that does not divide": (
        npo(grid={"train.global_batch": [24]}),
        ["point train.global_batch=24", "must be a multiple of train.micro_batch"],
    ),
    "an empty grid": (npo(grid={}), ["methods.npo.grid: empty"]),
    "a key without a value": (npo(grid={"train.lr": []}), ["methods.npo.grid.train.lr: no value"]),
    "a value twice": (
        npo(grid={"train.lr": [1e-3, 0.001]}),
        ["methods.npo.grid.train.lr: 0.001 stands there twice"],
    ),
    "settings that are one run": (
        npo(grid={"train.save_every": [5, 6]}),
        ["the point train.save_every=6 is the same run as train.save_every=5 of npo"],
    ),
    "methods that are one run": (
        {"methods": {"a": {"recipe": NPO}, "b": {"recipe": NPO}}},
        ["methods.b: the point the recipe as it is is the same run as the recipe as it is of a"],
    ),
    "grid and random": (
        npo(grid={"train.lr": [1.0]}, random={"settings": 1, "keys": {"train.lr": {"values": [1.0]}}}),
        ["methods.npo.random: stands in place of grid"],
    ),
    "a seed in the grid": (npo(grid={"seed": [1]}), ["grid.seed", "list seeds under `seeds`"]),
    "a run's own directory": (npo(overrides=["run.dir=x"]), ["overrides: the sweep itself sets run.dir"]),
    "a key that is also an override": (
        npo(overrides=["train.lr=1.0"], grid={"train.lr": [1.0]}),
        ["methods.npo.overrides: train.lr is set here, and grid sets it too"],
    ),
    "a seed twice": ({"seeds": [1, 1]}, ["seeds: 1 stands there twice"]),
    "no seed": ({"seeds": []}, ["seeds: empty"]),
    "no method": ({"methods": {}}, ["methods: empty"]),
    "the base's name": ({"methods": {"base": {"recipe": NPO}}}, ["methods.base: is the name of the model"]),
    "a name that is too long": ({"methods": {"m" * 41: {"recipe": NPO}}}, ["has 41 characters; at most 40"]),
    "more settings than there may be": (
        npo(grid={f"k{i}": list(range(9)) for i in range(9)}),
        ["methods.npo.grid: 387,420,489 settings; a sweep has at most 10,000 points"],
    ),
    "more draws than there are settings": (
        rmu(**{"train.lr": {"values": [1.0, 2.0]}}),
        ["methods.rmu.random.settings=3", "no more than 2 different settings"],
    ),
    "a range without an end": (rmu(**{"train.lr": {"low": 1.0}}), ["low and high: expected both"]),
    "a range and values": (rmu(**{"train.lr": {"low": 1.0, "values": [1]}}), ["values: stand in place of low"]),
    "a range the wrong way": (rmu(**{"train.lr": {"low": 2.0, "high": 1.0}}), ["expected low below high"]),
    "a log scale from 0": (
        rmu(**{"train.lr": {"low": 0.0, "high": 1.0, "scale": "log"}}),
        ["low=0; expected a number above 0 for scale: log"],
    ),
    "another world for each seed": (
        {"every": ["world.dir=runs/demo/world"], "seeds": [0, 1]},
        ["-s1: another world", "world.seed: 1 here, 0 there", "every=[world.seed=0]"],
    ),
    "an evaluation of one model": (
        {"evaluate": [evaluated("model.path=models/x")]},
        ["evaluate[0], point npo-", "model.path=models/x: not the model of each point"],
    ),
    "workers of more GPUs than a training has": (
        {"evaluate": [evaluated("generation.backend=vllm", "generation.tensor_parallel=4")]},
        ["evaluate[0], point npo-", "generation.tensor_parallel=4", "ranks=1; expected a divisor"],
    ),
    "a suite twice": ({"evaluate": [evaluated(), evaluated()]}, ["evaluate: two recipes have the suite 'demo'"]),
    "a training without export": (
        {"every": ["world.seed=0", "train.export=off"]},
        ["methods.npo, point", "train.export=off: a point is done when its model is exported"],
    ),
    "a condition of no attack": (
        frontier({"condition": "what_k4"}),
        ["frontier.forget.condition=what_k4: set unsafe has no such condition; did you mean 'what_k3'"],
    ),
    "a set of another kind": (
        frontier(retain={"set": "unsafe"}),
        ["frontier.retain.set=unsafe: utility counts a set of kind safe"],
    ),
    "a measure without its set": (
        frontier(retain={"measure": "accuracy"}),
        ["frontier.retain.measure=accuracy: suite demo has no set of kind utility"],
    ),
    "a judge that cannot decide": (
        {"evaluate": [evaluated("judges=[keyword]")]},
        ["frontier.retain.measure=utility: needs a judge that gives the verdict 'correct'", "keyword"],
    ),
    "a suite that is not evaluated": (
        frontier({"suite": "vlguard"}),
        ["frontier.forget.suite=vlguard: no evaluation has it"],
    ),
    "a suite to be named": (
        {"evaluate": [evaluated(), evaluated("suite=other")]},
        ["frontier.forget.suite: name one of the suites (demo, other)"],
    ),
    "a frontier of nothing": ({"evaluate": []}, ["frontier: there is nothing to measure"]),
    "two base models of one method": (
        npo(grid={"model.path": ["models/a", "models/b"]}),
        ["base: the points start from different models (npo-", "-s0: models/a; npo-", "-s0: models/b)"],
    ),
    "questions that follow the seed": (
        {
            "seeds": [0, 1],
            "evaluate": [evaluated("sets.unsafe.attacks.s={kind: sampling, draws: 2, seed: '\\${seed}'}")],
        },
        ["evaluate[0], point npo-", "-s1: other questions or settings than of point npo-"],
    ),
    "two base models": (
        {"methods": {"npo": {"recipe": NPO, "overrides": ["model.path=models/x"]}, "rmu": {"recipe": RMU}}},
        ["base: the points start from different models (npo-", "-s0: models/x; rmu-", "runs/demo/world/base/export)"],
    ),
}


@pytest.mark.parametrize(("changes", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_an_error_before_anything_is_written(changes, words, tmp_path, capsys):
    assert cli.main(["sweep", *written(tmp_path, changes)]) == 2
    output = capsys.readouterr().err
    assert all(word in output for word in words), output
    assert "Traceback" not in output
    assert not (tmp_path / "sweep").exists()


def test_a_directory_belongs_to_one_sweep(tmp_path):
    planned = small(tmp_path, {"train.lr": [1e-3]})
    (tmp_path / "sweep").mkdir()
    out = directory.claim(planned)
    assert directory.read(out)["points"][0]["name"] == planned.points[0].name
    directory.check(small(tmp_path, {"train.lr": [1e-4]}))
    with pytest.raises(ConfigError, match=r"holds the sweep 'demo', and this one is named 'other'"):
        directory.check(small(tmp_path, {"train.lr": [1e-3]}, name="other"))
    (out / "sweep.json").unlink()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds files, and no sweep wrote them"):
        directory.claim(planned)


def test_points_at_once_have_gpus_of_their_own_and_there_must_be_enough(tmp_path, monkeypatch):
    train, suite = pool.Step("train", ("t.yaml", "a=1"), "train"), pool.Step("eval", ("e.yaml", "b=2"), "eval demo")
    for number, own in ((0, "4,5"), (1, "6,7")):
        words, variables = pool.command(train, 2, (number, 2), ["4", "5", "6", "7"])
        assert words[-4:] == ["2", "train", "t.yaml", "a=1"]
        assert variables["CUDA_VISIBLE_DEVICES"] == own
        words, variables = pool.command(suite, 2, (number, 2), ["4", "5", "6", "7"])
        assert words[-5:] == ["eval", "e.yaml", "b=2", "--workers", "2"]
        assert variables["CUDA_VISIBLE_DEVICES"] == own
        words, variables = pool.command(suite, 2, (number, 2), ["4", "5", "6", "7"], 2)  # workers of two GPUs
        assert words[-5:] == ["eval", "e.yaml", "b=2", "--workers", "1"]
        assert variables["CUDA_VISIBLE_DEVICES"] == own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    # A point's share is what its workers divide, not the machine's GPUs, of which one may be left over.
    _, variables = pool.command(suite, 2, (0, 1), ["0", "1", "2"], 2)
    assert variables["CUDA_VISIBLE_DEVICES"] == "0,1"
    planned = small(tmp_path, {"train.lr": [1e-3]}, ranks=2)
    with pytest.raises(ConfigError, match=r"2 points of 2 ranks need 4 GPUs, and this machine has 3; at most --jobs 1"):
        pool.run(planned, 2)


def test_a_point_waits_for_the_process_that_a_killed_sweep_has_left_at_work_on_it(tmp_path, caplog):
    planned = small(tmp_path, {"train.lr": [1e-3]})
    directory.claim(planned)
    [point] = planned.points
    (point.run / "export").mkdir(parents=True)
    with subprocess.Popen(["sleep", "1"]) as left:
        owner = replace(Owner.current(), pid=left.pid, process=liveness.process_start(left.pid))
        (point.run / "owner.json").write_text(state.sealed("owner", owner.record()))
        with caplog.at_level("INFO", "mirage_dist"):
            pool.run(planned, 1)
        assert left.poll() == 0
    assert "is still at work on it; waiting for it" in caplog.text
    assert caplog.text.endswith("done before\n")


def test_one_process_at_a_time_runs_points_in_a_directory(tmp_path):
    planned = small(tmp_path, {"train.lr": [1e-3]})
    (tmp_path / "sweep").mkdir()
    with disk.alone(tmp_path / "sweep"), pytest.raises(RunError, match=r"another `mirage sweep` runs points there"):
        pool.run(planned, 1)
    assert not list((tmp_path / "sweep").iterdir())


def test_a_damaged_sweep_json_is_named_with_its_remedy(tmp_path, capsys):
    out = directory.claim(small(tmp_path, {"train.lr": [1e-3]}))
    file = out / "sweep.json"
    file.write_text(file.read_text().replace('"demo"', '"dema"'))
    assert cli.main(["report", "--sweep", str(out)]) == 1
    assert f"{file}: its content does not have the checksum" in (error := capsys.readouterr().err)
    assert "start `mirage sweep` again" in error
    assert cli.main(["report", "--sweep", str(tmp_path)]) == 2
    assert "no sweep.json" in capsys.readouterr().err


def test_check_and_status_write_nothing_and_name_every_point(tmp_path, capsys):
    words = written(tmp_path, {})
    names = [point.name for point in points.plan(configs.load(words[0], [], SweepRecipe)).everything]
    for flag, count in (("--check", "2 points are in order"), ("--status", "0 of 2 points are done, 2 not begun")):
        assert cli.main(["sweep", *words, flag]) == 0
        output = capsys.readouterr().out
        assert count in output
        assert all(name in output for name in names)
        assert not (tmp_path / "sweep").exists()


def test_status_says_how_far_each_point_is(tmp_path, capsys):
    planned = small(tmp_path, {"train.lr": [1e-4, 1e-3]}, seeds=[0, 1])
    out = directory.claim(planned)
    done, begun, failed, _ = planned.points
    (done.run / "export").mkdir(parents=True)
    begun.run.mkdir(parents=True)
    for point in (done, begun):
        (point.run / "owner.lock").touch()  # of a run
    whole = "".join(state.sealed("metrics", {"step": step, "loss": 1.0}) for step in (1, 2, 3))
    (begun.run / "metrics.jsonl").write_text(whole + '{"step": 4, "lo')
    directory.failure_file(out, failed).parent.mkdir()
    directory.failure_file(out, failed).write_text("train ended with status 1\n")
    (out / "points/npo-00000000-s9").mkdir()
    assert cli.main(["sweep", str(tmp_path / "recipe.yaml"), "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[:4]] == [
        "done", "training, step 3, stopped", "failed: train ended with status 1", "not begun",
    ]  # fmt: skip
    assert lines[4] == "1 of 4 points are done, 1 training, 1 failed, 1 not begun"
    assert "1 more in" in lines[5]
    assert "npo-00000000-s9" in lines[5]


def test_the_array_has_the_missing_points_and_their_words(tmp_path):
    planned = points.plan(sweep(tmp_path))
    (planned.points[0].run / "export").mkdir(parents=True)
    (tmp_path / "sweep/sweep.json").write_text(state.sealed("sweep", {"name": "demo"}))
    made = slurm.commands(planned)
    assert made is not None
    file, count = made
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    assert count == len(rows) == 17
    assert [row[0] for row in rows] == [point.name for point in planned.everything]
    assert [len(row) for row in rows] == [3, 3] + [4] * 15  # the base and the trained one are evaluated only
    name, run, train, evaluation = rows[2]
    verb, file_of, *words = shlex.split(train)
    assert (verb, configs.load(file_of, words, TrainRecipe).run.dir) == ("train", run)
    assert shlex.split(evaluation)[:2] == ["eval", "configs/eval/demo.yaml"]
    assert slurm.commands(planned) == made
    assert "--array=0-16%8 --job-name=demo" in slurm.text(planned)
    assert name in run


def test_an_array_has_no_task_of_several_gpus(tmp_path):
    suite = evaluated("generation.backend=vllm", "generation.tensor_parallel=2")
    planned = points.plan(sweep(tmp_path, "ranks=2", configs.override("evaluate", [suite])))
    with pytest.raises(ConfigError, match=r"generation\.tensor_parallel=2: the tasks of a sweep's job have one GPU"):
        slurm.text(planned)
