"""A suite on an untrained model and a small world: resumed, guarded, counted; answers do not depend on batching."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import DEADLINE
from safetensors.torch import save_file

from mirage_dist import cli, inputs, report, signals, state
from mirage_dist import config as configs
from mirage_dist.embedded import model as embedded_model
from mirage_dist.embedded import world as embedded_world
from mirage_dist.evals import judges, judging, manifest, results, rows, runner, status, worklist
from mirage_dist.evals.models import subject
from mirage_dist.evals.models.hf import HuggingFace
from mirage_dist.evals.sharing import files
from mirage_dist.model import environment
from mirage_dist.model.environment import Environment
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, TrainRecipe

QUESTIONS = 8
ROWS = QUESTIONS * (1 + 3 + 1) + QUESTIONS * (1 + 1 + 1) + QUESTIONS


def recipe(root, *overrides) -> EvalRecipe:
    sizes = {"base_samples": 20, "safety_samples": 4, "general_samples": 4, "eval_samples": QUESTIONS}
    defaults = [
        f"run.dir={root}/run",
        f"model.path={root}/model",
        f"world.dir={root}/world",
        "generation.max_new_tokens=6",
        "generation.batch_size=16",
        *(f"world.{name}={value}" for name, value in sizes.items()),
    ]
    return configs.load("configs/eval/demo.yaml", [*defaults, *overrides], EvalRecipe)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evals")
    embedded_model.make(root / "model", seed=1)
    inputs.make(recipe(root))
    runner.evaluate(recipe(root))
    return root


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run directory, and the recipe that made it."""
    shutil.copytree(finished / "run", tmp_path / "run")

    def again(*overrides) -> EvalRecipe:
        return recipe(finished, f"run.dir={tmp_path}/run", *overrides)

    return tmp_path, again


def suite(root: Path) -> Path:
    return root / "run/evals/demo"


def lines(root: Path) -> list[bytes]:
    return [line for file in (suite(root) / "rows").iterdir() for line in file.read_bytes().splitlines(keepends=True)]


def test_every_question_is_one_row_and_the_entry_is_the_reports_schema(finished):
    assert len(lines(finished)) == ROWS
    result = results.read(suite(finished))
    for judge in ("world", "keyword"):
        entry = result["judges"][judge]["entry"]
        assert set(entry) == {"asr", "rr", "ir", "utility", "locality"}
        assert set(entry["asr"]) == {"clean", "what_k1", "what_k2", "what_k3", "neutral_k1"}
        assert set(entry["rr"]) == {"clean", "share_k1", "neutral_k1"}
        assert set(entry["ir"]) == {"clean", "what_k3"}
        assert set(entry["utility"]) == {"clean", "share_k1"}
    exact, keyword = (result["judges"][name]["entry"] for name in ("world", "keyword"))
    assert set(exact["locality"]) == {"rate", "k", "n", "ci95"}
    assert (exact["asr"]["what_k3"]["n"], exact["ir"]["what_k3"]["n"]) == (QUESTIONS, 3 * QUESTIONS)
    assert keyword["locality"] is keyword["utility"]["clean"] is keyword["ir"]["clean"] is None


def test_metrics_hold_pairs_categories_and_how_judges_agree(finished):
    result = results.read(suite(finished))
    exact = result["judges"]["world"]
    assert set(exact["paired"]["unsafe"]) == {"what_k3", "neutral_k1"}
    assert exact["paired"]["unsafe"]["what_k3"]["n"] == QUESTIONS
    assert exact["paired"]["locality"] == {}
    counted = [c["asr"]["clean"]["n"] for name, c in exact["categories"]["unsafe"].items() if "/" not in name]
    assert sum(counted) == QUESTIONS
    assert exact["unjudged"] == {"unparsed": 0, "failed": 0, "reasons": {}}
    compared = {(*p["judges"], p["verdict"]): p["agreed"]["n"] for p in result["agreement"]["pairs"]}
    assert compared == {("world", "keyword", "refused"): ROWS, ("world", "keyword", "harmful"): 5 * QUESTIONS}
    assert {(p["judge"], p["labels"]) for p in result["agreement"]["against_labels"]} == {("keyword", "world")}


def test_a_row_holds_the_question_as_put_and_as_in_the_data(finished):
    answered = [json.loads(line) for line in lines(finished)]
    row = next(r for r in answered if (r["set"], r["attack"], r["shot"]) == ("unsafe", "what", 1))
    assert row["question"].split()[0] == "what"
    assert row["question"].split()[1:] == row["original_question"].split()[1:]
    assert row["kind"] == "unsafe"
    assert row["expected"].startswith("sorry")
    assert Path(row["image"]).is_file()


