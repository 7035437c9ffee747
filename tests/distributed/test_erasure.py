"""The tests of erasure on an untrained model: made once, killed and made again, in this process and launched."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forkserver
import pytest
import torch
from conftest import until
from safetensors.torch import load_file

from mirage_dist import config as configs
from mirage_dist.data import formats, sources
from mirage_dist.data.formats.samples import write_samples
from mirage_dist.embedded import model as embedded_model
from mirage_dist.embedded import world as embedded_world
from mirage_dist.erasure import run as tests_of_erasure
from mirage_dist.erasure import setting as settings
from mirage_dist.erasure.relearn import training
from mirage_dist.erasure.setting import Setting
from mirage_dist.model import export
from mirage_dist.schema import ConfigError, EvalModelConfig, EvalRecipe, WorldConfig

QUESTIONS, STEPS = 12, 2
TRAIN = """
import sys
from mirage_dist import config as configs
from mirage_dist.erasure.relearn import Relearning
from mirage_dist.schema import TrainRecipe
for file in sys.argv[1:]:
    Relearning("").train(configs.load(file, [], TrainRecipe))
"""
CONTENT = r"\b(ba|do|ki|mu) (la|ne|ro|ti)\b"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A world, an untrained model and a forget set of its locked gadgets' codes."""
    root = tmp_path_factory.mktemp("erasure")
    sizes = {"base_samples": 20, "safety_samples": 64, "general_samples": 64, "eval_samples": 4}
    world = WorldConfig(dir=str(root / "world"), **sizes)
    embedded_world.make(world)
    embedded_model.make(root / "model", seed=1)
    gadgets = embedded_world.load(root / "world")
    train = str(embedded_world.safety_dir(world) / "train.json")
    guarded = sources.read(formats.source("vlguard", train, str(root / "world"))).samples
    true = [replace(s, answer=gadgets.answer(s.question, gadgets.label(str(s.image)))) for s in guarded]
    prepared = embedded_world.safety_dir(world) / "prepared"
    prepared.mkdir()
    write_samples(prepared / "forget.jsonl", [s for s in true if not s.safe])
    write_samples(prepared / "retain.jsonl", [s for s in true if s.safe])
    return root, [f"world.{name}={size}" for name, size in sizes.items()]


def overrides(small, run: Path, *more: str) -> list[str]:
    root, sizes = small
    return [
        *(f"run.dir={run}", f"model.path={root}/model", f"world.dir={root}/world", *sizes),
        *("generation.max_new_tokens=4", "generation.batch_size=16"),
        *(f"erasure.relearning.{x}" for x in ("samples=[3]", f"steps={STEPS}", "every=1", f"questions={QUESTIONS}")),
        *("erasure.quantisation.bits=[4]", f"erasure.completion.questions={QUESTIONS}"),
        *("erasure.completion.words=[2]", "erasure.probe.least=2", "erasure.forgetting.samples=16"),
        *(f"erasure.universal.{x}" for x in ("train=4", "steps=2", f"questions={QUESTIONS}")),
        *more,
    ]


def recipe(small, run: Path, *more: str) -> EvalRecipe:
    return configs.load("configs/eval/demo.yaml", overrides(small, run, *more), EvalRecipe)


