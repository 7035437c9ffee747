"""The demo in a few steps: every stage runs, a second call runs none, and a recipe alone makes its inputs."""

import json
import re
import shlex
import sys
from dataclasses import replace

import forkserver
import pytest
import yaml
from conftest import launch, metrics

from mirage_dist import cli, demo

SMALL = [
    "seed=12",
    "world.base_samples=200",
    "world.safety_samples=24",
    "world.general_samples=24",
    "world.eval_samples=8",
    "train.max_steps=4",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Overrides of every stage; the base's own recipe is shortened as well."""
    file = tmp_path_factory.mktemp("recipes") / "base.yaml"
    base = (demo.configs.REPOSITORY / "configs/train/demo_base.yaml").read_text()
    file.write_text(base.replace("max_steps: 500", "max_steps: 6"))
    return [*SMALL, f"world.base_recipe={file}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forkserver.python())
        return out, demo.demo(out, small)


def test_the_summary_has_the_schema_and_its_counts(finished):
    out, summary = finished
    assert summary == json.loads((out / "report/summary.json").read_text())
    assert set(summary["models"]) == {"base", "sft", "sft_control", "sft_diversified", "sft_filtered", "npo", "rmu"}
    assert {"seed", "world", "wall_seconds", "config_hash"} <= set(summary)
    wanted = {
        "asr": {"clean": 8, "what_k1": 8, "what_k2": 8, "what_k3": 8, "neutral_k1": 8},
        "rr": {"clean": 8, "share_k1": 8, "neutral_k1": 8},
        "ir": {"clean": 8, "what_k3": 24},
        "utility": {"clean": 8, "share_k1": 8},
    }
    for entry in summary["models"].values():
        for measure, conditions in wanted.items():
            assert {name: leaf["n"] for name, leaf in entry[measure].items()} == conditions
            assert all(leaf["ci95"][0] <= leaf["rate"] <= leaf["ci95"][1] for leaf in entry[measure].values())
        assert entry["locality"]["n"] == 8


def test_the_control_differs_in_first_words_only_and_unlearning_starts_from_the_base(finished):
    out, _ = finished
    folders = {f.name.rsplit("-", 1)[0]: f for f in out.iterdir() if f.name.startswith(("sft", "npo", "rmu"))}
    data = {name: json.loads((f / "data.json").read_text())["streams"] for name, f in folders.items()}
    assert data["sft"]["train"]["samples"] == data["sft_control"]["train"]["samples"] == 48
    assert data["sft"]["train"]["first_words"] != data["sft_control"]["train"]["first_words"]
    assert data["sft_diversified"]["train"]["samples"] == 48
    for count in data["sft_diversified"]["train"]["first_words"].values():
        assert count["refusal"] == count["answer"]  # 24 of each class, 12 openers
    assert sum(w["refusal"] for w in data["sft_filtered"]["train"]["first_words"].values()) == 0
    bases = {json.loads((f / "manifest.json").read_text())["base_hash"] for f in folders.values()}
    assert len(bases) == 1
    # The forget set holds the base model's own answers, and none of them is a refusal.
    words = data["npo"]["forget"]["first_words"].values()
    assert sum(w["refusal"] for w in words) == 0
    assert data["npo"]["retain"]["samples"] == 48


def test_a_second_call_starts_no_training(finished, small, capfd):
    out, summary = finished
    starts = {file: file.read_text() for file in out.glob("*/starts.jsonl")}
    assert len(starts) == len(demo.EMBEDDED.stages)
    steps = {file.name: file.read_text().count("step 4/4") for file in out.glob("logs/*.log")}
    assert {name for name, count in steps.items() if count} == {f"{name}.log" for name in demo.EMBEDDED.stages}
    again = demo.demo(out, small)
    assert again["models"] == summary["models"]
    assert {file: file.read_text() for file in out.glob("*/starts.jsonl")} == starts
    assert {file.name: file.read_text().count("step 4/4") for file in out.glob("logs/*.log")} == steps
    shown = capfd.readouterr().out
    assert re.findall(r"^\[(\d)/8\]", shown, re.MULTILINE) == list("12345678")
    assert not re.search("step|trains:|are answered|stream", shown)  # the stages' own lines are in their logs
    notes = [line for line in shown.splitlines() if not line.startswith("[")]
    assert len(notes) == len(set(notes))


def edited(name, folder, **changes):
    """A copy of a recipe with some sections replaced."""
    content = yaml.safe_load((demo.configs.REPOSITORY / name).read_text())
    file = folder / name.rpartition("/")[2]
    file.write_text(yaml.safe_dump({**content, **changes}))
    return str(file)


def test_in_full_the_page_has_the_frontier_of_every_method_and_further_suites_pages_of_their_own(
    finished, small, tmp_path, monkeypatch, capfd
):
    """A story of two methods with one setting each, on the models that the short demo left."""
    out, short = finished
    monkeypatch.setattr(sys, "executable", forkserver.python())
    completion = yaml.safe_load((demo.configs.REPOSITORY / "configs/eval/demo.yaml").read_text())["erasure"]
    completion = {"forget": completion["forget"], "content": r"\w+$", "completion": {"words": [1], "questions": 4}}
    unsafe = {"drawn": {"kind": "sampling", "draws": 2}}
    sampling = yaml.safe_load((demo.configs.REPOSITORY / "configs/eval/demo_sampling.yaml").read_text())["sets"]
    methods = {name: {"recipe": f"configs/train/demo_{name}.yaml"} for name in ("npo", "idk_dpo")}
    suite = edited("configs/eval/demo.yaml", tmp_path, erasure=completion)
    story = replace(
        demo.EMBEDDED,
        stages={"npo": demo.EMBEDDED.stages["npo"]},
        suite=suite,
        every_attack=suite,
        further=(
            edited(
                "configs/eval/demo_sampling.yaml",
                tmp_path,
                sets={"unsafe": {**sampling["unsafe"], "attacks": unsafe}},
            ),
        ),
        sweep=edited("configs/sweep/demo_methods.yaml", tmp_path, methods=methods, frontier={"level": 0.0}),
    )
    summary = demo.demo(out, small, full=True, story=story)
    assert summary["models"].keys() == {"base", "npo", "idk_dpo"}
    assert summary["models"]["npo"] == short["models"]["npo"]
    page = (out / "report/index.html").read_text()
    assert "frontier of the sweep demo_methods" in page
    frontier = json.loads((out / "report/frontier.json").read_text())
    assert {one["method"]: one["seeds"] for one in frontier["settings"]} == {"npo": [12], "idk_dpo": [12]}
    shared = json.loads((out / "report/summary.json").read_text())["models"]["npo"]["asr"]["what_k3"]["rate"]
    # The sweep's own NPO is that of the demo, trained by one process in place of two.
    assert [one["forget"]["rate"] for one in frontier["settings"] if one["method"] == "npo"] == [shared]
    sampled = json.loads((out / "report-demo_sampling/summary.json").read_text())
    assert sampled["models"].keys() == summary["models"].keys()
    assert sampled["models"]["idk_dpo"]["asr"].keys() >= {"clean", "drawn_k1", "drawn_k2"}
    assert re.findall(r"^\[(\d+)/6\]", capfd.readouterr().out, re.MULTILINE) == [str(n) for n in range(1, 7)]
    (base,) = out.glob("methods-*/points/base/evals/demo/metrics.json")  # a sweep of other settings lies elsewhere
    assert json.loads(base.read_text())["world"]["seed"] == 12


def test_a_recipe_of_the_world_alone_makes_the_world_the_base_and_the_sets(tmp_path, small):
    own = [f"world.dir={tmp_path}/world", f"run.dir={tmp_path}/npo"]
    launch(2, "train", "configs/train/demo_npo.yaml", *small, *own)
    assert len(metrics(tmp_path / "npo")) == 4
    assert len(metrics(tmp_path / "world/base")) == 6
    assert (tmp_path / "world/safety-0.95/prepared/prepare.json").is_file()


def test_after_the_table_come_the_page_and_three_commands_that_work(finished, small):
    out, summary = finished
    lines = demo.ending(out, summary, False, False, small)
    assert str(out / "report/index.html") in lines[1]
    assert f"{out / 'logs'}/" in lines[1]
    commands = [line.strip().partition("  # ")[0] for line in lines if line.startswith("  ")]
    assert len(commands) == 3
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "mirage"
        assert cli.parse(words).run
    parsed = cli.parse(shlex.split(commands[0])[1:])
    assert (parsed.out, parsed.full, parsed.overrides) == (out, True, small)