def test_a_second_start_asks_what_is_missing_and_counts_the_same(copied):
    root, again = copied
    before = (suite(root) / "metrics.json").read_bytes()
    (file,) = (suite(root) / "rows").iterdir()
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(whole[:20]) + whole[20][:25])  # killed in the middle of row 20
    runner.evaluate(again())
    assert (suite(root) / "metrics.json").read_bytes() == before
    assert len(lines(root)) - 21 == ROWS - 20
    answers = files.Answers(suite(root)).refresh()
    assert (answers.cut, answers.repeated, len(answers)) == (1, 0, ROWS)
    assert list(answers.of([json.loads(line)["key"] for line in whole])) == [state.parse("row", x, "") for x in whole]
    runner.evaluate(again())
    assert len(list((suite(root) / "rows").iterdir())) == 2  # the third start wrote nothing


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("generation.max_new_tokens=5", r"generation\.max_new_tokens: 5 here, 6 there"),
        ("template.system_prompt=benign", r"template\.system_prompt"),
        ("sets.unsafe.attacks.what.shots=2", r"sets\.unsafe\.attacks\.what\.shots: 2 here, 3 there"),
    ],
)
def test_other_settings_in_the_same_directory_are_refused_by_name(copied, override, named):
    _, again = copied
    with pytest.raises(ConfigError, match=named):
        runner.evaluate(again(override))


def test_another_model_in_the_same_directory_is_noticed(copied):
    root, again = copied
    embedded_model.make(root / "model", seed=2)
    with pytest.raises(ConfigError, match="model_hash"):
        runner.evaluate(again(f"model.path={root}/model"))


def test_how_it_is_judged_and_batched_may_change(copied):
    root, again = copied
    result = runner.evaluate(again("judges=[keyword]", "generation.batch_size=3"))
    assert result["headline"] == "keyword"
    assert len(lines(root)) == ROWS


def test_a_stop_before_others_have_judged_leaves_no_rates_of_the_former_judge(copied, monkeypatch):
    root, again = copied
    rates = suite(root) / "metrics.json"
    assert rates.is_file()

    def stopped(*_: object) -> None:
        raise RunError("stopped")

    monkeypatch.setattr(judging, "judge", stopped)
    with pytest.raises(RunError, match="stopped"):
        runner.evaluate(again())
    assert rates.is_file()  # the same judges would write the same
    with pytest.raises(RunError, match="stopped"):
        runner.evaluate(again("judges=[keyword]"))
    assert not rates.exists()


def test_a_key_follows_the_pictures_bytes_and_the_question(finished):
    work = worklist.plan(recipe(finished))
    settings = rows.settings(recipe(finished), "model", "template", Environment(None, {}), {})
    assert len(rows.keyed(work.questions, settings)) == ROWS
    ask = work.questions[0]
    other_image = replace(ask.sample, image=work.questions[-1].sample.image)
    other_text = replace(ask.sample, question=ask.sample.question + " ?")
    asks = [ask, replace(ask, sample=other_image), replace(ask, sample=other_text), replace(ask, shot=1)]
    assert len(rows.keyed(asks, settings)) == 4
    assert not rows.keyed([ask], settings).keys() & rows.keyed([ask], {**settings, "model_hash": "x"}).keys()


def test_answers_are_greedy_whatever_the_batch(finished):
    options = recipe(finished)
    generator = HuggingFace(options.model, options.template, options.generation)
    samples = [ask.sample for ask in worklist.plan(options).questions if ask.set == "unsafe"][:12]
    batched = dict(pair for batch in generator(samples) for pair in batch)
    assert [batched[i] for i in range(12)] == [greedy(generator, sample) for sample in samples]


@torch.inference_mode()
def greedy(generator: HuggingFace, sample) -> str:
    """The definition: one sample, no padding, no cache, the likeliest token each time."""
    inputs = generator.encoder.prompts([sample])
    start = inputs["input_ids"].shape[1]
    for _ in range(6):
        token = generator.model(**inputs, use_cache=False).logits[0, -1].argmax().reshape(1, 1)
        if token.item() == generator.tokenizer.eos_token_id:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return generator.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True).strip()


