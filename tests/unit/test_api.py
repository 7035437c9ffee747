"""The functions of `mirage_dist.api`: what they take, what they refuse, and that they are the command's."""

import inspect
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import made_runs
import pytest

import mirage_dist
from mirage_dist import api, cli, launching
from mirage_dist import config as configs
from mirage_dist.embedded import world as embedded_world
from mirage_dist.evals import pool
from mirage_dist.schema import ConfigError, EvalRecipe, RunError, TrainRecipe, WorldConfig
from mirage_dist.signals import StopRequested

SFT = "configs/train/demo_sft.yaml"
EVAL = "configs/eval/demo.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Safety data of an embedded world."""
    folder = tmp_path_factory.mktemp("api") / "world"
    sizes = {"base_samples": 5, "safety_samples": 60, "general_samples": 1, "eval_samples": 1}
    embedded_world.make(WorldConfig(dir=str(folder), seed=3, **sizes))
    return folder / "safety-0.95/train.json"


def test_the_package_has_the_functions_without_importing_what_they_need():
    code = """
import sys, mirage_dist
heavy = ("torch", "omegaconf", "numpy", "matplotlib")
print([m for m in heavy if m in sys.modules], mirage_dist.audit.__module__, mirage_dist.evaluate.__module__)
print([m for m in heavy if m in sys.modules and m != "omegaconf"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[] mirage_dist.api mirage_dist.api", "[]"], done.stderr
    assert done.returncode == 0, done.stderr


def test_the_version_is_printed_without_torch():
    code = (
        "import sys; from mirage_dist.cli import main\ntry: main(['--version'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr


def test_a_package_that_is_a_verb_is_called_as_the_function():
    from mirage_dist import report, train
    from mirage_dist.train import run

    assert mirage_dist.train is train is sys.modules["mirage_dist.train"]
    assert train.run is run
    assert inspect.signature(train) == inspect.signature(api.train)
    assert inspect.signature(report) == inspect.signature(api.report)
    with pytest.raises(ConfigError, match="unknown key 'tain'"):
        mirage_dist.train({"include": SFT, "tain": {}})
    with pytest.raises(ConfigError, match="no run to report"):
        mirage_dist.report([])
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        getattr(mirage_dist, "trian")  # noqa: B009


def test_a_mapping_is_read_as_a_file_of_the_same_content(tmp_path):
    content = {
        "include": SFT,
        "seed": 4,
        "run": {"dir": tmp_path / "run"},
        "objective": {"name": "npo", "beta": 0.3},
        "data": {"streams": {"forget": [{"format": "samples", "path": "${world.dir}/f.jsonl"}]}},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(configs.with_paths_as_text(content)))
    read = configs.load(file, ["train.lr=2e-4"], TrainRecipe)
    assert configs.load(content, ["train.lr=2e-4"], TrainRecipe) == read
    assert read.objective == {"name": "npo", "beta": 0.3}
    assert read.data.streams["forget"][0].path == "runs/demo/world/f.jsonl"
    assert content["include"] == SFT  # what was given stays as it is
    assert configs.load(configs.literal(configs.to_dict(read)), [], TrainRecipe) == read


class Held:
    """What no recipe can hold."""


def itself() -> dict:
    tree: dict = {"include": SFT}
    tree["run"] = tree
    return tree


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.train("no.yaml"), r"no\.yaml: no such file"),
        (
            lambda: api.train(configs.load(EVAL, [], EvalRecipe)),
            "a EvalRecipe is no recipe here; give .* a TrainRecipe",
        ),
        (lambda: api.train(None), "a NoneType is no recipe here"),
        (lambda: api.train({"include": SFT, "run": Held()}), "the recipe: not readable as YAML: .*Held"),
        (lambda: api.train(itself()), "the recipe: not readable as YAML: "),
        (lambda: api.train({"include": [SFT, "no.yaml"]}), r"no\.yaml: no such file"),
        (lambda: api.train(SFT, "train.lr=1"), "overrides='train.lr=1': expected a mapping, or a list of key=value"),
        (lambda: api.train(SFT, {"train.lr": Held()}), "a recipe cannot hold this .*Held"),
        (lambda: api.train(SFT, {"train.lr": "fast"}), r"train\.lr='fast'"),
        (lambda: api.train(SFT, ["train.lrr=1"]), "did you mean 'lr'"),
        (lambda: api.train(SFT, ranks=0), "ranks=0; expected a whole number from 1 to 1024"),
        (lambda: api.train(SFT, ranks="8"), "ranks='8'; expected a whole number"),
        (lambda: api.train(SFT, {"train.dry_run": True}), r"train\.dry_run: .*use `mirage train`"),
        (lambda: api.train(SFT, {"objective.name": "__main__:Mine"}), r"objective\.name=__main__:Mine: .*my_lab:Mine"),
        (lambda: api.evaluate(EVAL, {"follow": "runs/x"}), "follow=runs/x: .*use `mirage eval`"),
        (lambda: api.evaluate(EVAL, workers=0), "workers=0; expected a whole number"),
        (lambda: api.evaluate(SFT), "unknown key 'data'"),
        (lambda: api.report([]), "no run to report"),
        (lambda: api.report("nowhere"), "nowhere"),
        (lambda: api.audit([]), "no data to audit"),
        (lambda: api.audit("no.json"), r"no\.json"),
        (lambda: api.audit("x.json", on_bad_record="skp"), "on_bad_record='skp'; allowed: error, skip"),
        (lambda: api.audit("x.json", ngrams=0), "ngrams 0: expected a whole number"),
    ],
)
def test_what_is_wrong_is_a_config_error(call, message, monkeypatch):
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(launching.subprocess, "Popen", started)
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_process_of_several_starts_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="this one is already one of 2; use `mirage train`"):
        api.train(SFT)


def test_an_audit_is_that_of_the_command(data, tmp_path, capsys):
    own = api.audit(data, tmp_path / "api", ngrams=2, length=True)
    assert cli.main(["audit", str(data), "--ngrams", "2", "--length", "--out", str(tmp_path / "command")]) == 0
    text = (tmp_path / "command/audit.json").read_text()
    assert (tmp_path / "api/audit.json").read_text() == text
    assert json.loads(text) == own.details
    assert own.table in capsys.readouterr().out
    assert [file.name for file in own.files] == ["audit.json", "audit.svg", "audit.png"]
    assert all(file.is_file() for file in own.files)
    verdict = json.loads(text)["verdict"]
    assert (own.passed, own.measured, own.verdict) == (verdict["passed"], verdict["measured"], verdict["text"])
    assert "share" in own.words["refused"]
    assert {cue.name: [cue.low, cue.high] for cue in own.cues} == {
        name: cue["balanced_accuracy"]["ci95"] for name, cue in json.loads(text)["cues"].items()
    }
    assert api.audit([data]).files == ()


def test_a_report_is_that_of_the_command_and_its_rates_are_those_of_the_runs(tmp_path, capsys):
    patterns = {
        "npo": {"unsafe": ["refused"], "safe": ["correct"]},
        "sft": {"unsafe": ["harmful"], "safe": ["refused"]},
    }
    for name, pattern in patterns.items():
        made_runs.write_run(tmp_path / name, pattern)
    own = mirage_dist.report([tmp_path / "npo", str(tmp_path / "sft")], tmp_path / "api")
    assert cli.main(["report", str(tmp_path / "npo"), str(tmp_path / "sft"), "--out", str(tmp_path / "command")]) == 0
    for name in ("summary.json", "report.md", "rates.csv"):
        assert (tmp_path / "api" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    assert own.page.is_file()
    assert own.table in capsys.readouterr().out
    assert own.summary == json.loads((tmp_path / "api/summary.json").read_text())
    rates = {name: {(r.measure, r.condition): r for r in of} for name, of in own.rates.items()}
    assert rates["sft"]["asr", "what_k3"].rate == 1
    assert rates["npo"]["asr", "clean"].k == 0
    for name, by_key in rates.items():
        for (measure, condition), rate in by_key.items():
            leaf = own.summary["models"][name][measure]
            leaf = leaf if "rate" in leaf else leaf[condition]
            assert [rate.rate, rate.low, rate.high, rate.k, rate.n] == [
                leaf["rate"],
                *leaf["ci95"],
                leaf["k"],
                leaf["n"],
            ]
    clean = rates["sft"]["rr", "clean"]
    assert str(clean) == f"rr, clean: 100.0 % [{100 * clean.low:.1f}, 100.0] (6 of 6)"
    assert own.figure(tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
    renamed = mirage_dist.report({"a": tmp_path / "npo"})
    assert renamed.page == tmp_path / "npo/report/index.html"
    assert list(renamed.rates) == ["a"]


def test_a_report_without_all_verdicts_is_written_and_an_error(tmp_path):
    made_runs.write_run(tmp_path / "npo", {"unsafe": ["refused"], "safe": ["correct"]})
    (tmp_path / "npo/evals/demo/verdicts/world.jsonl").write_text("")
    with pytest.raises(RunError, match="lacks verdicts"):
        mirage_dist.report(tmp_path / "npo")
    assert (tmp_path / "npo/report/index.html").is_file()


def relayed(code: str) -> tuple[launching.Relay, list[str]]:
    """A process of Python, relayed to its end."""
    lines: list[str] = []
    relay = launching.Relay([sys.executable, "-c", code], {}, lines.append)
    relay.process.wait(30)
    relay.take()
    return relay, lines


def test_lines_of_a_process_come_whole_and_its_faults_are_kept():
    relay, lines = relayed(
        "import os\n"
        "os.write(1, b'one\\ntw'); os.write(2, b'o\\nmirage: SIGTERM received: stopping in order\\n')\n"
        "os.write(2, b'mirage: a.json: record 3\\nmirage: a.json: record 3\\nlaunch/local.sh: rank 0 ended\\n')\n"
        "os.write(1, b'\\xff end')"
    )
    signal, fault = "mirage: SIGTERM received: stopping in order", "mirage: a.json: record 3"
    assert lines == ["one", "two", signal, fault, fault, "launch/local.sh: rank 0 ended", "\ufffd end"]
    assert relay.fault("none") == "a.json: record 3"
    assert relayed("print('mirage is a word')")[0].fault("none") == "none"


def test_a_process_that_is_left_behind_does_not_hold_the_relay():
    start = time.monotonic()
    _, lines = relayed("import subprocess; print('here', flush=True); subprocess.Popen(['sleep', '20'])")
    assert lines == ["here"]
    assert time.monotonic() - start < 15


def test_a_log_that_raises_leaves_no_rank_running(tmp_path, monkeypatch):
    """The launcher writes more than a pipe holds before it ends: it ends only if somebody still reads."""
    ended = tmp_path / "ended"
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(
        f"trap 'yes end | head -c 300000; touch {ended}; exit 75' TERM\necho begun\nwhile :; do sleep 0.05; done\n"
    )
    monkeypatch.setattr(launching, "LAUNCHER", launcher)

    def log(line: str) -> None:
        raise OSError(f"no place for {line}")

    with pytest.raises(OSError, match=r"^no place for begun$"):
        launching.train(1, "a.yaml", log=log)
    assert ended.exists()


@pytest.mark.parametrize(
    ("statuses", "error", "message"),
    [
        ((0, 75), StopRequested, "1 of 2 workers stopped on request, the first of them worker 1"),
        ((75, 75), StopRequested, "2 of 2 workers stopped on request, the first of them worker 0"),
        ((75, 1), RunError, "worker 1 of 2 ended with status 1"),
        ((75, 2), ConfigError, "worker 1 of 2 ended with status 2"),
    ],
)
def test_workers_that_were_stopped_have_not_finished(tmp_path, monkeypatch, statuses, error, message):
    """Stand-ins for the workers end with these statuses; nobody signals the process that started them."""
    worker = tmp_path / "python"
    own = " ".join(map(str, statuses))
    worker.write_text(f'#!/bin/bash\nstatuses=({own}) place=${{*: -1}}\nexit "${{statuses[${{place%/*}}]}}"\n')
    worker.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(worker))
    with pytest.raises(error, match=message):
        pool.run("a.yaml", [], len(statuses), log=lambda line: None)


def test_the_api_is_documented_and_typed():
    for name in ("train", "evaluate", "report", "audit"):
        function = getattr(api, name)
        assert function.__doc__.startswith(f"`mirage {name.replace('evaluate', 'eval')} ")
        assert "Raises ConfigError" in function.__doc__
        for parameter in inspect.signature(function).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty
            if parameter.name not in ("recipe", "overrides", "runs", "data"):
                assert re.search(rf"\b{parameter.name}\b", function.__doc__) or name == "audit"


def test_drawing_leaves_the_backend_and_the_figures_of_the_caller_alone(data, tmp_path):
    """A notebook's backend shows its figures inline; another one would show none, without a word."""
    made_runs.write_run(tmp_path / "npo", {"unsafe": ["refused"], "safe": ["correct"]})
    code = f"""
import matplotlib, mirage_dist
matplotlib.use("svg")
from matplotlib import pyplot as plt
figure = plt.figure()
mirage_dist.audit({str(data)!r}, {str(tmp_path / "audit")!r})
mirage_dist.report({str(tmp_path / "npo")!r}).figure({str(tmp_path / "overview.png")!r})
print(matplotlib.get_backend(), plt.get_fignums(), plt.gcf() is figure, matplotlib.rcParams["font.size"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["svg [1] True 10.0"], done.stderr