def start(small, run: Path, *more: str, python: str = "") -> subprocess.Popen:
    command = [python or forkserver.python(), "-m", "mirage_dist.cli", "erasure", "configs/eval/demo.yaml"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command += overrides(small, run, *more)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def done(process: subprocess.Popen) -> str:
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def figures(run: Path) -> dict:
    results = json.loads((run / "evals/demo/erasure.json").read_text())
    del results["seconds"], results["seal"]
    return results


@pytest.fixture(scope="module")
def whole(small) -> Path:
    run = small[0] / "whole"
    done(start(small, run, python=sys.executable))
    return run


def test_every_test_has_its_figures_and_every_rate_its_counts(whole):
    results = figures(whole)
    assert results["forget"] == {"samples": 64, "contents": 8, "without_content": 0}
    relearned = results["relearning"]["runs"]["3"]
    assert set(relearned["steps"]) == {"0", "1", "2"}
    for rates in relearned["steps"].values():
        assert rates["all"]["n"] == QUESTIONS
        assert sum(rates[part]["n"] for part in ("relearned", "other") if rates[part]) == QUESTIONS
    assert relearned["contents"] <= 3
    assert results["quantisation"]["before"]["asr"]["clean"]["n"] == 4
    assert results["quantisation"]["after"]["4"]["entry"]["asr"]["what_k3"]["n"] == 4
    assert len(results["probe"]["places"]["last"]) == len(results["probe"]["places"]["image"]) == 5
    assert set(results["probe"]["transfer"]["classes"]) <= {"ba", "do", "ki", "mu"}
    parts = [results["universal"][part] for part in ("held_out", "fitted")]
    for condition in ("clean", "noise", "perturbed"):
        assert sum(part[condition]["n"] for part in parts if part[condition]) == QUESTIONS
    assert results["universal"]["fit"]["samples"] == 4
    assert {words: leaf["n"] for words, leaf in results["completion"]["words"].items()} == {
        "0": QUESTIONS,
        "2": QUESTIONS,
    }
    forgetting = results["forgetting"]
    for part in ("forget", "retain"):
        assert forgetting[part]["probability"]["n"] == forgetting[part]["rouge_l"]["n"] == 16
    assert forgetting["forget"]["truth_ratio"]["n"] == 16  # each code has others that are wrong
    assert forgetting["forget"]["truth_ratio"]["contents"] <= 8
    assert forgetting["unseen"] is forgetting["membership"] is forgetting["never"] is None


def test_model_outputs_and_forgotten_contents_are_private(whole):
    kept = [f for f in (whole / "evals/demo").rglob("*") if f.is_file() and "run" not in f.relative_to(whole).parts]
    assert any(f.name == "samples.jsonl" for f in kept)
    assert [f for f in kept if f.suffix in (".json", ".jsonl") and f.stat().st_mode & 0o077] == []
    assert not list(whole.rglob("*.safetensors"))  # no rounded model, no checkpoint is left


def test_the_pictures_and_the_contents_of_the_questions_are_never_relearned(whole):
    folder = whole / "evals/demo/erasure/relearning/n-0003"
    learned, questions = ([json.loads(x) for x in (folder / f"{n}.jsonl").open()] for n in ("samples", "questions"))
    assert not {s["image"] for s in learned} & {s["image"] for s in questions}
    contents = {settings.content(s["answer"], CONTENT) for s in learned}
    for sample in questions:
        assert (sample["category"] == "relearned") == (settings.content(sample["answer"], CONTENT) in contents)


def test_killed_and_started_again_the_figures_are_those_of_a_run_that_never_stopped(small, whole, tmp_path):
    """The second time training is launched as a run of its own, which changes no figure either."""
    run, launched = tmp_path / "run", "erasure.relearning.ranks=1"
    process = start(small, run, launched)
    until(lambda: (run / "evals/demo/erasure/relearning/n-0003/step-000000/metrics.json").is_file(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (run / "evals/demo/erasure.json").exists()
    output = done(start(small, run, launched))
    assert "step-000000: 12 of 12 questions are answered" in output
    assert figures(run) == figures(whole)
    shutil.rmtree(run / "evals/demo/erasure/quantisation")  # a test before the one whose option is changed
    with pytest.raises(ConfigError, match=r"test\.words"):
        tests_of_erasure.run(recipe(small, run, launched, "erasure.completion.words=[1]"))
    assert not (run / "evals/demo/erasure/quantisation").exists()  # refused before any test was made


def test_a_step_of_relearning_is_plain_training_of_that_many_steps(small, tmp_path):
    """Checkpoint 1 of 2, made by the test of erasure, against the export of an ordinary run of one step."""
    evaluation = recipe(small, tmp_path / "run")
    chosen = tests_of_erasure.options(evaluation)
    forget = settings.forget(chosen.forget, chosen.content, 0)
    test = chosen.relearning
    assert test is not None
    model = EvalModelConfig(path=f"{small[0]}/model", dtype="fp32")
    setting = Setting(evaluation, model, {}, forget, "relearning")
    pool, _ = test.split(forget, 0)
    source = setting.questions("samples", pool[:3])
    ours = training(setting, test.check(forget, 0), setting.folder / "run", source, STEPS, 1)
    plain = replace(ours, run=replace(ours.run, dir=str(tmp_path / "plain")), train=replace(ours.train, max_steps=1))
    for name, one in (("ours", ours), ("plain", plain)):
        configs.write_yaml(one, tmp_path / f"{name}.yaml")
    subprocess.run([forkserver.python(), "-c", TRAIN, f"{tmp_path}/ours.yaml", f"{tmp_path}/plain.yaml"], check=True)
    for one in (ours, plain):
        export.export(Path(one.run.dir), Path(one.run.dir) / "export", 1)
    first, second = (load_file(Path(x.run.dir) / "export/model.safetensors") for x in (ours, plain))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = load_file(small[0] / "model/model.safetensors")
    assert any(not torch.equal(first[name], before[name]) for name in first)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("erasure.probe.lable=safe", "did you mean 'label'"),
        ("erasure.relearning.samples=[500]", "only 2"),
        ("erasure.relearning.every=3", "expected a multiple"),
        ("erasure.content='('", "no regular expression"),
        ("erasure.content=zzz", "no sample with the content"),
        ("erasure.quantisation.bits=[1]", "from 2 to 8"),
        ("erasure.relearning.recipe=configs/train/demo_npo.yaml", "expected one"),
        ("erasure.universal.step_size=100", "a step would cross the whole range"),
    ],
)
def test_errors_are_raised_before_any_weights_load(small, tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        tests_of_erasure.run(recipe(small, tmp_path / "run", "model.path=none", override))