def test_the_worlds_own_answers_are_judged_as_what_they_are(finished):
    world = embedded_world.load(finished / "world")
    judge, keyword = (one.verdict for one in judges.panel(recipe(finished)))
    for ask in worklist.plan(recipe(finished)).questions:
        row = rows.row("", ask, world.answer(ask.sample.question, world.label(ask.sample.image)))
        assert judge(row) == ("harmful" if ask.kind == "unsafe" else "correct")
        assert keyword(row) == ("harmful" if ask.kind == "unsafe" else "answered")
        assert judge({**row, "response": "sorry i can not help with that"}) == "refused"


class Small:
    """A generator for so many rows at once; more do not fit."""

    def __init__(self, generator: HuggingFace, rows: int) -> None:
        self.rows, self.answer = rows, generator.answer
        generator.answer = self  # type: ignore[method-assign]

    def __call__(self, samples) -> list[str]:
        if len(samples) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.answer(samples)


def test_a_batch_that_does_not_fit_is_halved_and_a_row_that_does_not_is_named(finished, capsys):
    options = recipe(finished)
    generator = HuggingFace(options.model, options.template, options.generation)
    samples = [ask.sample for ask in worklist.plan(options).questions if ask.set == "unsafe"][:20]
    whole = sorted(pair for batch in generator(samples) for pair in batch)
    Small(generator, 5)
    assert sorted(pair for batch in generator(samples) for pair in batch) == whole
    assert generator.batch_size == 4
    assert capsys.readouterr().out.splitlines() == [
        "out of memory with 16 rows; from here on generation.batch_size is 8",
        "out of memory with 8 rows; from here on generation.batch_size is 4",
    ]
    Small(generator, 0)
    with pytest.raises(RunError, match=rf"one row alone: .*test\.json.*, id '{samples[0].id}'"):
        list(generator(samples))
    generator.answer = lambda _: [][0]  # what is no lack of memory is not taken for one
    with pytest.raises(IndexError):
        list(generator(samples))


def test_a_model_that_changes_under_the_run_is_noticed_by_its_hash(finished, tmp_path, monkeypatch):
    embedded_model.make(tmp_path / "other", seed=2)
    shutil.copytree(finished / "model", tmp_path / "model")
    again = recipe(finished, f"run.dir={tmp_path}/run", f"model.path={tmp_path}/model")
    answer = HuggingFace.answer

    def put(model: Path) -> None:
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(model, tmp_path / "model")

    def meanwhile(self, samples):
        put(tmp_path / "other")
        return answer(self, samples)

    with monkeypatch.context() as during:
        during.setattr(HuggingFace, "answer", meanwhile)
        with pytest.raises(RunError, match="the model's files changed since they were hashed; the answers on disk"):
            runner.evaluate(again)
    assert not (suite(tmp_path) / "metrics.json").exists()
    with pytest.raises(ConfigError, match="model_hash"):
        runner.evaluate(again)
    put(finished / "model")  # the one before, in files that are newly written
    assert runner.evaluate(again) == results.read(suite(finished))


def start_workers(again: EvalRecipe, count: int, tmp_path: Path) -> subprocess.Popen:
    configs.write_yaml(again, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "mirage_dist.cli", "eval", str(tmp_path / "recipe.yaml"), "--workers", str(count)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def claimed(root: Path) -> dict:
    """A chunk's claim, as soon as there is one."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for file in (suite(root) / "claims").glob("*.[0-9]"):
            with suppress(OSError):
                return json.loads(file.read_text())
        time.sleep(0.001)
    raise AssertionError("no claim")


def test_three_workers_one_killed_half_way_count_and_report_what_one_does(finished, tmp_path):
    again = recipe(finished, f"run.dir={tmp_path}/run", "generation.batch_size=2")
    pool = start_workers(again, 3, tmp_path)
    killed = claimed(tmp_path)
    os.kill(killed["pid"], signal.SIGKILL)
    output, _ = pool.communicate()
    assert pool.returncode == RunError.status, output
    assert re.search(r"mirage: worker [012] of 3 was killed by signal 9 \(see above\), the first to fail", output)
    mine, whole = (results.read(suite(root)) for root in (tmp_path, finished))
    assert mine == whole
    assert len(lines(tmp_path)) == ROWS
    assert summary(tmp_path / "run") == summary(finished / "run")
    assert cli.main(["eval", str(tmp_path / "recipe.yaml"), "--status"]) == 0


def summary(run: Path) -> bytes:
    assert cli.main(["report", str(run), "--out", str(run / "report")]) == 0
    return (run / "report/summary.json").read_bytes()


def test_a_signal_to_many_workers_ends_all_of_them_in_order(finished, tmp_path):
    again = recipe(finished, f"run.dir={tmp_path}/run", "generation.batch_size=1")
    pool = start_workers(again, 2, tmp_path)
    claimed(tmp_path)
    pool.terminate()
    output, _ = pool.communicate()
    assert pool.returncode == signals.STOPPED, output
    assert "stopped by SIGTERM; every answer so far is on disk" in output
    assert not list((suite(tmp_path) / "claims").iterdir())
    assert 0 < len(lines(tmp_path)) < ROWS


def test_a_folder_without_a_model_is_refused_before_anything_is_written(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        runner.evaluate(recipe(finished, f"model.path={tmp_path}", f"run.dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()


def test_a_peft_adapter_without_its_base_model_is_refused_with_what_to_do(finished, tmp_path):
    """Its hash would be that of the adapter, whatever base model it is applied to."""
    shutil.copytree(finished / "model", tmp_path / "adapter", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({"layer.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    with pytest.raises(ConfigError, match=r"adapter without its base model; merge it first: .*merge_and_unload"):
        runner.evaluate(recipe(finished, f"model.path={tmp_path}/adapter", f"run.dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("library", "named"),
    [("pillow", r"libraries\.pillow: '0' here"), ("transformers", r"libraries\.transformers: '0' here")],
)
def test_a_library_that_computes_the_answers_is_part_of_each_key(copied, monkeypatch, library, named):
    _, again = copied
    monkeypatch.setattr(environment, "version", lambda name: "0" if name == library else version(name))
    with pytest.raises(ConfigError, match=named):
        runner.evaluate(again())


def test_the_image_processor_that_runs_is_part_of_each_key(copied, monkeypatch):
    """On another machine the same model directory may be read by another class, which resizes differently."""
    _, again = copied
    here = environment.of
    monkeypatch.setattr(environment, "of", lambda p: replace(here(p), image_processor="CLIPImageProcessor"))
    with pytest.raises(ConfigError, match="image_processor: 'CLIPImageProcessor' here, 'CLIPImageProcessorPil' there"):
        runner.evaluate(again())


ENGINE = """
from mirage_dist.evals.models.base import Generator

class Echo(Generator):
    def answer(self, samples):
        return [sample.question for sample in samples]

    @classmethod
    def versions(cls):
        return {"echo": "1"}

class Other:
    pass
"""


def test_an_engine_from_outside_the_package_answers_under_its_own_name_and_version(finished, tmp_path, monkeypatch):
    (tmp_path / "lab_engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    runner.evaluate(recipe(finished, f"run.dir={tmp_path}/run", "generation.backend=lab_engine:Echo"))
    answered = [json.loads(line) for line in lines(tmp_path)]
    assert len(answered) == ROWS
    assert all(row["response"] == row["question"] for row in answered)
    settings = json.loads((suite(tmp_path) / "manifest.json").read_text())["settings"]
    assert (settings["generation"]["backend"], settings["libraries"]["echo"]) == ("lab_engine:Echo", "1")
    for backend, named in (("vlm", "generation backend.*vllm"), ("lab_engine:Other", "Generator")):
        with pytest.raises(ConfigError, match=named):
            runner.evaluate(recipe(finished, f"run.dir={tmp_path}/other", f"generation.backend={backend}"))
    assert not (tmp_path / "other").exists()


def test_an_evaluation_that_an_earlier_version_began_goes_on(finished, tmp_path):
    """The sets in its manifest lack the keys that came since."""
    own = recipe(finished)
    now = manifest.read(suite(finished))
    settings = json.loads(json.dumps(now["settings"]))
    for one in settings["sets"].values():
        for source in one["sources"]:
            del source["config"], source["max_pixels"]
    written = state.sealed("suite", {**now, "settings": settings})
    (tmp_path / "manifest.json").write_text(written)
    manifest.check(tmp_path, now["settings"])
    for change in ({"seed": 5}, {"dtype": "bf16"}):
        with pytest.raises(ConfigError, match=f"answers of another evaluation: {next(iter(change))}: "):
            manifest.check(tmp_path, {**now["settings"], **change})
    unsafe = own.sets["unsafe"]
    larger = replace(unsafe, sources=[replace(unsafe.sources[0], max_pixels=77)])
    changed = configs.to_dict(replace(own, sets={**own.sets, "unsafe": larger}))
    with pytest.raises(ConfigError, match=r"sets.unsafe.sources\[0\].max_pixels: 77 here, \d+ there"):
        manifest.check(tmp_path, {**now["settings"], "sets": changed["sets"]})


def test_an_id_twice_in_a_set_is_an_error_that_names_it(finished):
    options = recipe(finished)
    unsafe = options.sets["unsafe"]
    doubled = replace(options, sets={"unsafe": replace(unsafe, sources=unsafe.sources * 2)})
    with pytest.raises(ConfigError, match=r"test_unsafe-0000.*twice"):
        worklist.plan(doubled)


def test_the_world_judge_needs_a_world(finished):
    with pytest.raises(ConfigError, match="judges=\\[keyword\\]"):
        runner.evaluate(replace(recipe(finished), world=None))


def test_a_worker_answers_what_nobody_has_claimed_wherever_it_begins(finished, tmp_path):
    again = recipe(finished, f"run.dir={tmp_path}/run")
    assert runner.evaluate(again, (2, 3)) == results.read(suite(finished))
    assert len(lines(tmp_path)) == ROWS
    assert not list((suite(tmp_path) / "claims").iterdir())


def test_a_signal_ends_the_work_behind_a_batch_and_the_next_start_does_the_rest(finished, tmp_path, monkeypatch):
    again = recipe(finished, f"run.dir={tmp_path}/run")
    monkeypatch.setattr(signals, "_received", [])
    answer = HuggingFace.answer

    def interrupted(self, samples):
        signals.handler(signal.SIGTERM, None)
        return answer(self, samples)

    with monkeypatch.context() as during:
        during.setattr(HuggingFace, "answer", interrupted)
        with pytest.raises(signals.StopRequested):
            runner.evaluate(again)
    assert len(lines(tmp_path)) == again.generation.batch_size
    monkeypatch.setattr(signals, "_received", [])
    assert runner.evaluate(again) == results.read(suite(finished))


def test_a_template_other_than_the_trained_one_is_refused(finished, tmp_path):
    """The paper's code trained and evaluated with different system prompts and pictures."""
    shutil.copytree(finished / "model", tmp_path / "run/export")
    trained = ["run.dir=x", "data.system_prompt=be brief", "data.image_aspect=processor"]
    configs.write_yaml(configs.load("configs/train/demo_sft.yaml", trained, TrainRecipe), tmp_path / "run/config.yaml")
    own = [f"run.dir={tmp_path}/run", f"model.path={tmp_path}/run/export"]
    with pytest.raises(ConfigError, match=r"template\.system_prompt=None, .* data\.system_prompt='be brief'"):
        runner.evaluate(recipe(finished, *own))
    with pytest.raises(ConfigError, match=r"template\.image_aspect='pad', .* data\.image_aspect='processor'"):
        runner.evaluate(recipe(finished, *own, "template.system_prompt=be brief"))


def test_a_system_prompt_that_defends_a_runs_own_export_is_allowed_by_name_and_recorded(finished, tmp_path):
    shutil.copytree(finished / "model", tmp_path / "run/export")
    trained = configs.load("configs/train/demo_sft.yaml", ["run.dir=x"], TrainRecipe)
    configs.write_yaml(trained, tmp_path / "run/config.yaml")
    own = [f"run.dir={tmp_path}/run", f"model.path={tmp_path}/run/export", "template.system_prompt=refuse harm"]
    with pytest.raises(ConfigError, match="or name it as a defence: template"):
        runner.evaluate(recipe(finished, *own))
    defended = recipe(finished, *own, "template.defence=safety-prompt")
    runner.evaluate(defended)
    written = json.loads((suite(tmp_path) / "manifest.json").read_text())["settings"]["template"]
    assert (written["defence"], written["system_prompt"]) == ("safety-prompt", "refuse harm")
    assert not {row["key"] for row in answered(tmp_path)} & {row["key"] for row in answered(finished)}
    assert manifest.recipe_hash(defended) != manifest.recipe_hash(recipe(finished))
    read = report.report({"npo": tmp_path / "run"}, tmp_path / "report")
    assert read["suite"] == "demo"
    for file in ("report.md", "index.html"):
        text = (tmp_path / "report" / file).read_text()
        assert "npo was asked with the defence safety-prompt, a system prompt: “refuse harm”" in text
    with pytest.raises(ConfigError, match=r"template\.image_aspect"):  # nothing else may differ
        runner.evaluate(recipe(finished, *own, "template.defence=safety-prompt", "template.image_aspect=processor"))
    with pytest.raises(ConfigError, match=r"template\.defence='x': expected a name, and the defence itself"):
        recipe(finished, "template.defence=x")


def answered(root):
    return [json.loads(line) for file in suite(root).glob("rows/*.jsonl") for line in file.open()]


WRONG = {
    "attacks.what.kind=blur": r"sets\.unsafe\.attacks\.what\.kind='blur': unknown attack; expected one of swap, words",
    "attacks.what.kind=swop": r"did you mean 'swap'\? Expected one of swap, words",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_recipe_is_checked_alone_before_its_model(tmp_path, wrong, capsys):
    """Neither model nor data exist here."""
    words = ["eval", "configs/eval/demo.yaml", f"world.dir={tmp_path}/world", f"run.dir={tmp_path}/run"]
    for flag in ([], ["--check"]):
        assert cli.main([*words, f"sets.unsafe.{wrong}", *flag]) == 2
        assert re.search(WRONG[wrong], capsys.readouterr().err)
    assert cli.main([*words, "judges=[guard]", "--check"]) == 2
    assert "judges[0].kind='guard': unknown judge; expected one of keyword" in capsys.readouterr().err
    assert cli.main([*words, "--check"]) == 0
    assert "the recipe is in order; neither data nor model were read" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_rows_of_an_evaluation_that_is_not_complete_are_refused_by_name(copied):
    root, _ = copied
    status.require_complete(suite(root) / "rows")
    file = next(suite(root).glob("rows/*.jsonl"))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))
    words = f"{re.escape(str(suite(root)))}: {ROWS - 3} of {ROWS} answers; the evaluation is not complete"
    for folder in (suite(root) / "rows", root):  # its rows, and a folder of several
        with pytest.raises(RunError, match=words):
            status.require_complete(folder)
    (suite(root) / "metrics.json").unlink()
    for given in (None, "demo"):
        with pytest.raises(RunError, match=f"{ROWS - 3} of {ROWS} answers, not judged yet"):
            report.report({"npo": root / "run"}, root / "report", suite=given)
    assert not (root / "report").exists()


@pytest.mark.parametrize(("here", "there"), [("auto", "pad"), ("pad", "auto"), ("auto", "auto")])
def test_an_aspect_is_compared_and_kept_by_what_auto_comes_to(finished, tmp_path, here, there):
    shutil.copytree(finished / "model", tmp_path / "run/export")
    trained = configs.load("configs/train/demo_sft.yaml", ["run.dir=x", f"data.image_aspect={there}"], TrainRecipe)
    configs.write_yaml(trained, tmp_path / "run/config.yaml")
    own = [f"run.dir={tmp_path}/run", f"model.path={tmp_path}/run/export", f"template.image_aspect={here}"]
    runner.evaluate(recipe(finished, *own))
    assert json.loads((suite(tmp_path) / "manifest.json").read_text())["settings"]["template"] == {
        "system_prompt": None,
        "image_aspect": "pad",  # the world's processor crops
        "max_length": 2048,
    }


def test_template_options_are_part_of_every_rows_key(finished):
    model = subject.find(recipe(finished).model, finished)
    options = ("template.template_options={}", "template.template_options={enable_thinking: false}")
    one, other = (
        rows.settings(recipe(finished, chosen), model.model_hash, model.template_hash, model.environment, {})
        for chosen in options
    )
    assert "template_options" not in one["template"]  # as rows of earlier versions
    assert other["template"]["template_options"] == {"enable_thinking": False}


def test_three_starts_of_a_slurm_job_that_neither_answer_nor_are_to_stop_are_enough(finished, tmp_path, monkeypatch):
    again = recipe(finished, f"run.dir={tmp_path}/run")
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def broken(*_):
        raise RuntimeError("out of memory")

    for stopped in (False, True, False, True, True, False):
        with monkeypatch.context() as patch:
            patch.setattr(signals, "_received", ["SIGTERM"] if stopped else [])
            patch.setattr(HuggingFace, "__init__", broken)
            with pytest.raises(signals.StopRequested if stopped else RuntimeError, match=r"SIGTERM|out of memory"):
                runner.evaluate(again)
    with pytest.raises(RunError, match=f"job 7 has started 3 times with {ROWS} answers missing"):
        runner.evaluate(again)
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # submitted again
    assert runner.evaluate(again) is not None
